"""However a process or its child ends, nobody is left behind and nobody waits: each way is tried on real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from traintools import wait

from vlm import children
from vlm.errors import DataError, TrainingError

ROOT = Path(children.__file__).parents[1]
SOON = 20
"""Seconds, on a machine that may be busy; what is tested for would be minutes or for ever."""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not asked for (a zombie) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sleepers(number: int, start: str) -> str:
    """Python code: so many children that sleep; their process ids on stdout, then `start`."""
    return (
        "import time; from vlm import children\n"
        "context = children.context(fork=True)\n"
        f"all = [context.Process(target=time.sleep, args=(600,), daemon=True) for _ in range({number})]\n"
        "for one in all: one.start()\n"
        "print(*(one.pid for one in all), flush=True)\n"
        f"{start}\n"
    )


@contextmanager
def parent(code: str) -> Iterator[tuple[Any, list[int]]]:
    """A process that runs `code`, and the ids of its children, which end with the block at the latest."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    try:
        yield process, pids
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("ending", "signum"),
    [
        ("time.sleep(600)", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGTERM),
        ("time.sleep(600)", signal.SIGINT),
        ("raise ValueError", None),
        ("import os; os._exit(3)", None),
        # The way of an interpreter that ends: multiprocessing ends its children with SIGTERM, which they ignore.
        ("raise SystemExit(2)", None),
    ],
)
def test_children_end_with_their_parent_and_do_not_hold_it_up(ending: str, signum: int | None) -> None:
    with parent(sleepers(2, ending)) as (process, pids):
        assert len(pids) == 2
        if signum is not None:
            process.send_signal(signum)
        process.wait(SOON)
        wait(lambda: not any(map(alive, pids)), SOON)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_signals_to_the_whole_group_are_the_parents() -> None:
    with parent(sleepers(1, "time.sleep(600)")) as (process, pids):
        for signum in (signal.SIGTERM, signal.SIGINT):
            os.kill(pids[0], signum)
        time.sleep(0.2)
        assert alive(pids[0]) and process.poll() is None


def _write(path: Path) -> None:
    path.write_text("done")


def _refuse() -> None:
    raise DataError("no such scene")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep() -> None:
    time.sleep(600)


def test_jobs_in_processes(tmp_path: Path) -> None:
    children.run_all([(_write, (tmp_path / str(i),)) for i in range(3)], at_once=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("job", "message"),
    [(_refuse, "^no such scene$"), (_die, r"^the process of _die was killed by SIGKILL \(out of memory\?\)$")],
)
def test_a_job_that_fails_ends_the_others(job: Callable[[], None], message: str) -> None:
    began = time.monotonic()
    with pytest.raises(TrainingError, match=message):
        children.run_all([(_sleep, ()), (job, ())], at_once=2)
    assert time.monotonic() - began < 60
