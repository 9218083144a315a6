"""What a run writes while it trains: metrics, checkpoints, failures, progress. Only rank 0 writes."""

import logging
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from vlm.errors import VLMError
from vlm.eval.cost import peak_memory_bytes
from vlm.train import checkpoint, metrics, optim, parts
from vlm.train.data import MicroBatch
from vlm.train.evaluate import Evaluator
from vlm.train.failures import Failures
from vlm.train.metrics import MetricsFile
from vlm.train.modules import StageModule, StepReport
from vlm.train.processes import barrier
from vlm.train.progress import Progress, Speed, TensorBoard
from vlm.train.validate import Validator

if TYPE_CHECKING:
    from vlm.train.stage import Stage

log = logging.getLogger(__name__)


class Recorder(pl.Callback):
    """Lightning callback of one stage.

    Args:
        main: whether this process is rank 0.
        finished: names of the stages that were complete before.
    """

    def __init__(self, main: bool, finished: list[str]) -> None:
        self.main, self.finished = main, finished
        self._metrics: MetricsFile | None = None
        self._evaluations: MetricsFile | None = None
        self._device: torch.device | None = None

    def begin(
        self,
        stage: "Stage",
        rows: list[parts.Row],
        frozen: dict[str, str],
        start: int,
        position: int,
        scaler: Any,
        validator: Validator | None,
        evaluator: Evaluator | None = None,
    ) -> None:
        """Called before the first step, at optimizer step `start` and its position in the line of examples."""
        self.stage, self.rows, self.frozen, self._scaler, self._validator = stage, rows, frozen, scaler, validator
        self._evaluator = evaluator
        self._last_step, self._saved = start, start
        self._begin = start, position
        name, out = stage.config.name, stage.run.out
        self._failures = Failures(out, stage.run.bad_image_share)
        self._over_budget: set[str] = set()
        if not self.main:
            return
        stage.folder.mkdir(parents=True, exist_ok=True)
        parts.write_manifest(stage.folder / "manifest.json", rows, stage=name, frozen_before=frozen)
        log.info("stage %s: %d steps of %d examples\n%s", name, stage.steps, stage.config.batch_size, parts.table(rows))
        self._metrics = MetricsFile(out / "metrics.csv", self.finished, name, start)
        if evaluator is not None:
            path = out / metrics.EVALUATIONS
            self._evaluations = MetricsFile(path, self.finished, name, start, metrics.EVALUATION_COLUMNS)
        self._board = TensorBoard(out / "tensorboard" / name)
        self._progress = Progress(name, start, stage.steps, stage.run.log_every)

    def end(self, frozen: dict[str, str]) -> None:
        """Called after the last step, when the frozen parts were compared."""
        if self.main and self._over_budget:
            count, name = len(self._over_budget), self.stage.config.name
            log.warning("stage %s: %d examples were longer than batch_tokens in this process", name, count)
        if self.main:
            path = self.stage.folder / "manifest.json"
            extra = {
                "stage": self.stage.config.name,
                "frozen_before": self.frozen,
                "frozen_after": frozen,
                "peak_memory_bytes": None if self._device is None else peak_memory_bytes(self._device),
            }
            parts.write_manifest(path, self.rows, **extra)
        self.close()

    def close(self) -> None:
        """Stop the bar and close the files; may be called twice."""
        if self._metrics is not None:
            self._progress.close()
            self._board.close()
            self._metrics.close()
            self._metrics = None
            if self._evaluations is not None:
                self._evaluations.close()
                self._evaluations = None

    # --- Lightning's hooks ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = pl_module.device
        self._speed = Speed()  # not counting the time in which a tower's features were made
        if self._scaler is not None:
            trainer.precision_plugin.load_state_dict(self._scaler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        report = pl_module.report
        if report is None or report.step == self._last_step:
            return  # a micro-batch that did not end a step
        self._last_step = report.step
        val_loss = self._validate_if_due(pl_module, report.step)
        self._evaluate_if_due(pl_module, report.step)
        if self.main:
            self._write(report, val_loss)
            self._save_if_due(trainer, pl_module, report.step)
        if pl_module.stopped:
            trainer.should_stop = True
            # A process that leaves early is taken for a crash by the launcher, which then kills the one that saves.
            barrier()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    # --- what they do -----------------------------------------------------------------------------------------------

    def inspect(self, item: MicroBatch) -> VLMError | None:
        """The error of a micro-batch: its own, or that too many images have failed by now. Examples beyond the token
        budget are told of once, and counted at the end."""
        if item.over_budget and not self._over_budget and self.main:
            log.warning(
                "stage %s: example %s is longer than batch_tokens %d and makes a micro-batch of its own; there may be"
                " more, the end of the stage says how many",
                *(self.stage.config.name, item.over_budget[0], self.stage.config.batch_tokens),
            )
        self._over_budget |= set(item.over_budget)
        too_many = self._failures.add(item)
        return item.error or too_many

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.stage.steps or (every is not None and step % every == 0)

    def _evaluate_if_due(self, module: StageModule, step: int) -> None:
        if self._evaluator is None or not self._due(step, self.stage.run.evaluate_every):
            return
        name = self.stage.config.name
        for found in self._evaluator(module):
            assert self._evaluations is not None
            self._evaluations.write(stage=name, step=step, **vars(found))
            self._board.write(step, **{f"{found.task}/{found.metric}": found.value})
            log.info("%s %d/%d  %s: %s %.4f", name, step, self.stage.steps, found.task, found.metric, found.value)

    def _validate_if_due(self, module: StageModule, step: int) -> float | None:
        if self._validator is None or not self._due(step, self.stage.run.validate_every):
            return None
        loss = self._validator(module)
        if self.main:
            log.info("%s %d/%d  held-out loss %.4f", self.stage.config.name, step, self.stage.steps, loss)
        return loss

    def _write(self, report: StepReport, val_loss: float | None) -> None:
        assert self._metrics is not None
        rate = self._speed.add(report.examples)
        rates = {f"lr_{part}": lr for part, lr in report.rates.items()}
        row = {"loss": report.loss, **rates, "grad_norm": report.grad_norm, "examples_per_s": float(f"{rate:.4g}")}
        if val_loss is not None:
            row["val_loss"] = val_loss
        self._metrics.write(
            stage=self.stage.config.name, step=report.step, tokens=report.tokens, seen=report.seen, **row
        )
        self._board.write(report.step, **row)
        self._progress.update(report, rate)

    def _save_if_due(self, trainer: pl.Trainer, module: StageModule, step: int) -> None:
        due = step % self.stage.run.checkpoint_every == 0 or step == self.stage.steps or module.stopped
        if not due or step == self._saved:
            return
        state = {
            "stage": self.stage.config.name,
            "steps": self.stage.steps,
            "position": self._begin[1] + (step - self._begin[0]) * self.stage.config.batch_size,
            "start": self.stage.start,
            "data": self.stage.data_digest,
            "frozen": self.frozen,
            "scaler": trainer.precision_plugin.state_dict() or None,
        }
        optimizer = optim.state_tensors(trainer.optimizers[0])
        tensors = parts.trained_tensors(module.model, module.stage)
        folder = self.stage.folder / "checkpoints"
        checkpoint.save(folder, step, tensors, optimizer, state, self.stage.run.keep_checkpoints)
        self._saved = step
