"""Multiple choice with letters, as JSON lines: for MMMU-style sets of one's own.

`{"id", "question", "options": [...], "answer": "B", "images": ["a.png", ...]}`, one object per line, images below the
folder `images`. Further text keys (`subject`, `topic`, ...) can be used for breakdowns.

Files: `questions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm.data.source import LETTERS, Item, Source, choice_fields
from vlm.errors import DataError

_OWN = ("id", "question", "options", "answer", "images")


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.lines("questions"):
        facts = {key: value for key, value in row.values.items() if isinstance(value, str) and key not in _OWN}
        images = row.texts("images")
        yield item(
            row.key("id"),
            row.text("question"),
            row.texts("options"),
            row.text("answer"),
            tuple(folder / name for name in images),
            facts,
            row.where,
        )


def item(
    key: str,
    question: str,
    options: tuple[str, ...],
    answer: str,
    images: tuple[Any, ...],
    facts: dict[str, Any],
    where: str,
) -> Item:
    """One question; `answer` is the letter of an option, the gold answer its text. Raises DataError if it is none."""
    if not 2 <= len(options) <= len(LETTERS) or answer not in tuple(LETTERS[: len(options)]):
        raise DataError(f"{where}: the answer {answer!r} is not the letter of one of {len(options)} options")
    if not images:
        raise DataError(f"{where}: no image; every item needs at least one")
    right = LETTERS.index(answer)
    return Item(
        id=key,
        images=images,
        fields={"question": question, **choice_fields(options)},
        answers=(options[right],),
        info={**facts, "choices": options, "answer_index": right},
    )
