"""Several tasks with one model: a folder of results for each, and a page and a file over all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import ranks
from vlm.data.control import without_control
from vlm.data.examples import Example
from vlm.eval import items, overview, results
from vlm.eval.harness import check_limit
from vlm.eval.job import REPORT, RESULTS, Job, Options, fitting, room_of, run
from vlm.eval.metrics import registry
from vlm.eval.tasks import Selected, select
from vlm.files import write_json
from vlm.generation.predictor import Decoding, Predictor, as_predictor
from vlm.text import control

if TYPE_CHECKING:
    from vlm.model.forward import VLM
    from vlm.model.processor import Processor

logger = logging.getLogger(__name__)


def evaluate_tasks(
    model: str | Path | tuple[VLM, Processor] | Predictor,
    tasks: str | Sequence[Selected],
    root: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    limit: int | None = None,
    decoding: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    geometry: Mapping[str, Any] | None = None,
    strip_control: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on tasks. Started again with the same settings it goes on where it stopped.

    Args:
        model: a directory or hub id, a (model, processor) pair, or any `Predictor`.
        tasks: names as in `vqav2,pope@adversarial,mine.yaml`, or what `vlm.eval.tasks.select` gives.
        root: the folder that holds the official files of the tasks.
        out: the results of a task go into OUT/TASK, as `evaluate` writes them; over all tasks OUT has `results.json`
            and `report.html`.
        limit: only the first so many items of each task.
        decoding: settings of `Decoding` to use instead of what the tasks say; figures beside published ones then differ
            by more than the model, which the results record.
        options, device, dtype, geometry, strip_control: as for `evaluate`.

    Returns:
        `{"tasks": {name: results}, "skipped": number}`, where results are those of `evaluate`.

    Raises:
        ConfigError, DataError: as `evaluate`, and for a task that is not known, or whose files are not there.
    """
    check_limit(limit)
    chosen = select(tasks) if isinstance(tasks, str) else list(tasks)
    # Everything that can be refused is read before the first prediction.
    jobs = {one.label: make_job(one, Path(root), limit, decoding or {}, strip_control=strip_control) for one in chosen}
    predictor, name = as_predictor(model, device=device, dtype=dtype, geometry=geometry)
    jobs = {label: fitting(job, room_of(predictor)) for label, job in jobs.items()}
    identity = predictor.identity()
    folder, settings = Path(out), options or Options()
    with ranks.joined() as group:
        found = {}
        for label, job in jobs.items():
            if group.main:
                logger.info("%s: %d items", label, len(job.examples))
            found[label] = run(job, predictor, name, folder / label, settings, identity=identity)
        outcome = {"tasks": found, "skipped": sum(one["skipped"] for one in found.values())}
        if group.main:
            if settings.report:
                overview.write(folder / REPORT, outcome, name)
            write_json(folder / RESULTS, outcome)
        group.barrier()
    return outcome


def make_job(
    selected: Selected, root: Path, limit: int | None, decoding: Mapping[str, Any], *, strip_control: bool = False
) -> Job:
    """The job that a task describes. Raises ConfigError and DataError as `Task.load`."""
    task, label = selected.task, selected.label
    examples = without_control(task.load(root, selected.split, limit), control.SETTING, strip=strip_control)
    items.check(examples)
    groups = {key: task.groups(examples, key) for key in dict.fromkeys([*task.breakdown, *_average(task)])}
    metrics = registry.expand(task.metrics)
    results.check(metrics, examples, groups.get(task.average_over), task.average_over)
    how = replace(_decoding(task), **decoding)
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
        limit=limit,
        task=_facts(selected, how),
    )


def _decoding(task: Any) -> Decoding:
    """A task's way of decoding in the words of the harness. The rule of beams says nothing about greedy decoding."""
    return Decoding(**asdict(task.decoding))


def _average(task: Any) -> list[str]:
    return [task.average_over] if task.average_over else []


def _prompt_kinds(examples: Sequence[Example]) -> dict[str, str]:
    return {example.id: items.prompt_kind(example.prefix) for example in examples}


def _facts(selected: Selected, how: Decoding) -> dict[str, Any]:
    """What the results say about the task: enough to judge whether a published figure may be set beside ours."""
    task, split = selected.task, selected.split or selected.task.default_split
    return {
        "name": task.name,
        "title": task.title,
        "split": split,
        "expected_items": task.split(split).expected_items,
        "citation": task.citation,
        "note": task.note,
        "post": task.post,
        "average_over": task.average_over,
        "decoding_is_the_tasks": how == _decoding(task),
        "published": [asdict(entry) for entry in task.published if entry.split == split],
        "published_for_other_splits": [asdict(entry) for entry in task.published if entry.split != split],
    }
