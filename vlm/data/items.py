"""What a reader of a benchmark's files makes: `Item`s, and the files it makes them from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlm.errors import DataError
from vlm.words import listed

if TYPE_CHECKING:
    from PIL import Image

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Reads = Literal["references", "answers"]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class File:
    """One file or folder that a split needs."""

    path: str
    """Where it has to lie, below the data root."""
    url: str = ""
    """Where it comes from: the file itself, the archive that holds it, or the page with the download."""
    also: tuple[str, ...] = ()
    """Other paths under which releases have had it; the first that is there is taken."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a model gets to see of an item."""

    images: tuple[Path | Image.Image, ...]
    """The image, or several that the prompt is about, in order; none where it is about text alone."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the prompt template may name: question, choices, language, ..."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item as an official file has it, before the prompt is made.

    Who scores predictions reads what is compared: references, answers, info. Images and prompts are only asked for by
    who shows the item to a model, so a reader gives them at once or as `show`, which then need not succeed for scoring.
    """

    id: str
    images: tuple[Path | Image.Image, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    """As in `Shown`."""
    show: Callable[[], Shown] | None = None
    """Instead of `images` and `fields`."""
    suffix: str | None = None
    references: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    """What metrics and breakdowns read; see `Example.info`."""
    left_out: str = ""
    """Why the official script does not score the item; empty for an item that it scores."""
    left_out_of: Literal["all", "answers"] = "all"
    """Whether that holds for every metric, or for those that read `answers`."""

    @property
    def shown(self) -> Shown:
        """Images and fields. Raises DataError where the file does not have them."""
        return self.show() if self.show is not None else Shown(images=self.images, fields=self.fields)

    def texts(self, reads: Reads) -> tuple[str, ...]:
        """The gold texts for a metric that reads this field; the other field where it is empty."""
        first, second = self.references, self.answers
        return (second or first) if reads == "answers" else (first or second)

    def scored(self, reads: Reads) -> bool:
        """Whether a metric that reads this field scores the item."""
        return not self.left_out or self.left_out_of not in ("all", reads)


def choice_fields(choices: Sequence[str]) -> dict[str, str]:
    """Two spellings of the choices for prompts.

    `choices` joins the texts with blank, tab, blank (PaliGemma's A-OKVQA and AI2D); `lettered_choices` is
    "(A) red, (B) blue" (ScienceQA's, and PaliGemma's for it).
    """
    lettered = ", ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return {"choices": " \t ".join(choices), "lettered_choices": lettered}


def lettered(item: Item, options: tuple[str, ...], answer: str, where: str) -> Item:
    """The item as a question with these options; `answer` is the letter of one, the gold answer its text.

    Raises DataError if it is the letter of none, or if there is no image.
    """
    if not 2 <= len(options) <= len(LETTERS) or answer not in tuple(LETTERS[: len(options)]):
        raise DataError(f"{where}: the answer {answer!r} is not the letter of one of {len(options)} options")
    if not item.images:
        raise DataError(f"{where}: no image; every item needs at least one")
    right = LETTERS.index(answer)
    return Item(
        id=item.id,
        images=item.images,
        fields={**item.fields, **choice_fields(options)},
        answers=(options[right],),
        info={**item.info, "choices": options, "answer_index": right},
    )


def once(pairs: Iterable[tuple[str, _T]], name: str) -> dict[str, _T]:
    """Pairs of id and value as a dict. Raises DataError that lists the ids that occur more than once."""
    found: dict[str, _T] = {}
    twice: dict[str, None] = {}
    for key, value in pairs:
        if key in found:
            twice[key] = None
        found[key] = value
    if twice:
        ids = listed(list(twice), show=repr)
        raise DataError(f"{name}: {len(twice)} ids occur more than once: {ids}; one of each can be meant")
    return found


def check_same(asked: Iterable[str], annotated: Iterable[str], where: str) -> None:
    """Raise DataError unless a file of questions asks exactly what is annotated."""
    questions, gold = dict.fromkeys(asked), dict.fromkeys(annotated)
    for ids, others, what in (
        (questions, gold, "questions without annotation"),
        (gold, questions, "annotations without one"),
    ):
        alone = [key for key in ids if key not in others]
        if alone:
            raise DataError(f"{where}: {len(alone)} {what}: {listed(alone, show=repr)}")
