"""Answers of the model on a fixed part of some data while it trains, scored as `vlm eval` scores them.

Training is not changed by it: random states, train and eval modes and gradients are afterwards what they were before.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from vlm import ranks
from vlm.errors import DataError, VLMError
from vlm.eval import results
from vlm.eval.job import FileReading, Job, Reading, file_job, task_job
from vlm.eval.run import requests
from vlm.eval.tasks.catalogue import select
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.models import ModelPredictor
from vlm.generation.schedule import Batching
from vlm.model.processor import Processor
from vlm.train.batches import Failure
from vlm.train.config import EvaluateConfig
from vlm.train.step import StageModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """One number."""

    task: str
    metric: str
    value: float
    num_items: int


def read_jobs(config: EvaluateConfig | None, *, skip_bad: bool = False, strip_control: bool = False) -> dict[str, Job]:
    """Name -> what is evaluated. Raises VLMError for anything that is wrong with it, before training begins.

    Args:
        skip_bad: of a JSONL file, leave out and list the broken annotations.
        strip_control: remove control spellings from the prompts.
    """
    if config is None:
        return {}
    if config.tasks is not None:
        reading = Reading(strip_control=strip_control)
        jobs = {one.label: task_job(one, config.data, reading) for one in select(config.tasks)}
    else:
        decoding = Decoding(max_new_tokens=config.max_new_tokens)
        how = FileReading(skip_bad=skip_bad, strip_control=strip_control, image_root=config.image_root)
        jobs = {config.data.stem: file_job(config.data, config.metrics, decoding, how)}
    return {name: _part(job, config.limit) for name, job in jobs.items()}


def _part(job: Job, limit: int | None) -> Job:
    """Drawn from all items, because files are often ordered; in their order, so that the plan stays the same."""
    if limit is None or limit >= len(job.examples):
        return job
    chosen = sorted(random.Random(0).sample(range(len(job.examples)), limit))
    return replace(job, examples=[job.examples[i] for i in chosen])


class Evaluator:
    """Scores the model on `jobs`; the ranks share the items.

    Args:
        size: items at a time.
    """

    def __init__(self, jobs: dict[str, Job], processor: Processor, size: int) -> None:
        self._jobs, self._processor, self._size = jobs, processor, size

    def __call__(self, module: StageModule) -> tuple[list[Evaluation], list[Failure]]:
        """Called on every rank; rank 0 gets the numbers, and the images that did not decode. Raises `VLMError` on every
        rank when one fails."""
        found: list[Evaluation] = []
        failures: list[Failure] = []
        with undisturbed(module.model):
            for name, job in self._jobs.items():
                records = self._records(module, name, job)
                if module.global_rank == 0:
                    found += _scored(name, job, records)
                    failures += _failures(job, records)
        return found, failures

    def _records(self, module: StageModule, name: str, job: Job) -> list[dict[str, Any]]:
        engine = Engine(
            predictor=ModelPredictor(module.model, self._processor, name="in training"),  # type: ignore[arg-type]
            decoding=job.decoding,
            batching=Batching(size=self._size, may_shrink=True),
            group=ranks.current(),
            progress=f"evaluate {name}",
        )
        own: list[dict[str, Any]] = []
        error: VLMError | None = None
        try:
            with module.trainer.precision_plugin.forward_context():
                own = [reply.record() for replies in engine.run(requests(job.examples, job)) for reply in replies]
        except VLMError as caught:
            error = caught
        shares = engine.group.gather((own, error is not None))
        if any(failed for _, failed in shares):
            raise error or DataError("evaluation failed in another process; its message says why")
        return [record for records, _ in shares for record in records]


def _scored(name: str, job: Job, records: Sequence[dict[str, Any]]) -> list[Evaluation]:
    failed = [record["error"]["message"] for record in records if "error" in record]
    if failed:
        log.warning(
            "%s: items that count as wrong, because an image could not be decoded: %d; the first: %s",
            *(name, len(failed), failed[0]),
        )
    said = {record["id"]: job.post(record["prediction"]) for record in records}
    wrong = results.unanswered(records)
    scored = results.score(job.metrics, job.examples, said, wrong, job.groups.get(job.average_over), job.average_over)
    return [Evaluation(name, result.name, result.value, result.num_items) for result in scored]


def _failures(job: Job, records: Sequence[dict[str, Any]]) -> list[Failure]:
    examples = {example.id: example for example in job.examples}
    failed = [(examples[record["id"]], record["error"]) for record in records if "error" in record]
    return [Failure(one, one.images[0], error["code"], error["message"]) for one, error in failed]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever happens to modes and random states inside, afterwards they are what they were."""
    modes = {module: module.training for module in model.modules()}
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training  # one by one: frozen parts are in eval mode among parts that train
            np.random.set_state(states[0])
            random.setstate(states[1])
