"""`vlm caption` and `vlm ask`: one prompt about some images, an answer or an error for each."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from vlm.cli import console
from vlm.errors import ImageError
from vlm.images import load_image, shown


def ask_about(
    paths: Sequence[str],
    prompt: str,
    model: str,
    *,
    device: str,
    dtype: str | None,
    as_json: bool,
    geometry: Mapping[str, Any],
    **generation: Any,
) -> int:
    """Print an answer for each image, in order, as batches finish; returns the exit code.

    An image that cannot be decoded is one line on stderr, or with `as_json` a JSON line with `error` and `code`. An
    answer that was cut at `max_new_tokens` is told on stderr, or is `"finish": "length"`.

    Args:
        geometry: how the model reads its images, if not as it is (`vlm.geometry.with_geometry`).
        generation: `batch_size`, `max_new_tokens`, `num_beams` and `beam_search` of `vlm.generate`.
    """
    num_bad = 0
    for path, outcome in _outcomes(paths, prompt, (model, device, dtype, geometry), generation):
        if isinstance(outcome, ImageError):
            num_bad += 1
            values = {"error": str(outcome), "code": outcome.code}
        else:
            values = {"text": outcome, "finish": outcome.finish}
        if as_json:
            print(json.dumps({"image": path, "prompt": prompt, **values}), flush=True)
        elif "error" in values:
            print(f"error: {values['code']}: {values['error']}", file=sys.stderr)
        else:
            line = " ".join(values["text"].split())
            print(f"{shown(path)}: {line}" if len(paths) > 1 else line, flush=True)
            if values["finish"] == "length":
                limit = generation["max_new_tokens"]
                print(f"{shown(path)}: cut after {limit} tokens (--max-new-tokens)", file=sys.stderr)
    if num_bad and len(paths) > 1:
        print(f"{num_bad} of {len(paths)} images could not be read", file=sys.stderr)
    return console.OK if not num_bad else console.REFUSED if num_bad == len(paths) else console.SKIPPED


def _outcomes(
    paths: Sequence[str], prompt: str, opening: tuple[Any, ...], generation: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """(path, `vlm.generation.Answer` or `ImageError`) for each path."""
    # Before torch is imported: a wrong path should not take seconds to say so. Stops at the first image that decodes.
    if all(isinstance(_decode(path), ImageError) for path in paths):
        yield from ((path, outcome) for path in paths if isinstance(outcome := _decode(path), ImageError))
        return
    net, processor = _open(*opening)
    from vlm.generation import generate

    size = generation["batch_size"]
    for start in range(0, len(paths), size):
        chunk = [(path, _decode(path, processor.image_transform.background)) for path in paths[start : start + size]]
        good = [(path, image) for path, image in chunk if not isinstance(image, ImageError)]
        images, ids = [image for _, image in good], [shown(path) for path, _ in good]
        texts = iter(generate(net, processor, images, [prompt] * len(good), ids=ids, **generation) if good else [])
        yield from ((path, item if isinstance(item, ImageError) else next(texts)) for path, item in chunk)


def _decode(path: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image | ImageError:
    try:
        return load_image(path, background=background)
    except ImageError as error:
        return error


def _open(model: str, device: str, dtype: str | None, geometry: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    from vlm.checkpoints import load
    from vlm.geometry import with_geometry

    console.quiet_transformers()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return with_geometry(*load(model, dtype=dtype, device=device), **geometry)
