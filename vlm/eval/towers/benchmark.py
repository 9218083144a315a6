"""What a model of two towers is evaluated on: four tasks on data of one's own, and benchmarks by name.

A benchmark is a YAML file in this folder, read strictly into `Benchmark`: the official files, the protocol that its
published figures were made with, and under which names `vlm.catalogue` holds these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vlm import settings
from vlm.catalogue import released
from vlm.errors import ConfigError, nearest
from vlm.eval.tasks.task import Published, Split
from vlm.words import columns

Kind = Literal["zeroshot", "retrieval", "knn", "linear"]
Protocol = Literal["plain", "paper"]
_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Figure(Published):
    """A published figure of a checkpoint."""

    tokens: int | None = None
    """Patch budget of a NaFlex tower."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark from its official files, or (with no splits) a task on data of one's own."""

    name: str
    title: str
    kind: Kind
    needs: str = ""
    """What its data are, in a line for the list of tasks."""
    format: str = ""
    """`classes` (a folder per class and a file with their names), or a file of `vlm.data.benchmarks`."""
    splits: Mapping[str, Split]
    default_split: str = ""
    protocol: Protocol = "plain"
    captions_per_image: int | None = None
    """Only the first so many captions of an image count."""
    citation: str = ""
    note: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)
    """Metric of the default split -> figure of the catalogue of released checkpoints."""

    def published(self) -> list[Figure]:
        """The figures of every released checkpoint that has one."""
        found: list[Figure] = []
        catalogue = released.load()
        for one in catalogue.checkpoints:
            for metric, name in self.figures.items():
                values = {None if one.image_size else one.tokens: one.published.get(name)}
                if name == "imagenet" and one.imagenet_by_patches:
                    values = {int(tokens): value for tokens, value in one.imagenet_by_patches.items()}
                found += [
                    Figure(
                        model=one.id,
                        metric=metric,
                        split=self.default_split,
                        value=value,
                        source=catalogue.source(one),
                        resolution=one.image_size,
                        tokens=tokens,
                    )
                    for tokens, value in values.items()
                    if value is not None
                ]
        return found

    def split(self, name: str = "") -> Split:
        """The split of that name, the default one for "". Raises ConfigError that names the nearest."""
        chosen = name or self.default_split
        if chosen not in self.splits:
            raise ConfigError(
                f"task {self.name!r} has no split {chosen!r}{nearest(chosen, self.splits)}; it has"
                f" {', '.join(self.splits) or 'none: its data are yours'}"
            )
        return self.splits[chosen]


_FOLDERS = "a folder of folders, one per class, or JSONL with image and label"
_OWN: tuple[tuple[Kind, str, str], ...] = (
    ("zeroshot", "Zero-shot classification: the class whose text is nearest", _FOLDERS),
    ("retrieval", "Image-text retrieval, both ways", "JSONL with image and captions (language if there are several)"),
    ("knn", "k nearest neighbours on frozen features", f"{_FOLDERS}; with --train, or folders train and test"),
    ("linear", "Linear probe on frozen features", f"{_FOLDERS}; with --train, or folders train and test"),
)
OWN = {kind: Benchmark(name=kind, kind=kind, title=title, needs=needs, splits={}) for kind, title, needs in _OWN}
"""The tasks on data of one's own, by name."""


@dataclass(frozen=True)
class Chosen:
    """A task and the split that was asked for ("": its default)."""

    task: Benchmark
    split: str = ""

    @property
    def label(self) -> str:
        """`task` or `task@split`, for folders and tables."""
        return f"{self.task.name}@{self.split}" if self.split else self.task.name


def names() -> list[str]:
    """Every task of a model of two towers."""
    return [*OWN, *sorted(path.stem for path in _HERE.glob("*.yaml"))]


@cache
def get(name: str) -> Benchmark:
    """The task with exactly this name. Raises ConfigError that names the nearest."""
    if name in OWN:
        return OWN[name]
    if name not in names():
        raise ConfigError(f"unknown task {name!r}{nearest(name, names())}; known: {', '.join(names())}")
    return settings.load(Benchmark, _HERE / f"{name}.yaml")


def chosen(text: str) -> list[Chosen]:
    """What `--tasks` names, comma-separated, in order; empty where none of them is a task of two towers.

    Raises:
        ConfigError: tasks of both sorts, an unknown split, the same task twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    ours = [part for part in parts if part.partition("@")[0] in names()]
    if not ours:
        return []
    others = [part for part in parts if part not in ours]
    if others:
        raise ConfigError(
            f"{', '.join(ours)} {'is' if len(ours) == 1 else 'are'} for a model of two towers, {', '.join(others)} for"
            " a model that writes text, or unknown (--list-tasks); evaluate them in two runs"
        )
    if len(set(ours)) < len(ours):
        raise ConfigError(f"a task is named twice in {text!r}; results of one would overwrite those of the other")
    found = []
    for part in ours:
        name, at, split = part.partition("@")
        if at:
            get(name).split(split)
        found.append(Chosen(get(name), split))
    return found


def facts(one: Chosen, model: str, tokens: int | None) -> dict[str, Any]:
    """What the results say about the task, with the published figures of the checkpoint that has this name.

    Args:
        model: a path or hub id. tokens: its patch budget, of a NaFlex tower.
    """
    task = one.task
    split = one.split or task.default_split
    every = task.published()
    of_model = [figure for figure in every if matches(figure, model, tokens)]
    return {
        "name": task.name,
        "title": task.title,
        "kind": task.kind,
        "split": split,
        "expected_items": task.split(one.split).expected_items if task.splits else None,
        "citation": task.citation,
        "note": task.note,
        "published": [asdict(figure) for figure in of_model if figure.split == split],
        "published_for_other_splits": [asdict(figure) for figure in of_model if figure.split != split],
        "published_for_other_models": [asdict(figure) for figure in every if figure not in of_model],
    }


def matches(figure: Figure, model: str, tokens: int | None) -> bool:
    """Whether a figure is about the checkpoint of this name: a folder or hub id that is, or ends in, its name.

    `google/siglip-base-patch16-224` is also `.../siglip-base-patch16-224` and what the hub's cache makes of it. A
    NaFlex figure is about one patch budget.
    """
    name = figure.model.rpartition("/")[2]
    parts = model.replace("\\", "/").rstrip("/").split("/")
    named = any(part == name or part.endswith(f"--{name}") for part in parts)
    return named and figure.tokens in (None, tokens)


def rows() -> Sequence[tuple[str, ...]]:
    """The tasks for a table: name, split and its items, what it needs, title."""
    found = []
    for task in map(get, names()):
        files = "; ".join(file.path for file in task.split().files.values()) if task.splits else ""
        count = task.split().expected_items if task.splits else None
        items = "-" if count is None else f"{count:,}"
        found.append((task.name, task.default_split or "-", items, task.protocol, task.title, task.needs or files))
    return found


def table() -> str:
    """All tasks as plain text."""
    heading = ("task", "split", "items", "protocol", "title", "data")
    return columns([heading, *rows()], left=range(len(heading)))
