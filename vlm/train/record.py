"""What a stage writes down while it trains: metrics, scores, log lines, a bar, TensorBoard. Only rank 0 writes."""

import logging
from collections.abc import Sequence
from typing import Any

from vlm.train import freezing, step_log
from vlm.train.items import Score, StepReport
from vlm.train.plan import Stage
from vlm.train.progress import Progress, Speed, TensorBoard
from vlm.train.step_log import MetricsFile

log = logging.getLogger(__name__)


class Record:
    """The record of one stage, opened by `begin`.

    Args:
        main: whether this process is rank 0; on others every method does nothing.
        finished: names of the stages that were complete before.
    """

    def __init__(self, stage: Stage, main: bool, finished: Sequence[str]) -> None:
        self._stage, self.main, self._finished = stage, main, finished
        self._metrics: MetricsFile | None = None
        self._evaluations: MetricsFile | None = None

    def begin(self, start: int, rows: list[freezing.Row], frozen: dict[str, str]) -> None:
        """Write the manifest and open the files; rows after optimizer step `start` are cut, they will be written again.

        Args:
            frozen: digests of the frozen parts.
        """
        self._parameters, self._frozen = rows, frozen
        if not self.main:
            return
        stage, name, out = self._stage, self._stage.config.name, self._stage.run.out
        stage.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest()
        log.info(
            "stage %s: %d steps of %d examples\n%s", name, stage.steps, stage.config.batch_size, freezing.table(rows)
        )
        self._metrics = MetricsFile(out / "metrics.csv", self._finished, name, start)
        if self._stage.run.evaluate is not None:
            path = out / step_log.EVALUATIONS
            self._evaluations = MetricsFile(path, self._finished, name, start, step_log.EVALUATION_COLUMNS)
        self._board = TensorBoard(out / "tensorboard" / name)
        self._progress = Progress(name, start, self._stage.steps, self._stage.run.log_every)

    def start_clock(self) -> None:
        """Begin to count examples per second: now, so without the time in which a tower's features were made."""
        self._speed = Speed()

    def step(self, report: StepReport) -> None:
        """A row per optimizer step."""
        if self._metrics is None:
            return
        rate = self._speed.add(report.examples)
        rates = {f"lr_{part}": lr for part, lr in report.rates.items()}
        row = {"loss": report.loss, **rates, "grad_norm": report.grad_norm, "examples_per_s": float(f"{rate:.4g}")}
        counts = {"tokens": report.tokens, "seen": report.seen}
        self._metrics.write({"stage": self._stage.config.name, "step": report.step, **counts, **row})
        self._board.write(report.step, **row)
        self._progress.update(report, rate)

    def held_out_loss(self, step: int, loss: float) -> None:
        """Beside the row of the step."""
        if self._metrics is None:
            return
        self._metrics.amend(val_loss=loss)
        self._board.write(step, val_loss=loss)
        log.info("%s %d/%d  held-out loss %.4f", self._stage.config.name, step, self._stage.steps, loss)

    def scores(self, step: int, found: Sequence[Score]) -> None:
        """A row per number of an evaluation."""
        if self._evaluations is None:
            return
        name = self._stage.config.name
        self._evaluations.write(*({"stage": name, "step": step, **vars(one)} for one in found))
        for one in found:
            self._board.write(step, **{f"{one.task}/{one.metric}": one.value})
            log.info("%s %d/%d  %s: %s %.4f", name, step, self._stage.steps, one.task, one.metric, one.value)

    def lacks(self, step: int) -> tuple[bool, bool]:
        """Whether the held-out loss of a step that is recorded, and its scores, are not written down."""
        rows = self._rows("metrics.csv", step)
        return bool(rows) and not rows[-1]["val_loss"], not self._rows(step_log.EVALUATIONS, step)

    def _rows(self, file: str, step: int) -> list[dict[str, str]]:
        name = self._stage.config.name
        found = step_log.read(self._stage.run.out / file)
        return [row for row in found if row["stage"] == name and int(row["step"]) == step]

    def end(self, **extra: Any) -> None:
        """The manifest again, with what is known after the last step."""
        if self.main:
            self._write_manifest(**extra)
        self.close()

    def _write_manifest(self, **extra: Any) -> None:
        what = {"stage": self._stage.config.name, "frozen_before": self._frozen, **extra}
        freezing.write_manifest(self._stage.folder / "manifest.json", self._parameters, **what)

    def close(self) -> None:
        """Stop the bar and close the files; may be called twice."""
        if self._metrics is None:
            return
        self._progress.close()
        self._board.close()
        self._metrics.close()
        self._metrics = None
        if self._evaluations is not None:
            self._evaluations.close()
            self._evaluations = None
