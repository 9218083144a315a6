"""One evaluation from its job to its files: predict, score, write."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm import ranks
from vlm.data.examples import Example
from vlm.errors import ConfigError, DataError, VLMError
from vlm.eval import items, results, results_page
from vlm.eval.items import ITEMS, REPORT, RESULTS
from vlm.eval.job import Job, Options, requests
from vlm.files import write_json, write_lines
from vlm.generation.engine import MAX_BAD_IN_A_ROW, Engine
from vlm.generation.predictions import PredictionStore, Record
from vlm.generation.predictor import Predictor
from vlm.ranks import Processes


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
            engine = Engine(
                predictor=predictor,
                decoding=job.decoding,
                batching=options.batching(),
                group=group,
                most_bad=MAX_BAD_IN_A_ROW,
                progress="predict" if options.progress else "",
            )
            for replies in engine.run(requests(shown, job), done=store.records):
                store.append(reply.record() for reply in replies)
            store.finish()
            facts: dict[str, Any] = {"batch_size": engine.size, "processes": group.world, "resumed_items": resumed}
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
    write_lines(folder / ITEMS, results.item_lines(job.examples, job.kinds, records, said, scored))
    if report:
        results_page.write(folder / REPORT, outcome, shown, records, scored, job.kinds, job.groups)
    write_json(folder / RESULTS, outcome)  # last: who finds it finds the others complete


def _refuse_if_all_bad(records: Sequence[Record]) -> None:
    if all("error" in record for record in records):
        first = records[0]["error"]
        raise DataError(f"none of the {len(records)} images could be decoded; the first: {first['message']}")
