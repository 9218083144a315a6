"""Evaluate a model: predict every item, score, write results and a page.

    outcome = evaluate("runs/x/model", "test.jsonl", "exact_match,cider", "runs/x/eval")
    print(table(outcome))

Into OUT go `predictions.jsonl` (as they are made; a killed run goes on where it stopped), `items.jsonl` (every item
with prediction, gold texts and scores), `results.json` and `report.html`.

Started by torchrun or `accelerate launch`, all processes share the work, and each returns the results.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import ranks
from vlm.checkpoints.opening import Opening
from vlm.data.examples import Example
from vlm.errors import ConfigError
from vlm.eval import overview
from vlm.eval.items import REPORT, RESULTS
from vlm.eval.job import FileReading, Options, Reading, file_job, fitting, task_job
from vlm.eval.run import run
from vlm.eval.tasks.catalogue import Selected, select
from vlm.files import write_json
from vlm.generation.decoding import Decoding
from vlm.generation.predictor import Predictor
from vlm.settings import by_field

if TYPE_CHECKING:
    from vlm.model.forward import VLM
    from vlm.model.processor import Processor

logger = logging.getLogger(__name__)


def evaluate(
    model: str | Path | tuple[VLM, Processor] | Predictor,
    data: str | Path | Sequence[Example],
    metrics: str | Sequence[str],
    out: str | Path,
    *,
    decoding: Decoding | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict, score and report. Started again with the same settings it goes on where it stopped.

    An image that cannot be decoded counts as answered with the empty text; it is listed in the results and never
    leaves the denominator. The command line exits with 3 when `skipped` in the results is above 0.

    Args:
        model: a directory or hub id, a (model, processor) pair, or any `Predictor`.
        data: a JSONL file, or examples.
        metrics: names, as a list or comma-separated.
        out: the folder for everything that is written.
        decoding: how answers are made; or its options by their names.
        options: by their names, those of

            `Options`: `batch_size` (16, or `auto`: the largest power of two that fits into the memory; results do not
            depend on it beyond floating-point rounding), `batch_tokens` (instead, as many items at a time as have at
            most so many image and prompt tokens, padding included), `shuffle_images` (the control that shows whether
            the model looks: each item gets another item's image) and its `seed`, `report` (write `report.html` too),
            `progress` (show it on stderr);
            `Decoding`: `max_new_tokens`, `num_beams`, `beam_search` and others of `vlm.generate`, but no sampling; `by`
            (`likelihood` chooses the likeliest of an item's candidates, `Example.info["choices"]`, instead of writing
            text) and its `normalization`, see `vlm.generation.likelihood`;
            `FileReading`: `limit` (only the first so many items), `skip_bad` (leave out annotations that are broken or
            too long for the model, list and count them, instead of refusing the file), `strip_control` (remove control
            spellings such as `<image>` from the prompts), `image_root` (folder of the images; the data file's own by
            default), `kind_of` (example -> kind for the breakdown; taken from the prompt by default);
            `Opening`: `device` and `dtype` of a model directory, and its `geometry`, how the model reads its images if
            not as it is: `{"image_size": 448}`, or what else `vlm.checkpoints.geometry.with_geometry` takes.

    Returns:
        What `results.json` holds: `metrics` (name -> value, interval_95, num_items, rule, version), `num_items`,
        `skipped`, `failures`, `by_kind`, and what is needed to repeat it (model, data, prompts, decoding, versions).

    Raises:
        ConfigError: unknown metric, a number out of range, or OUT holds predictions of other settings.
        DataError: broken annotations (without `skip_bad`), items without gold text, no image could be decoded.
    """
    work, how, reading, opening = by_field("evaluate", options, Options, Decoding, FileReading, Opening)
    settings = Options(**work)
    job = file_job(data, metrics, replace(decoding or Decoding(), **how), FileReading(**reading))
    predictor, name = as_predictor(model, Opening(**opening))
    return run(fitting(job, predictor), predictor, name, out, settings)


def evaluate_tasks(
    model: str | Path | tuple[VLM, Processor] | Predictor,
    tasks: str | Sequence[Selected],
    root: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    decoding: Mapping[str, Any] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Evaluate a model on tasks. Started again with the same settings it goes on where it stopped.

    Args:
        model: a directory or hub id, a (model, processor) pair, or any `Predictor`.
        tasks: names as in `vqav2,pope@adversarial,mine.yaml`, or what `vlm.eval.tasks.select` gives.
        root: the folder that holds the official files of the tasks.
        out: the results of a task go into OUT/TASK, as `evaluate` writes them; over all tasks OUT has `results.json`
            and `report.html`.
        decoding: settings of `Decoding` to use instead of what the tasks say; figures beside published ones then differ
            by more than the model, which the results record.
        options, others: as for `evaluate`; of the others `limit` (of each task), `strip_control`, `device`, `dtype` and
            `geometry`.

    Returns:
        `{"tasks": {name: results}, "skipped": number}`, where results are those of `evaluate`.

    Raises:
        ConfigError, DataError: as `evaluate`, and for a task that is not known, or whose files are not there.
    """
    read, opening = by_field("evaluate_tasks", others, Reading, Opening)
    reading = Reading(**read)
    chosen = select(tasks) if isinstance(tasks, str) else list(tasks)
    # Everything that can be refused is read before the first prediction.
    jobs = {one.label: task_job(one, Path(root), reading, decoding) for one in chosen}
    predictor, name = as_predictor(model, Opening(**opening))
    jobs = {label: fitting(job, predictor) for label, job in jobs.items()}
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


def as_predictor(model: str | Path | tuple[VLM, Processor] | Predictor, opening: Opening) -> tuple[Predictor, str]:
    """A predictor and its name, from a model directory or hub id, a (model, processor) pair, or a predictor.

    A pair stays where it is unless `device` is given; its dtype is its own.

    Raises:
        ConfigError: `dtype` with a pair, `device`, `dtype` or `geometry` with a predictor, or a geometry that the model
            cannot have.
        CheckpointError, GenerationError: as `vlm.load`.
    """
    from vlm.checkpoints.directory import in_geometry, open_model

    if isinstance(model, str | Path):
        return of_pair(open_model(model, opening), str(model)), str(model)
    if opening.dtype is not None:
        raise ConfigError(
            f"dtype={opening.dtype!r} can only be chosen when a model directory is opened; convert the model itself"
        )
    name = type(model).__name__
    if isinstance(model, tuple):
        network, processor = in_geometry(model, opening.geometry)
        if opening.device:
            network.to(opening.device)  # type: ignore[arg-type]  # transformers wraps `to` with a wrong signature
        name = type(network).__name__
        return of_pair((network, processor), name), name
    if opening.geometry:
        raise ConfigError(f"a {name} reads images in its own way; leave {', '.join(opening.geometry)} out")
    if opening.device is not None:
        raise ConfigError(f"device={opening.device!r} cannot be applied to a {name}; place it yourself")
    return model, name


def of_pair(pair: tuple[VLM, Processor], name: str) -> Predictor:
    """Our own model as a predictor that can say which model it is."""
    from vlm.checkpoints.identity import of_model
    from vlm.generation.models import ModelPredictor

    return ModelPredictor(*pair, name=name, identity=of_model)
