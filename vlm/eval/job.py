"""One evaluation from its items to its files, whether a task or a file with options has said what it is."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import ranks
from vlm.data.examples import Example
from vlm.data.problems import Problem
from vlm.errors import ConfigError, DataError, VLMError
from vlm.eval import items, results, results_page
from vlm.eval.metrics import Metric
from vlm.files import write_json, write_lines
from vlm.generation import answers, batch_size
from vlm.generation.batch_size import BatchSize
from vlm.generation.journal import PredictionStore, Record
from vlm.generation.predict import predict
from vlm.generation.predictor import Decoding, ModelPredictor, Predictor
from vlm.ranks import Processes

if TYPE_CHECKING:
    from vlm.model.lengths import Room

RESULTS = "results.json"
ITEMS = "items.jsonl"
REPORT = "report.html"


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


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the work is done; nothing here changes a result beyond floating-point rounding, but for the control."""

    batch_size: BatchSize = 16
    batch_tokens: int | None = None
    """Instead of `batch_size`: the most image and prompt tokens of a batch, its padding included."""
    shuffle_images: bool = False
    seed: int = 0
    report: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        batch_size.check(self.batch_size)


def run(
    job: Job,
    predictor: Predictor,
    name: str,
    out: str | Path,
    options: Options,
    *,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Predict, score, write; every process of the launch calls this, and all return what `results.json` holds.

    Args:
        name: what the results call the model.
        identity: of the predictor, where it is known already (hashing the weights of a large model takes a while).

    Raises:
        ConfigError, DataError: see `vlm.eval.evaluate`.
    """
    folder = Path(out)
    shown = items.shuffle_images(job.examples, options.seed) if options.shuffle_images else job.examples
    settings = _settings(job, identity or predictor.identity(), options, shown)
    started = time.monotonic()
    with ranks.joined() as group:
        _check_agreement(group, settings)
        with PredictionStore(folder, settings, group) as store:
            resumed = len(store.records)
            who = answers.answerer(predictor, job.decoding, job.candidates)
            used = predict(
                *(who, shown, store, options.batch_size),
                batch_tokens=options.batch_tokens,
                group=group,
                progress=options.progress,
            )
            store.finish()
            facts: dict[str, Any] = {"batch_size": used, "processes": group.world, "resumed_items": resumed}
            failure = None
            if group.main:
                try:
                    records = [store.records[example.id] for example in job.examples]
                    facts["seconds"] = round(time.monotonic() - started, 2)
                    _write(folder, job, name, settings, facts, shown, records, options.report)
                except VLMError as error:
                    failure = error
            # All or none: a process that left early would look like a crash to the launcher.
            failed = any(group.gather(failure is not None))
        if failed:
            raise failure or DataError("the first process could not score; its message says why")
        outcome: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return outcome


def room_of(predictor: Predictor) -> Room | None:
    """What an item may take with a `vlm` model; None for a predictor of one's own, which says nothing about it."""
    if not isinstance(predictor, ModelPredictor):
        return None
    from vlm.model.lengths import Room, context_of

    return Room(processor=predictor.processor, context=context_of(predictor.model.config))


def fitting(job: Job, room: Room | None) -> Job:
    """The job without items that are too long for the model, if it may leave some out.

    Raises:
        DataError: items are too long, each named with file and line, and may not be left out, or none is left.
    """
    if room is None:
        return job
    from vlm.model.lengths import refuse, too_long

    found = too_long(job.examples, room, job.candidates or (lambda example: ()))
    if not job.skip_bad or len(found) == len(job.examples):
        refuse(list(found.values()))
    kept = [example for index, example in enumerate(job.examples) if index not in found]
    return replace(job, examples=kept, problems=[*job.problems, *found.values()]) if found else job


def _settings(job: Job, identity: Mapping[str, Any], options: Options, shown: Sequence[Example]) -> dict[str, Any]:
    """Everything that decides the predictions."""
    settings: dict[str, Any] = {
        "model": dict(identity),
        "data_sha256": items.digest(job.examples),
        "decoding": job.decoding.to_dict(),
        "images_shuffled_with_seed": options.seed if options.shuffle_images else None,
    }
    if options.shuffle_images:
        settings["shuffled_sha256"] = items.digest(shown)  # which image went to which item
    if job.candidates is not None:
        listed = [list(job.candidates(example)) for example in job.examples]
        settings["candidates_sha256"] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return settings


def _check_agreement(group: Processes, settings: dict[str, Any]) -> None:
    differing = [rank for rank, other in enumerate(group.gather(settings)) if other != settings]
    if differing:
        raise ConfigError(
            f"process {group.rank} and process {differing[0]} were asked for different evaluations, or opened different"
            " models; all must be started with the same command and see the same files"
        )


def _write(
    folder: Path,
    job: Job,
    name: str,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    shown: Sequence[Example],
    records: Sequence[Record],
    report: bool,
) -> None:
    """Score, and write items, results and page."""
    _refuse_if_all_bad(records)
    said = {record["id"]: job.post(record["prediction"]) for record in records}
    wrong = results.unanswered(records)
    groups = job.groups.get(job.average_over)
    scored = results.score(job.metrics, job.examples, said, wrong, groups, job.average_over)
    scored = results.with_constants(scored, job.examples, groups, job.average_over)
    outcome = {
        **results.figures(scored, job.kinds, records, job.problems),
        "breakdown": results.breakdown(scored, job.groups, job.examples, said, wrong),
        "task": job.task,
        "model": {"name": name, **settings["model"]},
        "data": {"source": job.source, "sha256": settings["data_sha256"], "limit": job.limit},
        "prompts": {
            "format": "[image tokens][BOS]prefix\\n",
            "examples": results.one_prompt_per_kind(job.examples, job.kinds),
        },
        "decoding": settings["decoding"],
        "images_shuffled_with_seed": settings["images_shuffled_with_seed"],
        "run": facts,
        "versions": results.versions(),
    }
    write_lines(folder / ITEMS, results.item_lines(job, records, said, scored))
    if report:
        results_page.write(folder / REPORT, outcome, shown, records, scored, job.kinds, job.groups)
    write_json(folder / RESULTS, outcome)  # last: who finds it finds the others complete


def _refuse_if_all_bad(records: Sequence[Record]) -> None:
    if all("error" in record for record in records):
        first = records[0]["error"]
        raise DataError(f"none of the {len(records)} images could be decoded; the first: {first['message']}")
