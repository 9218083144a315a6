"""Processes that this one starts: none lives on without it, and none holds it up at its end.

`context` is what `multiprocessing` starts them with, and torch's data loader. `run_all` runs functions in processes.
Whatever ends the parent (an exception, a signal, SIGKILL) ends the children; however a child ends, the parent goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, popen_fork, process
from multiprocessing.context import BaseContext, SpawnContext, SpawnProcess
from pathlib import Path
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
