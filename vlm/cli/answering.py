"""`vlm caption` and `vlm ask`: one prompt about some images, an answer or an error for each.

`vlm caption` asks about one image after the other, `vlm ask` about all of them at once, or about none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vlm import children
from vlm.checkpoints.opening import Opening
from vlm.cli import console
from vlm.errors import ImageError
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.request import Reply, Request
from vlm.generation.schedule import Batching
from vlm.images.load import load_image
from vlm.text import control
from vlm.words import shown

Group = Sequence[str]
"""Paths of the images of one question."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How groups of images are asked about.

    Attributes:
        model: a directory or hub id. opening: how it is opened.
        batch_size: groups at a time.
        strip_control: remove control spellings such as `<image>` from the prompt (`vlm.text.control`).
    """

    prompt: str
    model: str
    opening: Opening = Opening()
    decoding: Decoding = Decoding()
    batch_size: int = 8
    strip_control: bool = False


def ask_about(groups: Sequence[Group], how: Asking, *, as_json: bool) -> int:
    """Print an answer for each group of images, in order, as batches finish; returns the exit code.

    An image that cannot be decoded, or a prompt that leaves no room in the model beside its images, is one line on
    stderr, or with `as_json` a JSON line with `error` and `code`. An answer that was cut at `max_new_tokens` is told on
    stderr, or is `"finish": "length"`.

    Args:
        groups: paths of the images that are asked about together; an empty one is a question about text alone.
    """
    num_bad = 0
    for reply in _replies(groups, how):
        num_bad += reply.error is not None
        if as_json:
            print(json.dumps(_line(how.prompt, reply)), flush=True)
        else:
            _print(reply, how.decoding.max_new_tokens, alone=len(groups) == 1)
    if num_bad and len(groups) > 1:
        print(f"{num_bad} of {len(groups)} images could not be read", file=sys.stderr)
    return console.OK if not num_bad else children.REFUSED if num_bad == len(groups) else console.SKIPPED


def _line(prompt: str, reply: Reply) -> dict[str, Any]:
    group: Group = reply.request.key
    asked = {"image": group[0]} if len(group) == 1 else {"images": list(group)}
    if reply.error is not None:
        return {**asked, "prompt": prompt, "error": str(reply.error), "code": reply.code}
    return {**asked, "prompt": prompt, "text": reply.text, "finish": reply.finish}


def _print(reply: Reply, limit: int, *, alone: bool) -> None:
    if reply.error is not None:
        print(f"error: {reply.code}: {reply.error}", file=sys.stderr)
        return
    name = _name(reply.request.key)
    line = " ".join(reply.text.split())
    print(line if alone else f"{name}: {line}", flush=True)
    if reply.finish == "length":
        about = f"{name}: " if name else ""
        print(f"{about}cut after {limit} tokens (--max-new-tokens)", file=sys.stderr)


def _replies(groups: Sequence[Group], how: Asking) -> Iterator[Reply]:
    """An answer or an error for each group."""
    # Before torch is imported: a wrong path should not take seconds to say so. Stops at the first that decodes.
    if all(_problem(group) for group in groups):
        for group in groups:
            yield Reply(request=Request(id=_name(group), prompt=how.prompt, key=group), error=_problem(group))
        return
    from vlm.checkpoints.directory import open_model
    from vlm.generation.models import ModelPredictor

    console.quiet_transformers()
    predictor = ModelPredictor(*open_model(how.model, how.opening), name=how.model)
    batching = Batching(size=how.batch_size, order="given", advice="give a smaller --batch-size")
    engine = Engine(predictor=predictor, decoding=how.decoding, batching=batching)
    (prompt,) = control.checked([how.prompt], strip=how.strip_control)
    requests = [Request(id=_name(group) or "the question", prompt=prompt, images=group, key=group) for group in groups]
    yield from chain.from_iterable(engine.run(requests))


def _name(group: Group) -> str:
    return ", ".join(map(shown, group))


def _problem(group: Group) -> ImageError | None:
    """Why one of these images cannot be used, or None."""
    try:
        for path in group:
            load_image(path)
    except ImageError as error:
        return error
    return None
