"""Progress on stderr: a bar in a terminal, a line in the log every tenth elsewhere."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class Progress:
    """A context manager that counts items.

    Args:
        total: number of items.
        done: how many were there already.
        label: what is being done.
        visible: False shows and logs nothing.
        bar: False gives lines in the log on a terminal too, where another bar stands already.
    """

    def __init__(self, total: int, *, done: int = 0, label: str, visible: bool = True, bar: bool = True) -> None:
        self.total, self.done, self.label = total, done, label
        drawn = bar and sys.stderr.isatty()
        self._log = visible and not drawn
        self._bar: Any = self._make_bar() if visible and drawn else None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done)
        elif self._log:
            logger.info("%s: %d of %d items are there", self.label, self.done, self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """`count` more items are done."""
        before, self.done = self.done, self.done + count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self._log and 10 * before // self.total != 10 * self.done // self.total:
            logger.info("%s: %d of %d items", self.label, self.done, self.total)

    @staticmethod
    def _make_bar() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return RichProgress(*columns, console=Console(stderr=True))
