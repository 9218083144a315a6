"""What is watched while a stage trains: failing images, examples beyond the budget, memory, and when it is measured."""

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from vlm import ranks
from vlm.children import peak_memory_bytes
from vlm.errors import VLMError
from vlm.train.failures import EVALUATION, VALIDATION, Failures
from vlm.train.items import Failure, MicroBatch, Score, Validation
from vlm.train.plan import Stage
from vlm.train.record import Record
from vlm.train.step import StageModule

log = logging.getLogger(__name__)

Validator = Callable[[StageModule], Validation]
"""The held-out loss, on every rank (`vlm.train.validate.Validator`)."""
Evaluator = Callable[[StageModule], tuple[list[Score], list[Failure]]]
"""Answers and scores, on every rank (`vlm.train.evaluate.Evaluator`)."""


class Watch:
    """Watches one stage.

    Args:
        start: the optimizer step that it goes on from.
    """

    def __init__(
        self, stage: Stage, record: Record, start: int, validator: Validator | None, evaluator: Evaluator | None
    ) -> None:
        self._stage, self._record, self._start = stage, record, start
        self._validator, self._evaluator = validator, evaluator
        self._failures = Failures(stage.run.out, stage.run.bad_image_share)
        self._over_budget: set[str] = set()
        self._left_out = 0
        self.device: torch.device | None = None
        """Of the module, once it trains."""

    # --- each micro-batch ---------------------------------------------------------------------------------------------

    def inspect(self, item: MicroBatch) -> VLMError | None:
        """The error of a micro-batch. Images that failed are listed. Examples beyond the token budget are told of once,
        and counted at the end."""
        if item.over_budget and not self._over_budget and self._record.main:
            log.warning(
                "stage %s: example %s is longer than batch_tokens %d and makes a micro-batch of its own; there may be"
                " more, the end of the stage says how many",
                *(self._stage.config.name, item.over_budget[0], self._stage.config.batch_tokens),
            )
        self._over_budget |= set(item.over_budget)
        self._failures.add(item.failures)
        return item.error

    def judge(self, read: int, failed: int) -> VLMError | None:
        """See `Failures.judge`."""
        return self._failures.judge(read, failed)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def measure_if_due(self, module: StageModule, step: int) -> None:
        """Validate and evaluate after a step, where the run asks for it. Called on every rank."""
        self._measure(module, step, *self._due_at(step))

    def make_up(self, module: StageModule) -> None:
        """Measure what was due at the checkpoint that the run goes on from, and was not done when it was stopped."""
        validate, evaluate = ranks.current().gather(self._missing())[0]
        self._measure(module, self._start, validate, evaluate)

    def make_up_outside_training(self, trainer: pl.Trainer, module: StageModule) -> None:
        """For a run that was stopped after its last checkpoint, with nothing left to train. Called on every rank."""
        module.trainer = trainer
        module.to(trainer.strategy.root_device)
        try:
            self.make_up(module)
        finally:
            module.cpu()

    def _missing(self) -> tuple[bool, bool]:
        if not self._record.main or self._start == 0:
            return False, False
        due, lacking = self._due_at(self._start), self._record.lacks(self._start)
        return due[0] and lacking[0], due[1] and lacking[1]

    def _due_at(self, step: int) -> tuple[bool, bool]:
        """Whether to validate and to evaluate after a step."""
        run = self._stage.run

        def due(every: int | None) -> bool:
            return step == self._stage.steps or (every is not None and step % every == 0)

        return (
            self._validator is not None and due(run.validate_every),
            self._evaluator is not None and due(run.evaluate_every),
        )

    def _measure(self, module: StageModule, step: int, validate: bool, evaluate: bool) -> None:
        if validate:
            self._validate(module, step)
        if evaluate:
            assert self._evaluator is not None
            found, failures = self._evaluator(module)
            self._failures.add(failures, EVALUATION)
            self._record.scores(step, found)

    def _validate(self, module: StageModule, step: int) -> None:
        assert self._validator is not None
        found = self._validator(module)
        self._failures.add(found.failures, VALIDATION)
        if found.num_failed != self._left_out and self._record.main:
            self._left_out = found.num_failed
            log.warning(
                "stage %s: %d of %d validation examples are not in the held-out loss, because an image could not be"
                " decoded; failures.jsonl lists them",
                *(self._stage.config.name, found.num_failed, len(self._stage.val)),
            )
        if found.loss is not None:
            self._record.held_out_loss(step, found.loss)

    # --- the end ------------------------------------------------------------------------------------------------------

    def end(self) -> dict[str, Any]:
        """Bring together what all ranks have seen; called on every one. Returns what the manifest holds of it."""
        self._failures.collect()
        group = ranks.current()
        over_budget = set[str]().union(*group.gather(self._over_budget))
        peaks = group.gather(None if self.device is None else peak_memory_bytes(self.device))
        if self._record.main and over_budget:
            name = self._stage.config.name
            log.warning("stage %s: %d examples were longer than batch_tokens", name, len(over_budget))
        # Of the process that needed most.
        return {"peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=None)}

    def close(self) -> None:
        """Close the list of failures; may be called twice."""
        self._failures.close()
