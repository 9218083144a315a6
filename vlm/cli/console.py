"""How a command ends: exit codes, one-line errors, logging on stderr.

    0    done, or the reader of the output has left (`| head`)
    1    `vlm check`: a check failed
    2    refused: one line `error: ...` on stderr (further lines only where several things are wrong), no traceback
    3    finished, but items were skipped; they are listed
    130  stopped by Ctrl-C      143  stopped by SIGTERM

Anything else is a bug of ours and keeps its traceback.
"""

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from vlm.errors import VLMError

OK, REFUSED, SKIPPED, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143
_SAID: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@contextmanager
def endings() -> Iterator[None]:
    """Around a command: its log goes to stderr, and an exception that is meant for the user becomes its exit code.

    Raises `SystemExit` with the code instead of these exceptions.
    """
    logger, handler, level = _log_to_stderr()
    if hasattr(sys.stdout, "reconfigure"):
        # A caption or file name that the terminal's encoding cannot show is no reason to lose the rest.
        sys.stdout.reconfigure(errors="backslashreplace")
    with _signals() as came:
        try:
            with _one_line(came):
                yield
        finally:
            _drop_unwritable()
            logger.removeHandler(handler)
            logger.setLevel(level)


@contextmanager
def _one_line(came: list[int]) -> Iterator[None]:
    """Turn what ends a command into its line and its exit code; `came` are the signals that were taken."""
    try:
        try:
            yield
        except SystemExit as end:
            if came:
                _tell(_SAID[came[0]])
            _flush(unless=end.code)
            raise
        _flush()
    except BrokenPipeError:
        raise SystemExit(OK) from None  # the reader (`| head`) has what it wanted
    except KeyboardInterrupt:
        _tell("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except VLMError as error:
        _tell(f"error: {error}")
        raise SystemExit(REFUSED) from error
    except OSError as error:  # a full disk, a folder that cannot be written, a hub that cannot be reached
        _tell(f"error: {' '.join(str(error).split())}")
        raise SystemExit(REFUSED) from error
    except Exception as error:
        if came:
            # Libraries turn the exception of a signal that falls into their import into another one.
            _tell(_SAID[came[0]])
            raise SystemExit(128 + came[0]) from error
        if not _no_memory(error):
            raise
        said = " ".join(str(error).split("\n")[0].split())
        _tell(f"error: out of memory{f' ({said})' if said else ''}; take smaller batches or images, or a smaller model")
        raise SystemExit(REFUSED) from error


def _no_memory(error: Exception) -> bool:
    """Python's own error, or torch's, which it raises as a RuntimeError."""
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Take Ctrl-C and SIGTERM as exceptions, so that files are closed and `finally` runs; afterwards the handlers are
    what they were. Gives the list of those that came."""
    came: list[int] = []

    def take(signum: int, _frame: FrameType | None) -> None:
        came.append(signum)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once
        raise SystemExit(TERMINATED)

    previous = {}
    for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        # A process in the background ignores Ctrl-C; a program that calls `main` may have handlers of its own. Only the
        # main thread may set any.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signum) == usual:
            previous[signum] = signal.signal(signum, take)
    try:
        yield came
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _flush(unless: object = None) -> None:
    """Small output meets a reader that has gone, or a full disk, only here. Not where the end has another reason."""
    if sys.stdout is not None and not unless:
        sys.stdout.flush()


def _tell(line: str) -> None:
    with suppress(OSError):  # stderr may be on a full disk; the exit code says it too
        print(line, file=sys.stderr)


def _drop_unwritable() -> None:
    """Lead output that nobody takes into nothing: Python would complain of it again, with status 120, at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _log_to_stderr() -> tuple[logging.Logger, logging.Handler, int]:
    """Show what the package logs; returns what is needed to undo it. Other packages keep their own ways."""
    logger = logging.getLogger("vlm")
    level = logger.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return logger, handler, level


def again(option: str, without: str = "") -> str:
    """This process's command as it could be typed again, with an option more."""
    program, *words = sys.argv
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"the same torchrun command, with {option}"
    start = [Path(sys.executable).name, "-m", "vlm"] if Path(program).name == "__main__.py" else [Path(program).name]
    return shlex.join([*start, *(word for word in words if word != without), *([] if option in words else [option])])


def quiet_transformers() -> None:
    """No progress bars for reading weights; imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class _OneLine(logging.Formatter):
    """The message alone; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
