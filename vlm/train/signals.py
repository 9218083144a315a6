"""SIGTERM and SIGINT: finish the step, save, leave with the exit code that says so; a second signal leaves at once."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from vlm.errors import VLMError

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Training ended by a signal, after a save; `code` is 128 + its number (143 SIGTERM, 130 SIGINT)."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class StopSignal:
    """Context manager that takes over SIGTERM and SIGINT in the main thread and restores the old handlers at the end.

    While `saving_possible` is False (before the first step, between stages) a signal raises `Stopped` right away; while
    it is True the signal is only noted in `signum`, and the training loop stops at the end of its step.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.saving_possible = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
            self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if self.signum and isinstance(error, Exception) and not isinstance(error, VLMError | OSError):
            # A library has turned our exception, which fell into its import, into one of its own.
            raise Stopped(self.signum) from error

    def install(self) -> None:
        """(Re)install the handlers; called again where a library has put its own in between."""
        if self._previous:
            for signum in SIGNALS:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum
        if not self.saving_possible:
            raise Stopped(signum)
        log.warning("%s: saving after this step; a second signal stops at once", signal.Signals(signum).name)

    def raise_if_stopped(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.signum:
            raise Stopped(self.signum)
