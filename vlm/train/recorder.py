"""What a run writes while it trains: metrics, checkpoints, failures, progress. Only rank 0 writes."""

import logging
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from vlm import ranks
from vlm.children import peak_memory_bytes
from vlm.errors import VLMError
from vlm.train import checkpoint, metrics, optim, parts
from vlm.train.batches import MicroBatch
from vlm.train.evaluate import Evaluator
from vlm.train.failures import EVALUATION, VALIDATION, Failures
from vlm.train.metrics import MetricsFile
from vlm.train.progress import Progress, Speed, TensorBoard
from vlm.train.step import StageModule, StepReport
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
        self._left_out = 0
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
        self._failures.collect()
        over_budget = set[str]().union(*ranks.current().gather(self._over_budget))
        peaks = [peak for peak in ranks.current().gather(self._peak_memory()) if peak is not None]
        if self.main and over_budget:
            name = self.stage.config.name
            log.warning("stage %s: %d examples were longer than batch_tokens", name, len(over_budget))
        if self.main:
            path = self.stage.folder / "manifest.json"
            extra = {
                "stage": self.stage.config.name,
                "frozen_before": self.frozen,
                "frozen_after": frozen,
                "peak_memory_bytes": max(peaks, default=None),  # of the process that needed most
            }
            parts.write_manifest(path, self.rows, **extra)
        self.close()

    def _peak_memory(self) -> int | None:
        return None if self._device is None else peak_memory_bytes(self._device)

    def close(self) -> None:
        """Stop the bar and close the files; may be called twice."""
        if hasattr(self, "_failures"):
            self._failures.close()
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
        assert isinstance(pl_module, StageModule)
        self._make_up(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule)
        report = pl_module.report
        if report is None or report.step == self._last_step:
            return  # a micro-batch that did not end a step
        self._last_step = report.step
        if self.main:
            self._write(report)
            self._save_if_due(trainer, pl_module, report.step)
        # After the checkpoint: whatever happens here costs no step. A run that is stopped makes up for it later.
        if not pl_module.stopped:
            self._measure(pl_module, report.step, *self._due_at(report.step))
        if pl_module.stopped:
            trainer.should_stop = True
            # A process that leaves early is taken for a crash by the launcher, which then kills the one that saves.
            ranks.current().barrier()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    # --- what they do -----------------------------------------------------------------------------------------------

    def inspect(self, item: MicroBatch) -> VLMError | None:
        """The error of a micro-batch. Images that failed are listed. Examples beyond the token budget are told of once,
        and counted at the end."""
        if item.over_budget and not self._over_budget and self.main:
            log.warning(
                "stage %s: example %s is longer than batch_tokens %d and makes a micro-batch of its own; there may be"
                " more, the end of the stage says how many",
                *(self.stage.config.name, item.over_budget[0], self.stage.config.batch_tokens),
            )
        self._over_budget |= set(item.over_budget)
        self._failures.add(item.failures)
        return item.error

    def judge(self, read: int, failed: int) -> VLMError | None:
        """See `Failures.judge`."""
        return self._failures.judge(read, failed)

    def make_up_outside_training(self, trainer: pl.Trainer, module: StageModule) -> None:
        """For a run that was stopped after its last checkpoint, with nothing left to train. Called on every rank."""
        module.trainer = trainer
        module.to(trainer.strategy.root_device)
        try:
            self._make_up(module)
        finally:
            module.cpu()

    def _make_up(self, module: StageModule) -> None:
        """Measure what was due at the checkpoint that the run goes on from, and was not done when it was stopped."""
        validate, evaluate = ranks.current().gather(self._missing())[0]
        self._measure(module, self._begin[0], validate, evaluate)

    def _missing(self) -> tuple[bool, bool]:
        step, name = self._begin[0], self.stage.config.name
        if not self.main or step == 0:
            return False, False

        def rows(file: str) -> list[dict[str, str]]:
            found = metrics.read(self.stage.run.out / file)
            return [row for row in found if row["stage"] == name and int(row["step"]) == step]

        validate, evaluate = self._due_at(step)
        recorded = rows("metrics.csv")
        return validate and bool(recorded) and not recorded[-1]["val_loss"], evaluate and not rows(metrics.EVALUATIONS)

    def _due_at(self, step: int) -> tuple[bool, bool]:
        """Whether to validate and to evaluate after a step."""
        run = self.stage.run
        return (
            self._validator is not None and self._due(step, run.validate_every),
            self._evaluator is not None and self._due(step, run.evaluate_every),
        )

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.stage.steps or (every is not None and step % every == 0)

    def _measure(self, module: StageModule, step: int, validate: bool, evaluate: bool) -> None:
        if validate:
            self._validate(module, step)
        if evaluate:
            self._evaluate(module, step)

    def _evaluate(self, module: StageModule, step: int) -> None:
        assert self._evaluator is not None
        name = self.stage.config.name
        found, failures = self._evaluator(module)
        self._failures.add(failures, EVALUATION)
        if not self.main:
            return
        assert self._evaluations is not None
        self._evaluations.write(*({"stage": name, "step": step, **vars(one)} for one in found))
        for one in found:
            self._board.write(step, **{f"{one.task}/{one.metric}": one.value})
            log.info("%s %d/%d  %s: %s %.4f", name, step, self.stage.steps, one.task, one.metric, one.value)

    def _validate(self, module: StageModule, step: int) -> None:
        assert self._validator is not None
        found, name = self._validator(module), self.stage.config.name
        self._failures.add(found.failures, VALIDATION)
        if not self.main:
            return
        if found.num_failed != self._left_out:
            self._left_out = found.num_failed
            log.warning(
                "stage %s: %d of %d validation examples are not in the held-out loss, because an image could not be"
                " decoded; failures.jsonl lists them",
                *(name, found.num_failed, len(self.stage.val)),
            )
        if found.loss is None:
            return
        assert self._metrics is not None
        self._metrics.amend(val_loss=found.loss)
        self._board.write(step, val_loss=found.loss)
        log.info("%s %d/%d  held-out loss %.4f", name, step, self.stage.steps, found.loss)

    def _write(self, report: StepReport) -> None:
        assert self._metrics is not None
        rate = self._speed.add(report.examples)
        rates = {f"lr_{part}": lr for part, lr in report.rates.items()}
        row = {"loss": report.loss, **rates, "grad_norm": report.grad_norm, "examples_per_s": float(f"{rate:.4g}")}
        counts = {"tokens": report.tokens, "seen": report.seen}
        self._metrics.write({"stage": self.stage.config.name, "step": report.step, **counts, **row})
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
            "threads": torch.get_num_threads(),
            "scaler": trainer.precision_plugin.state_dict() or None,
        }
        optimizer = optim.state_tensors(trainer.optimizers[0])
        tensors = parts.trained_tensors(module.model, module.stage)
        folder = self.stage.folder / "checkpoints"
        checkpoint.save(folder, step, tensors, optimizer, state, self.stage.run.keep_checkpoints)
        self._saved = step
