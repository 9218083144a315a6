"""Runs as processes of their own: several at once, on GPUs of their own, stopped together, continued later.

Each run has two processes, one after the other: `train`, then `measure`. So peak memory is that of one thing, and a
run that crashes takes no other with it. They are forked from a server that has imported everything once, so that they
start at once. A run whose processes have written everything is never started again.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from vlm import children, threads
from vlm.compare.runs import LOG, SPEC, Spec
from vlm.errors import ConfigError, TrainingError
from vlm.train.signals import Stopped, StopSignal

log = logging.getLogger(__name__)

PHASES = ("train", "measure")
TICK_S = 0.05
GRACE_S = 600
"""How long a run may take to save when it is asked to stop."""
END_S = 20
"""How long the server may take to end."""


@dataclass(frozen=True)
class Slot:
    """Where one run at a time works."""

    environment: dict[str, str]
    threads: int | None
    """Of the CPU; None: torch decides."""
    what: str
    """For people, such as `GPU 1` or `2 threads`."""


class Server:
    """The client's side of `vlm.compare.worker`'s server: starts processes and hears how they end."""

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            raise ConfigError(
                "vlm compare starts its runs by fork, which this system (Windows) does not have; start it in WSL"
            )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vlm.compare.worker", "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C reaches a whole terminal group: the runs must hear of it once, from us, to save and leave.
            start_new_session=True,
        )
        self._partial = b""

    def send(self, **request: Any) -> None:
        """Ask for something; see `vlm.compare.worker.serve`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise TrainingError("the process that starts the runs has died; start the comparison again") from error

    def ended(self, wait_s: float) -> dict[str, int]:
        """Name -> exit code (negative: the signal) of processes that ended since the last call."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], wait_s)[0]:
            return {}
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        if not data:
            raise TrainingError("the process that starts the runs has died; start the comparison again")
        *lines, self._partial = (self._partial + data).split(b"\n")
        return {name: code for name, code in map(json.loads, lines)}

    def close(self) -> None:
        """End the server, and with it every process that is left."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has died, and something was still to be said to it
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextmanager
def serving() -> Iterator[Server]:
    """A server for the length of a block."""
    server = Server()
    try:
        yield server
    finally:
        server.close()


@dataclass
class _Active:
    """A run at work."""

    spec: Spec
    slot: Slot
    server: Server
    phase: int = 0
    began: float = field(default_factory=time.monotonic)
    offset: int = 0

    def start(self) -> None:
        path = self.spec.folder / LOG
        self.offset = path.stat().st_size if path.exists() else 0
        self.server.send(
            start=self.spec.name,
            phase=PHASES[self.phase],
            spec=str(self.spec.folder / SPEC),
            log=str(path),
            environment=self.slot.environment,
            threads=self.slot.threads,
        )

    def last_words(self, code: int) -> str:
        """Why the process ended, from what it wrote."""
        lines = (self.spec.folder / LOG).read_bytes()[self.offset :].decode(errors="replace").strip().splitlines()
        told = [line.strip() for line in lines if line.startswith("error: ")]
        if told:
            return told[-1].removeprefix("error: ")
        return lines[-1].strip() if lines and code > 0 else children.ending(code)


def slots(jobs: int | None, gpus: Sequence[str]) -> list[Slot]:
    """Places for `jobs` runs at once (by default one per GPU, or one).

    GPUs are dealt out like cards; with more jobs than GPUs they share. Without GPUs the cores are shared equally,
    unless OMP_NUM_THREADS says how many threads a run has.
    """
    count = jobs or max(1, len(gpus))
    if gpus:
        own = [list(gpus[i::count]) or [gpus[i % len(gpus)]] for i in range(count)]
        return [Slot({"CUDA_VISIBLE_DEVICES": ",".join(ids)}, None, f"GPU {','.join(ids)}") for ids in own]
    given = os.environ.get("OMP_NUM_THREADS", "")
    each = int(given) if given.isdecimal() and int(given) else max(1, threads.cores() // count)
    environment = {"OMP_NUM_THREADS": str(each), "MKL_NUM_THREADS": str(each)}
    return [Slot(environment, each, "1 thread" if each == 1 else f"{each} threads")] * count


def visible_gpus(accelerator: str) -> list[str]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them."""
    if accelerator == "cpu":
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def run_all(
    specs: Sequence[Spec], places: Sequence[Slot], on_finished: Callable[[Spec], None], server: Server | None = None
) -> dict[str, str]:
    """Bring every run to its end; returns name -> reason of those that failed.

    Args:
        server: one that is running already; None starts one if there is anything to do.

    Raises:
        Stopped: a signal came; the runs that were at work saved and left.
        TrainingError: the server died.
    """
    todo = [spec for spec in specs if not spec.finished]
    if len(todo) < len(specs):
        log.info("%d of %d runs were finished before", len(specs) - len(todo), len(specs))
    if not todo:
        return {}
    if server is not None:
        return _run(todo, places, on_finished, server)
    with serving() as server:
        return _run(todo, places, on_finished, server)


def _run(
    todo: Sequence[Spec], places: Sequence[Slot], on_finished: Callable[[Spec], None], server: Server
) -> dict[str, str]:
    waiting, free, active = deque(todo), list(places), dict[str, _Active]()
    failed = dict[str, str]()
    with StopSignal() as stop:
        stop.saving_possible = True
        while waiting or active:
            while waiting and free and not stop.signum:
                item = _Active(waiting.popleft(), free.pop(0), server)
                log.info("run %d of %d: %s (%s)", len(todo) - len(waiting), len(todo), item.spec.name, item.slot.what)
                item.start()
                active[item.spec.name] = item
            if stop.signum:
                _stop(active, server)
                raise Stopped(stop.signum)
            for name, code in server.ended(TICK_S).items():
                # A shared server may still tell of a run that an earlier comparison had to give up.
                if name in active and _over(active[name], code, failed, on_finished):
                    free.append(active.pop(name).slot)
    return failed


def _over(item: _Active, code: int, failed: dict[str, str], on_finished: Callable[[Spec], None]) -> bool:
    """A process of a run has ended; True when the run is at its end, good or bad."""
    if code != 0:
        failed[item.spec.name] = item.last_words(code)
        log.error("%s failed: %s (see %s)", item.spec.name, failed[item.spec.name], item.spec.folder / LOG)
        return True
    item.phase += 1
    if item.phase < len(PHASES):
        item.start()
        return False
    log.info("%s: done in %.0f s", item.spec.name, time.monotonic() - item.began)
    on_finished(item.spec)
    return True


def _stop(active: dict[str, _Active], server: Server) -> None:
    """Ask all to save and leave, and wait: a second signal ends this process, and they die with it."""
    server.send(stop=list(active))
    deadline, left = time.monotonic() + GRACE_S, set(active)
    while left and time.monotonic() < deadline:
        left -= server.ended(TICK_S).keys()
