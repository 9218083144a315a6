"""`Task`: everything that has to be fixed before two evaluations may be compared, as data.

A task is a YAML file in this folder (or the user's own), read strictly into these classes. It names the official files,
the prompt, how answers are decoded and cleaned, the metrics, and what others have published for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.data.examples import Example
from vlm.data.items import File
from vlm.errors import ConfigError, DataError, nearest
from vlm.generation.decoding import TASK_TOKENS, BeamSearch, Decoding

POST: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "lower": str.lower,
    "strip": str.strip,
    "first_line": lambda text: text.strip().split("\n", 1)[0],
}
"""Named clean-ups of an answer before it is scored."""
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class TaskDecoding(Decoding):
    """How answers are made, as PaliGemma's published results were: short, and with big_vision's rule of beams."""

    max_new_tokens: int = TASK_TOKENS
    beam_search: BeamSearch = "big_vision"
    """Not read with one beam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_repeatable()


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split with public answers."""

    files: dict[str, File]
    """Role -> file; the roles are the loader's."""
    options: dict[str, Any] = field(default_factory=dict)
    """For the loader."""
    expected_items: int | None = None
    """How many items the official split has; None where that is not certain."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure, to be set beside ours."""

    model: str
    metric: str
    split: str
    value: float
    """As printed: 100 stands for 1.0 of our metrics."""
    source: str
    resolution: int | None = None
    group: str = ""
    """Group of the breakdown that the figure is about; empty for all items."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark."""

    name: str
    title: str
    format: str
    """A file of `vlm.data.benchmarks`, or an annotation format (`vlm.data.formats`)."""
    splits: dict[str, Split]
    default_split: str
    prompt: str
    """The prefix, with the loader's fields in braces: `answer en {question}`."""
    metrics: tuple[str, ...]
    """Names of `vlm.eval.metrics`; the first is the one that is reported."""
    citation: str = ""
    decoding: TaskDecoding = field(default_factory=TaskDecoding)
    post: str = "none"
    """Clean-up of answers before they are scored, a key of `POST`."""
    candidates: tuple[str, ...] = ()
    """Answers that `likelihood` chooses from; empty: those that each item brings."""
    breakdown: tuple[str, ...] = ()
    """Keys of `Example.info` by which results are broken down."""
    average_over: str = ""
    """Key of `Example.info`: metrics are computed in each of its groups alone and then averaged without weights (the
    figures of multilingual captioning are made so: CIDEr over a mixture of languages is another number)."""
    published: tuple[Published, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.default_split not in self.splits:
            raise ConfigError(f"default_split {self.default_split!r} is none of the splits: {', '.join(self.splits)}")
        check_scoring(self.metrics, self.post)

    def split(self, name: str | None = None) -> Split:
        """The split of that name, the default one for None. Raises ConfigError that names the nearest."""
        chosen = self.default_split if name is None else name
        if chosen not in self.splits:
            raise ConfigError(
                f"task {self.name!r} has no split {chosen!r}{nearest(chosen, self.splits)}; it has"
                f" {', '.join(self.splits)}"
            )
        return self.splits[chosen]

    def candidates_of(self, example: Example) -> tuple[str, ...]:
        """What `likelihood` chooses from for one item. Raises DataError if nobody says."""
        given = self.candidates or example.info.get("candidates") or example.info.get("choices") or ()
        if not given:
            raise DataError(
                f"task {self.name!r}, item {example.id!r}: there is nothing to choose from; `by: likelihood` needs"
                f" candidates in the task or choices in its items"
            )
        return tuple(given)

    def post_process(self, text: str) -> str:
        """An answer as it is scored."""
        return POST[self.post](text)

    def groups(self, examples: Sequence[Example], key: str) -> dict[str, str]:
        """Item id -> its group for one key of `breakdown`. Raises ConfigError if items have no such fact."""
        lacking = [example.id for example in examples if key not in example.info]
        if lacking:
            known = sorted({name for example in examples for name in example.info})
            raise ConfigError(
                f"task {self.name!r}: {len(lacking)} items have no {key!r} to break down by, first {lacking[0]!r};"
                f" items have {', '.join(known) or 'nothing'}"
            )
        return {example.id: str(example.info[key]) for example in examples}


def check_scoring(metrics: Sequence[str], post: str) -> None:
    """Raise ConfigError for no metric at all, or an unknown clean-up."""
    if not metrics:
        raise ConfigError("metrics is empty; name at least one")
    if post not in POST:
        raise ConfigError(f"post {post!r}{nearest(post, POST)}; known: {', '.join(POST)}")


def fill(template: str, fields: Mapping[str, str], where: str) -> str:
    """`template` with each `{name}` replaced by that field, once: braces inside a question stay what they are.

    Raises:
        ConfigError: a name that is no field.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in fields:
            raise ConfigError(
                f"{where}: the prompt names {{{name}}}{nearest(name, fields)}; the loader gives"
                f" {', '.join(fields) or 'no fields'}"
            )
        return fields[name]

    return _SLOT.sub(value, template)
