"""Processes that this one starts: none lives on without it, and none holds it up at its end. And how this one ends.

`context` is what `multiprocessing` starts them with, and torch's data loader. `run_all` runs functions in processes.
Whatever ends the parent (an exception, a signal, SIGKILL) ends the children; however a child ends, the parent goes on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, popen_fork, process
from multiprocessing.context import BaseContext, SpawnContext, SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from vlm.errors import TrainingError, VLMError

POLL_S = 0.5
"""How soon a child notices that its parent has gone, where the system does not tell."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Job = tuple[Callable[..., None], tuple[Any, ...]]
"""A function that another process can import, and its arguments."""


class _Child(process.BaseProcess):
    """Leaves Ctrl-C and SIGTERM, which often reach a whole group of processes, to the parent: it decides, and kills."""

    def start(self) -> None:
        # A signal in between would run the parent's handlers in the child.
        with _held_back():
            super().start()

    def run(self) -> None:
        leave_signals_to_parent()
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        die_with(parent.pid)
        super().run()

    def terminate(self) -> None:
        self.kill()


def leave_signals_to_parent() -> None:
    """Ignore Ctrl-C and SIGTERM; again, where a library has put its own handlers in."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class _Spawned(_Child, SpawnProcess):
    pass


class _SpawnContext(SpawnContext):
    Process = _Spawned


if sys.platform != "win32":
    from multiprocessing.context import ForkContext, ForkProcess

    class _KilledPopen(popen_fork.Popen):
        def terminate(self) -> None:
            # What multiprocessing calls at the parent's exit, before it waits: the child ignores SIGTERM.
            self.kill()

    class _Forked(_Child, ForkProcess):
        @staticmethod
        def _Popen(process_obj: Any) -> Any:
            return _KilledPopen(process_obj)

    class _ForkContext(ForkContext):
        Process = _Forked


def context(*, fork: bool) -> BaseContext:
    """For `multiprocessing`: processes that ignore Ctrl-C and SIGTERM, die with this one, and end when told to.

    Args:
        fork: copies of this process where the system has them; else new interpreters.
    """
    return _ForkContext() if fork and sys.platform != "win32" else _SpawnContext()


@contextmanager
def _held_back() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block is over."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with(parent: int) -> None:
    """Have this process killed when the process `parent`, which started it, ends in whatever way."""
    if sys.platform == "win32":
        return  # a child there cannot see it; the pipes of multiprocessing end it
    if Path("/proc/self").exists():
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    else:
        when_gone(parent, lambda: os._exit(1))
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def when_gone(parent: int, act: Callable[[], None]) -> None:
    """Call `act`, in a thread, once the process `parent`, which started this one, is no more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        act()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


# --- functions in processes -------------------------------------------------------------------------------------------


def run_all(jobs: Sequence[Job], at_once: int, prepare: Callable[[], None] | None = None) -> None:
    """Run every job in a new interpreter of its own, `at_once` at a time; wherever this is left, none goes on.

    Args:
        prepare: called in each process first.

    Raises:
        TrainingError: with the message of the `VLMError` that a job raised, or the way in which its process ended.
    """
    waiting, active = deque(jobs), dict[Any, tuple[Any, Any, str]]()
    try:
        while waiting or active:
            while waiting and len(active) < at_once:
                function, arguments = waiting.popleft()
                reader, writer = multiprocessing.Pipe(duplex=False)
                child = context(fork=False).Process(  # type: ignore[attr-defined]
                    target=_work, args=(writer, function, arguments, prepare), name=function.__name__
                )
                child.start()
                writer.close()
                active[child.sentinel] = (child, reader, function.__name__)
            for sentinel in connection.wait(list(active)):
                child, reader, name = active.pop(sentinel)
                child.join()
                _check(name, child.exitcode, reader)
    finally:
        for child, reader, _ in active.values():
            child.kill()
            child.join()
            reader.close()


def _work(
    writer: Any, function: Callable[..., None], arguments: tuple[Any, ...], prepare: Callable[[], None] | None
) -> None:
    if prepare is not None:
        prepare()
    try:
        function(*arguments)
    except VLMError as error:
        writer.send(str(error))
        raise SystemExit(2) from error


def _check(name: str, code: int, reader: Any) -> None:
    """Raise when a process did not do its job. Closes `reader`."""
    said = None
    try:
        said = reader.recv() if reader.poll() else None
    except EOFError:
        pass
    finally:
        reader.close()
    if code:
        raise TrainingError(said or f"the process of {name} {ending(code)}")


def ending(code: int) -> str:
    """How a process ended, in words; `code` is negative for a signal, as `subprocess` gives it."""
    if code >= 0:
        return f"ended with status {code}; what it wrote says why"
    return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_memory_bytes(device: Any = "cpu") -> int:
    """The most memory so far: of torch's allocations on a GPU (since the last reset), else of this whole process since
    it started, which never goes down.

    Args:
        device: a torch device, or its name.
    """
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- how this process ends ----------------------------------------------------------------------------------------

REFUSED, INTERRUPTED, TERMINATED = 2, 130, 143
"""Exit codes: an error for people, Ctrl-C, SIGTERM."""
_SAID: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@contextmanager
def endings() -> Iterator[None]:
    """Around what a person or another process has started: the log goes to stderr, and an exception that is meant for
    people becomes a line and an exit code.

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
        raise SystemExit(0) from None  # the reader (`| head`) has what it wanted
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


class _OneLine(logging.Formatter):
    """The message alone; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
