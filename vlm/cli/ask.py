"""`vlm caption` and `vlm ask`: one prompt about some images, an answer or an error for each.

`vlm caption` asks about one image after the other, `vlm ask` about all of them at once, or about none.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from vlm.cli import console
from vlm.errors import DataError, ImageError, VLMError
from vlm.images.load import load_image, shown

Group = Sequence[str]
"""Paths of the images of one question."""


def ask_about(
    groups: Sequence[Group],
    prompt: str,
    model: str,
    *,
    device: str,
    dtype: str | None,
    as_json: bool,
    geometry: Mapping[str, Any],
    **generation: Any,
) -> int:
    """Print an answer for each group of images, in order, as batches finish; returns the exit code.

    An image that cannot be decoded, or a prompt that leaves no room in the model beside its images, is one line on
    stderr, or with `as_json` a JSON line with `error` and `code`. An answer that was cut at `max_new_tokens` is told on
    stderr, or is `"finish": "length"`.

    Args:
        groups: paths of the images that are asked about together; an empty one is a question about text alone.
        geometry: how the model reads its images, if not as it is (`vlm.checkpoints.geometry.with_geometry`).
        generation: `batch_size`, `max_new_tokens`, `num_beams`, `beam_search` and `strip_control` of `vlm.generate`.
    """
    num_bad = 0
    for group, outcome in _outcomes(groups, prompt, (model, device, dtype, geometry), generation):
        name = ", ".join(map(shown, group))
        if isinstance(outcome, VLMError):
            num_bad += 1
            values = {"error": str(outcome), "code": getattr(outcome, "code", "too-long")}
        else:
            values = {"text": outcome, "finish": outcome.finish}
        if as_json:
            asked = {"image": group[0]} if len(group) == 1 else {"images": list(group)}
            print(json.dumps({**asked, "prompt": prompt, **values}), flush=True)
        elif "error" in values:
            print(f"error: {values['code']}: {values['error']}", file=sys.stderr)
        else:
            line = " ".join(values["text"].split())
            print(f"{name}: {line}" if len(groups) > 1 else line, flush=True)
            if values["finish"] == "length":
                limit = generation["max_new_tokens"]
                about = f"{name}: " if name else ""
                print(f"{about}cut after {limit} tokens (--max-new-tokens)", file=sys.stderr)
    if num_bad and len(groups) > 1:
        print(f"{num_bad} of {len(groups)} images could not be read", file=sys.stderr)
    return console.OK if not num_bad else console.REFUSED if num_bad == len(groups) else console.SKIPPED


def _outcomes(
    groups: Sequence[Group], prompt: str, opening: tuple[Any, ...], generation: dict[str, Any]
) -> Iterator[tuple[Group, Any]]:
    """(paths, `vlm.generation.Answer` or the error) for each group."""
    # Before torch is imported: a wrong path should not take seconds to say so. Stops at the first that decodes.
    if all(isinstance(_decode(group), ImageError) for group in groups):
        yield from ((group, outcome) for group in groups if isinstance(outcome := _decode(group), ImageError))
        return
    net, processor = _open(*opening)
    from vlm.generation.engine import generate

    size = generation["batch_size"]
    for start in range(0, len(groups), size):
        chunk: list[tuple[Group, list[Image.Image] | VLMError]] = []
        for group in groups[start : start + size]:
            decoded = _decode(group, processor.image_transform.background)
            chunk.append((group, decoded if isinstance(decoded, ImageError) else _fit(decoded, prompt, net, processor)))
        good = [(group, images) for group, images in chunk if not isinstance(images, VLMError)]
        ids = [", ".join(map(shown, group)) or "the question" for group, _ in good]
        images = [images for _, images in good]
        texts = iter(generate(net, processor, images, [prompt] * len(good), ids=ids, **generation) if good else [])
        yield from ((group, item if isinstance(item, VLMError) else next(texts)) for group, item in chunk)


def _decode(group: Group, background: tuple[int, int, int] = (255, 255, 255)) -> list[Image.Image] | ImageError:
    try:
        return [load_image(path, background=background) for path in group]
    except ImageError as error:
        return error


def _fit(images: list[Image.Image], prompt: str, net: Any, processor: Any) -> list[Image.Image] | VLMError:
    """The images, or why they and the prompt do not fit into the model together."""
    from vlm.model.lengths import context_of, image_tokens, over_context

    try:
        (text,) = processor.lengths([[]], [prompt], ids=["prompt"])
    except DataError as error:
        return error
    problem = over_context(text + 1, image_tokens(images, processor), context_of(net.config))
    return images if problem is None else DataError(f"the prompt: {problem}")


def _open(model: str, device: str, dtype: str | None, geometry: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    from vlm.checkpoints.directory import load
    from vlm.checkpoints.geometry import with_geometry

    console.quiet_transformers()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return with_geometry(*load(model, dtype=dtype, device=device), **geometry)
