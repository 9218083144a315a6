"""Answers of the model on a fixed part of some data while it trains, scored as `vlm eval` scores them.

Training is not changed by it: random states, train and eval modes and gradients are afterwards what they were before.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from vlm import ranks
from vlm.errors import DataError, VLMError
from vlm.generation.engine import Engine
from vlm.generation.models import ModelPredictor
from vlm.generation.schedule import Batching
from vlm.model.modes import in_mode
from vlm.model.processor import Processor
from vlm.train.items import Failure, Score
from vlm.train.step import StageModule

log = logging.getLogger(__name__)


class Asking(NamedTuple):
    """How `vlm eval` asks and scores, handed over by whoever composes a run."""

    requests: Callable[..., Any]
    """`vlm.eval.job.requests`."""
    unanswered: Callable[..., Any]
    """`vlm.eval.results.unanswered`."""
    score: Callable[..., Any]
    """`vlm.eval.results.score`."""


def part_of(job: Any, limit: int | None) -> Any:
    """At most `limit` items, drawn because files are often ordered; in their order, so that the plan stays the same."""
    if limit is None or limit >= len(job.examples):
        return job
    chosen = sorted(random.Random(0).sample(range(len(job.examples)), limit))
    return replace(job, examples=[job.examples[i] for i in chosen])


class Evaluator:
    """Scores the model on `jobs`; the ranks share the items.

    Args:
        jobs: name -> `vlm.eval.job.Job`.
        size: items at a time.
    """

    def __init__(self, jobs: Mapping[str, Any], processor: Processor, size: int, asking: Asking) -> None:
        self._jobs, self._processor, self._size, self._asking = jobs, processor, size, asking

    def __call__(self, module: StageModule) -> tuple[list[Score], list[Failure]]:
        """Called on every rank; rank 0 gets the numbers, and the images that did not decode. Raises `VLMError` on every
        rank when one fails."""
        found: list[Score] = []
        failures: list[Failure] = []
        with undisturbed(module.model):
            for name, job in self._jobs.items():
                records = self._records(module, name, job)
                if module.global_rank == 0:
                    found += self._scored(name, job, records)
                    failures += _failures(job, records)
        return found, failures

    def _records(self, module: StageModule, name: str, job: Any) -> list[dict[str, Any]]:
        engine = Engine(
            predictor=ModelPredictor(module.model, self._processor, name="in training"),  # type: ignore[arg-type]
            decoding=job.decoding,
            batching=Batching(size=self._size, may_shrink=True),
            group=ranks.current(),
            progress=f"evaluate {name}",
            bar=False,  # the stage's own stands on the terminal
        )
        own: list[dict[str, Any]] = []
        error: VLMError | None = None
        try:
            with module.trainer.precision_plugin.forward_context():
                own = [
                    reply.record()
                    for replies in engine.run(self._asking.requests(job.examples, job))
                    for reply in replies
                ]
        except VLMError as caught:
            error = caught
        shares = engine.group.gather((own, error is not None))
        if any(failed for _, failed in shares):
            raise error or DataError("evaluation failed in another process; its message says why")
        return [record for records, _ in shares for record in records]

    def _scored(self, name: str, job: Any, records: Sequence[dict[str, Any]]) -> list[Score]:
        failed = [record["error"]["message"] for record in records if "error" in record]
        if failed:
            log.warning(
                "%s: items that count as wrong, because an image could not be decoded: %d; the first: %s",
                *(name, len(failed), failed[0]),
            )
        said = {record["id"]: job.post(record["prediction"]) for record in records}
        wrong = self._asking.unanswered(records)
        scored = self._asking.score(
            job.metrics, job.examples, said, wrong, job.groups.get(job.average_over), job.average_over
        )
        return [Score(name, result.name, result.value, result.num_items) for result in scored]


def _failures(job: Any, records: Sequence[dict[str, Any]]) -> list[Failure]:
    examples = {example.id: example for example in job.examples}
    failed = [(examples[record["id"]], record["error"]) for record in records if "error" in record]
    return [Failure(one, one.images[0], error["code"], error["message"]) for one, error in failed]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever happens to modes and random states inside, afterwards they are what they were."""
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(), in_mode(model):
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
