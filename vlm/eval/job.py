"""What an evaluation asks and how it is scored: from a JSONL file and names of metrics, or from a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm.data.control import without_control
from vlm.data.examples import Example
from vlm.data.problems import Problem
from vlm.data.reading import read
from vlm.errors import ConfigError
from vlm.eval import items, results
from vlm.eval.metrics import registry
from vlm.eval.metrics.registry import Metric
from vlm.eval.tasks.catalogue import Selected
from vlm.eval.tasks.task import Task
from vlm.generation.decoding import Decoding
from vlm.generation.predictor import Bounded, Predictor
from vlm.generation.request import Request
from vlm.generation.schedule import Batching, BatchSize
from vlm.model.lengths import refuse
from vlm.text import control


def _as_it_is(text: str) -> str:
    return text


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked and how it is scored."""

    examples: Sequence[Example]
    source: str
    """Where the examples came from, for people."""
    metrics: Sequence[Metric]
    decoding: Decoding = Decoding()
    problems: Sequence[Problem] = ()
    """Annotations that were left out."""
    skip_bad: bool = False
    """Whether items that are too long for the model are left out too, and not refused."""
    candidates: Callable[[Example], Sequence[str]] | None = None
    """What `likelihood` chooses from."""
    post: Callable[[str], str] = _as_it_is
    """Clean-up of an answer before it is scored; what is stored stays raw."""
    kinds: Mapping[str, str]
    """Item id -> its kind, for the gallery and `by_kind`."""
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Name of a further breakdown -> item id -> group."""
    average_over: str = ""
    """One of `groups`: metrics are computed in each of its groups alone and then averaged without weights."""
    limit: int | None = None
    task: Mapping[str, Any] | None = None
    """What a task says about itself and what others have published for it; goes into the results as it is."""

    def __post_init__(self) -> None:
        self.decoding.check_repeatable()


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the work is done; nothing here changes a result beyond floating-point rounding, but for the control."""

    batch_size: BatchSize = 16
    """Items predicted at a time, or `auto`, the largest power of two that fits into the memory."""
    batch_tokens: int | None = None
    """Instead of `batch_size`: the most image and prompt tokens of a batch, its padding included."""
    shuffle_images: bool = False
    """The control that shows whether the model looks: each item gets another item's image (`seed`)."""
    seed: int = 0
    report: bool = True
    """Write `report.html` too."""
    progress: bool = True
    """Show progress on stderr."""

    def __post_init__(self) -> None:
        self.batching()

    def batching(self) -> Batching:
        """The same for the engine. Raises `ConfigError`: a size below 1."""
        return Batching(size=self.batch_size, tokens=self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which items of a task or a file are read.

    Raises:
        ConfigError: a limit below 1.
    """

    limit: int | None = None
    """Only the first so many items."""
    strip_control: bool = False
    """Remove control spellings such as `<image>` from the prompts (`vlm.text.control`)."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class FileReading(Reading):
    """How a JSONL file is read."""

    skip_bad: bool = False
    """Leave out annotations that are broken or too long for the model, list and count them, instead of refusing."""
    image_root: str | Path | None = None
    """Folder of the images; the data file's own by default."""
    kind_of: Callable[[Example], str] | None = None
    """Example -> kind for the breakdown; taken from the prompt by default."""


def file_job(
    data: str | Path | Sequence[Example],
    metrics: str | Sequence[str],
    decoding: Decoding,
    reading: FileReading = FileReading(),
) -> Job:
    """The job that a JSONL file (or examples) and names of metrics describe; see `vlm.eval.evaluate`."""
    chosen = registry.expand(metrics)
    examples, problems = _examples(data, reading)
    examples = without_control(examples, control.SETTING, strip=reading.strip_control)
    results.check(chosen, examples)
    kind = reading.kind_of or (lambda example: items.prompt_kind(example.prefix))
    return Job(
        examples=examples,
        problems=problems,
        skip_bad=reading.skip_bad,
        source=str(data) if isinstance(data, str | Path) else f"{len(data)} examples in memory",
        metrics=chosen,
        decoding=decoding,
        candidates=items.choices_of if decoding.by == "likelihood" else None,
        kinds={example.id: kind(example) for example in examples},
        limit=reading.limit,
    )


def _examples(data: str | Path | Sequence[Example], reading: FileReading) -> tuple[list[Example], list[Problem]]:
    if isinstance(data, str | Path):
        root = None if reading.image_root is None else Path(reading.image_root)
        examples, problems = read(data, image_root=root, require=(), skip_bad=reading.skip_bad)
    else:
        examples, problems = list(data), []
    examples = examples[: reading.limit]
    items.check(examples)
    return examples, problems


def task_job(
    selected: Selected, root: Path, reading: Reading = Reading(), decoding: Mapping[str, Any] | None = None
) -> Job:
    """The job that a task describes. Raises ConfigError and DataError as `Task.load`.

    Args:
        decoding: options of `Decoding` to use instead of what the task says.
    """
    task, label = selected.task, selected.label
    examples = task.load(root, selected.split, reading.limit)
    examples = without_control(examples, control.SETTING, strip=reading.strip_control)
    items.check(examples)
    averaged = [task.average_over] if task.average_over else []
    groups = {key: task.groups(examples, key) for key in dict.fromkeys([*task.breakdown, *averaged])}
    metrics = registry.expand(task.metrics)
    results.check(metrics, examples, groups.get(task.average_over), task.average_over)
    how = replace(task.decoding, **(decoding or {}))
    if how.by == "likelihood":
        for example in examples:
            task.candidates_of(example)  # raises where an item has none, before another task is predicted
    return Job(
        examples=examples,
        source=f"{label} below {root}",
        metrics=metrics,
        decoding=how,
        candidates=task.candidates_of if how.by == "likelihood" else None,
        post=task.post_process,
        kinds=groups[task.breakdown[0]] if task.breakdown else _prompt_kinds(examples),
        groups=groups,
        average_over=task.average_over,
        limit=reading.limit,
        task=_facts(task, selected.split or task.default_split, how),
    )


def _prompt_kinds(examples: Sequence[Example]) -> dict[str, str]:
    return {example.id: items.prompt_kind(example.prefix) for example in examples}


def _facts(task: Task, split: str, how: Decoding) -> dict[str, Any]:
    """What the results say about the task: enough to judge whether a published figure may be set beside ours."""
    return {
        "name": task.name,
        "title": task.title,
        "split": split,
        "expected_items": task.split(split).expected_items,
        "citation": task.citation,
        "note": task.note,
        "post": task.post,
        "average_over": task.average_over,
        "decoding_is_the_tasks": how == task.decoding,
        "published": [asdict(entry) for entry in task.published if entry.split == split],
        "published_for_other_splits": [asdict(entry) for entry in task.published if entry.split != split],
    }


def fitting(job: Job, predictor: Predictor) -> Job:
    """The job without items that are too long for the model, if it may leave some out. A predictor of one's own need
    not say what is too long.

    Raises:
        DataError: items are too long, each named with file and line, and may not be left out, or none is left.
    """
    if not isinstance(predictor, Bounded):
        return job
    found = predictor.too_long(job.examples, job.candidates or (lambda example: ()))
    if not job.skip_bad or len(found) == len(job.examples):
        refuse(list(found.values()))
    kept = [example for index, example in enumerate(job.examples) if index not in found]
    return replace(job, examples=kept, problems=[*job.problems, *found.values()]) if found else job


def requests(examples: Sequence[Example], job: Job) -> list[Request]:
    """The items of a job for the engine; `examples` are its own, or have other images."""
    offered = job.candidates or (lambda example: ())
    return [
        Request(id=one.id, prompt=one.prefix, images=one.images, candidates=tuple(offered(one))) for one in examples
    ]
