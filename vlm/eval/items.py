"""The items of an evaluation: their gold texts, their identity, their kinds, and the shuffled-images control."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from PIL import Image

from vlm.data.content import of_items
from vlm.data.examples import Example
from vlm.errors import DataError
from vlm.words import listed

RESULTS = "results.json"
ITEMS = "items.jsonl"
REPORT = "report.html"
"""Files of a folder of results."""


def gold_texts(example: Example, reads: Literal["references", "answers"]) -> tuple[str, ...]:
    """What a prediction is compared with: the field that the metric reads, else the other one, else the suffix."""
    first, second = example.references, example.answers
    if reads == "answers":
        first, second = second, first
    return first or second or (() if example.suffix is None else (example.suffix,))


def check(examples: Sequence[Example]) -> None:
    """Raise DataError for no items at all, ids that occur twice, and items without any gold text; each is named."""
    if not examples:
        raise DataError("there is nothing to evaluate: the data holds no items")
    twice = [key for key, count in Counter(example.id for example in examples).items() if count > 1]
    if twice:
        raise DataError(f"every item needs an id of its own; occurring more than once: {listed(twice)}")
    bare = [
        f"{example.file}:{example.line} ({example.id})" for example in examples if not gold_texts(example, "references")
    ]
    if bare:
        raise DataError(
            f"{len(bare)} items have nothing to be compared with: {listed(bare)}; add suffix, references or answers"
        )


def choices_of(example: Example) -> tuple[str, ...]:
    """What an item that brings its own candidates can be answered with. Raises DataError if it brings none."""
    given = example.info.get("candidates") or example.info.get("choices")
    if not given:
        raise DataError(f"item {example.id!r} has nothing to choose from; answering by likelihood needs its `choices`")
    return tuple(given)


def image_name(example: Example) -> str:
    """A name of the images for people and for groups, which does not depend on where the data folder lies."""
    return " + ".join(_image_name(image, example.file) for image in example.images)


def _image_name(image: Path | Image.Image, file: str) -> str:
    if isinstance(image, Image.Image):
        pixels = hashlib.sha256(image.tobytes()).hexdigest()[:32]
        return f"pixels {image.mode} {image.size} {pixels}"
    return os.path.relpath(image, Path(file).parent) if file else str(image)


def digest(examples: Sequence[Example]) -> str:
    """sha256 over what predictions depend on: ids, prompts, and the images' content.

    Gold texts are left out: when they are corrected, the predictions stay valid and are only scored again.
    """
    return of_items(examples, ("id", "prefix"))


def shuffle_images(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every item gets the image of another one, never its own: what can be scored then, the text alone gives away.

    Items that share an image are kept together in a shuffled circle; turning the circle by the size of the largest such
    group moves every item to another image:

        images  A A A B C C   turned by 3:  B C C A A A

    Items without an image stay as they are.

    Raises:
        DataError: no item has an image, or one image belongs to more than half of those that have one, so that no such
            exchange exists.
    """
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        if example.images:
            groups.setdefault(image_name(example), []).append(index)
    if not groups:
        raise DataError("images cannot be exchanged: none of the items has one")
    largest = max(groups, key=lambda name: len(groups[name]))
    turn, total = len(groups[largest]), sum(map(len, groups.values()))
    if 2 * turn > total:
        raise DataError(
            f"images cannot be exchanged: {turn} of {total} items have the image {largest}; at most half may"
        )
    rng = random.Random(seed)
    names = sorted(groups)
    rng.shuffle(names)
    circle = [index for name in names for index in rng.sample(groups[name], len(groups[name]))]
    shuffled = list(examples)
    for place, index in enumerate(circle):
        donor = circle[(place + turn) % len(circle)]
        given = examples[donor]
        shuffled[index] = replace(examples[index], image=given.image, more_images=given.more_images)
    return shuffled


def prompt_kind(prefix: str) -> str:
    """A kind for the breakdown, from the prompt alone: "answer en What colour is it?" -> "answer: what colour".

    PaliGemma's task word is kept ("caption en" -> "caption"); of a question the first two words.
    """
    words = prefix.lower().replace("?", " ").replace(",", " ").split()
    if not words:
        return "(empty prompt)"
    task, rest = words[0], words[1:]
    if task not in ("answer", "caption", "cap", "ocr", "describe", "detect", "segment"):
        return " ".join(words[:2])
    if task != "answer":
        return task
    question = rest[1:] if rest and len(rest[0]) == 2 and len(rest) > 1 else rest  # drop the language code
    return f"answer: {' '.join(question[:2])}"
