"""Annotations of any format, checked as a whole before anything is trained or scored: `read`.

In our own format, one JSON object per line (`vlm.data.formats` holds each format in one file):

    {"image": "images/0001.jpg", "prefix": "caption en", "suffix": "a red car"}
    {"image": "images/0002.jpg", "prefix": "answer en what colour?", "answers": ["red", "red", "dark red"], "id": "q7"}
    {"images": ["a.jpg", "b.jpg"], "prefix": "answer en what changed?", "suffix": "the car is gone"}
    {"prefix": "answer en what is the capital of France?", "suffix": "Paris"}

    image       path below the image root (the file's own folder by default); nothing else is ever opened, no URLs
    images      instead of `image`, several of them in the order in which the model sees them; `[]` is none
    prefix      what the model is asked; may be empty
    suffix      what the model should say: the training target; "" is "nothing to say" and teaches to stop at once
    references  captions that an evaluation compares with (a list of text)
    answers     answers of different people to the same question (a list of text)
    id          text or a whole number, unique in the file; the line number by default

A line without `image` and `images` is about text alone. Other keys are kept in `Example.info`, unless something that
was meant for the model would be lost with them. Refused are: a key that resembles one of these (`answer`, `suffix2`,
`image_2`, and `image` beside `images`), dialogues (`conversations`, `messages`), `video` and `audio`, a key whose value
is an image that the line does not show otherwise, and in a line without an image every key that speaks of one. Probes
of a vision tower read `{"image": ..., "label": ...}` instead.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlm import registry
from vlm.data import strictjson
from vlm.data.problems import Problem, Refused, refusal
from vlm.errors import DataError
from vlm.words import shown

if TYPE_CHECKING:
    from vlm.data.checks import ImageRoot
    from vlm.data.examples import Example, Labelled, Paired

DEFAULT = "jsonl"
"""The format of a file that no other format recognises; it says what is wrong with it."""

_T = TypeVar("_T", "Example", "Labelled", "Paired")


def read(
    path: str | Path,
    format: str | None = None,
    *,
    image_root: str | Path | None = None,
    require: Sequence[str] = ("suffix",),
    skip_bad: bool = False,
) -> tuple[list[Example], list[Problem]]:
    """All examples of an annotation file, in order, and the problems of the lines that were skipped.

    Args:
        path: the file.
        format: a file of `vlm.data.formats`; None tells it from the content.
        image_root: folder that holds the images. No image outside it is accepted, symbolic links included.
        require: which of `suffix`, `references` and `answers` every line must have; `prefix` always.
        skip_bad: skip unusable lines and return their problems, instead of refusing the file.

    Raises:
        ConfigError: an unknown format.
        DataError: the file itself is unusable, or (without `skip_bad`) lines are: all of them are listed with file,
            line and code, not only the first.
    """
    unknown = set(require) - {"suffix", "references", "answers"}
    assert not unknown, unknown
    from vlm.data import checks

    return _read(path, format, image_root, skip_bad, functools.partial(checks.example, require=require))


def read_labelled(path: str | Path, image_root: str | Path | None = None, format: str | None = None) -> list[Labelled]:
    """Images with a class each, `{"image": ..., "label": ...}` per line (and `id` if wanted), in order.

    Raises:
        ConfigError, DataError: as `read` without `skip_bad`: every unusable line is listed.
    """
    from vlm.data import checks

    return _read(path, format, image_root, False, checks.labelled)[0]


def read_pairs(path: str | Path, image_root: str | Path | None = None, format: str | None = None) -> list[Paired]:
    """Images with the texts that belong to them, `{"image": ..., "captions": [...]}` per line, in order.

    One key holds the text or texts: `text`, `texts`, `caption`, `captions`, `references` or `suffix`. `id` and
    `language` if wanted; an image may stand in several lines.

    Raises:
        ConfigError, DataError: as `read` without `skip_bad`: every unusable line is listed.
    """
    from vlm.data import checks

    return _read(path, format, image_root, False, checks.paired)[0]


def formats() -> list[str]:
    """Every annotation format, by name."""
    return registry.kinds("vlm.data.formats")


def records(path: str | Path, format: str) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """The records of an annotation file of this format with their numbers, nothing checked: images need not be there.

    Raises:
        ConfigError: an unknown format. DataError: the file itself is unusable.
    """
    found: Iterator[tuple[int, dict[str, Any] | Refused]] = registry.part("vlm.data.formats", format).records(
        Path(path), shown(path)
    )
    return found


def recognised(path: str | Path) -> str:
    """The format of a file by its first bytes; `DEFAULT` where none is recognised or the file cannot be read, which its
    reader says. Raises DataError if it looks like several."""
    described = {kind: part.FORMAT.recognise for kind, part in registry.parts("vlm.data.formats").items()}
    name = shown(path)
    try:
        descriptor = strictjson.open_regular(path, name)
    except DataError:
        return DEFAULT
    try:
        head = os.read(descriptor, strictjson.HEAD_BYTES)
    except OSError:
        return DEFAULT
    finally:
        os.close(descriptor)
    found = [kind for kind, recognise in described.items() if recognise is not None and recognise(head)]
    if len(found) > 1:
        raise DataError(f"{name}: could be {' or '.join(found)}; name the format")
    return found[0] if found else DEFAULT


def _read(
    path: str | Path,
    format: str | None,
    image_root: str | Path | None,
    skip_bad: bool,
    make: Callable[[dict[str, Any], int, str, ImageRoot], _T],
) -> tuple[list[_T], list[Problem]]:
    """What `make(record, number, file, images)` makes of every record, and why it could not."""
    from vlm.data.checks import ImageRoot

    name = shown(path)
    images = ImageRoot(Path(path).parent if image_root is None else image_root)
    made: list[_T] = []
    problems: list[Problem] = []
    lines_by_id: dict[str, int] = {}
    for number, record in records(path, format or recognised(path)):
        try:
            if isinstance(record, Refused):
                raise record
            item = make(record, number, name, images)
            if item.id in lines_by_id:
                raise Refused("duplicate-id", f"id {item.id!r} is that of line {lines_by_id[item.id]} already")
        except Refused as refused:
            problems.append(Problem(name, number, refused.code, str(refused)))
            continue
        lines_by_id[item.id] = number
        made.append(item)
    if problems and (not skip_bad or not made):
        raise DataError(refusal(problems, name, len(made)))
    if not made:
        raise DataError(f"{name}: no annotation in the file; expected one JSON object per line")
    return made, problems
