"""Which tasks there are, and how a name, a file or one line of configuration becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vlm import settings
from vlm.data.items import File
from vlm.errors import ConfigError, nearest
from vlm.eval.tasks.loading import Task
from vlm.eval.tasks.task import Split, TaskDecoding, check_scoring
from vlm.eval.towers import benchmark as towers
from vlm.words import columns

_HERE = Path(__file__).parent
_SPLIT = "data"
"""Name of the only split of a task that is one JSONL file."""
_PROMPT_WIDTH = 50  # of the table


@dataclass(frozen=True, kw_only=True)
class _Jsonl:
    """The short form of a task of one's own."""

    data: str
    metrics: tuple[str, ...]
    image_root: str = ""
    title: str = ""
    prompt: str = "{prefix}"
    decoding: TaskDecoding = field(default_factory=TaskDecoding)
    post: str = "none"
    candidates: tuple[str, ...] = ()
    breakdown: tuple[str, ...] = ()
    expected_items: int | None = None

    def __post_init__(self) -> None:
        check_scoring(self.metrics, self.post)


@dataclass(frozen=True)
class Selected:
    """A task and the split that was asked for (None: the task's default)."""

    task: Task
    split: str | None = None

    @property
    def label(self) -> str:
        """`task` or `task@split`, for folders and tables."""
        return self.task.name if self.split is None else f"{self.task.name}@{self.split}"


def names() -> list[str]:
    """Every task that comes with the project, sorted."""
    return sorted(path.stem for path in _HERE.glob("*.yaml"))


@cache
def get(name: str) -> Task:
    """The task with exactly this name. Raises ConfigError that names the nearest."""
    if name not in names():
        known = [*names(), *towers.names()]
        raise ConfigError(f"unknown task {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    task = settings.load(Task, _HERE / f"{name}.yaml")
    assert task.name == name, f"{name}.yaml calls itself {task.name!r}"
    return task


def load_file(path: str | Path) -> list[Task]:
    """The tasks of a YAML file of one's own.

    The file is one whole task (with `name`, `splits`, ...), or `name: task` for several; each may also have the short
    form `mytask: {data: mine.jsonl, metrics: [cider]}`. Paths in the short form are relative to the file.

    Raises:
        ConfigError: the file cannot be read, or a key, type or value is wrong; the place is named.
    """
    path = Path(path)
    tree = settings.read_yaml(path)
    if "name" in tree and "splits" in tree:
        return [settings.from_dict(Task, tree, where=str(path))]
    if not tree:
        raise ConfigError(f"{path}: no task in the file; expected `name: {{data: mine.jsonl, metrics: [cider]}}`")
    return [_named(name, values, path) for name, values in tree.items()]


def _named(name: str, values: Any, path: Path) -> Task:
    where = f"{path}: {name}"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a task, such as {{data: mine.jsonl, metrics: [cider]}}, got {values!r}")
    if "data" in values:
        return _own(name, settings.from_dict(_Jsonl, values, where=where), path.parent)
    return settings.from_dict(Task, {"name": name, **values}, where=where)


def _own(name: str, own: _Jsonl, folder: Path) -> Task:
    files = {"data": File(path=str((folder / own.data).absolute()))}
    if own.image_root:
        files["images"] = File(path=str((folder / own.image_root).absolute()))
    return Task(
        name=name,
        title=own.title or name,
        format="jsonl",
        splits={_SPLIT: Split(files=files, expected_items=own.expected_items)},
        default_split=_SPLIT,
        prompt=own.prompt,
        metrics=own.metrics,
        decoding=own.decoding,
        post=own.post,
        candidates=own.candidates,
        breakdown=own.breakdown,
    )


def select(text: str) -> list[Selected]:
    """What `--tasks` names, comma-separated and in order.

    `vqav2` is a task, `pope@adversarial` one of its splits, `mine.jsonl:cider+rouge_l` a JSONL file with metrics, and
    `mine.yaml` all tasks of a file.

    Raises:
        ConfigError: an unknown task or split, a JSONL file without metrics, the same task twice, nothing named.
    """
    chosen = [found for part in text.split(",") if part.strip() for found in _select(part.strip())]
    if not chosen:
        raise ConfigError(f"no task was named; known: {', '.join(names())}")
    labels = [found.label for found in chosen]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"task {label!r} is named twice; results of one would overwrite those of the other")
    return chosen


def _select(text: str) -> list[Selected]:
    file, _, metrics = text.rpartition(":")
    if file.endswith(".jsonl"):
        chosen = tuple(name for name in metrics.split("+") if name)
        if not chosen:
            raise ConfigError(f"task {text!r}: no metric after the colon; for example {file}:cider+rouge_l")
        return [Selected(_own(Path(file).stem, _Jsonl(data=file, metrics=chosen), Path()))]
    if text.endswith(".jsonl"):
        raise ConfigError(f"task {text!r} is a JSONL file without a metric; for example {text}:cider")
    if text.endswith((".yaml", ".yml")):
        return [Selected(task) for task in load_file(text)]
    name, at, split = text.partition("@")
    task = get(name)
    if at:
        task.split(split)
    return [Selected(task, split if at else None)]


def table() -> str:
    """All tasks as plain text: name, default split and its items, how many other splits, metrics, prompt, title."""
    rows = [("task", "split", "items", "metrics", "prompt", "title")]
    for name in names():
        task = get(name)
        count = task.split().expected_items
        others = len(task.splits) - 1
        split = task.default_split + (f" (+{others})" if others else "")
        prompt = task.prompt.replace("\n", "\\n")
        if len(prompt) > _PROMPT_WIDTH:
            prompt = prompt[: _PROMPT_WIDTH - 4] + " ..."
        rows.append((name, split, "-" if count is None else f"{count:,}", ",".join(task.metrics), prompt, task.title))
    return columns(rows, left=range(len(rows[0])))
