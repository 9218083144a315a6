"""What a run tells while it trains: a bar on a terminal, else a log line every n steps; TensorBoard if installed."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from vlm.train.items import StepReport

log = logging.getLogger(__name__)


class Progress:
    """Progress of one stage, on stderr. `update` is called once per optimizer step."""

    def __init__(self, stage: str, done: int, steps: int, log_every: int) -> None:
        self.stage, self.steps, self.log_every = stage, steps, log_every
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            self._start_bar(done)

    def update(self, report: StepReport, rate: float) -> None:
        """`rate` in examples per second."""
        rates = " ".join(f"{part} {lr:.1e}" for part, lr in report.rates.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, loss=report.loss, rate=rate)
        elif report.step % self.log_every == 0 or report.step == self.steps:
            log.info(
                "%s %d/%d  loss %.4f  grad norm %.3f  lr %s  %.0f examples/s",
                *(self.stage, report.step, self.steps, report.loss, report.grad_norm, rates, rate),
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _start_bar(self, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} examples/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(self.stage, total=self.steps, completed=done, loss=float("nan"), rate=0.0)
        self._bar.start()


class Speed:
    """Examples per second over about the last ten seconds, so a number that can be read and compared."""

    def __init__(self) -> None:
        self._marks = [(time.monotonic(), 0)]

    def add(self, examples: int) -> float:
        now, total = time.monotonic(), self._marks[-1][1] + examples
        self._marks.append((now, total))
        while len(self._marks) > 2 and now - self._marks[1][0] > 10:
            self._marks.pop(0)
        start, before = self._marks[0]
        return (total - before) / max(now - start, 1e-9)


class TensorBoard:
    """Writes scalars to a TensorBoard folder, or does nothing when tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, **values: float) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
