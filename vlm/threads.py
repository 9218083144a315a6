"""Threads of the libraries that compute: how many, and how long they wait awake. Decided before torch is loaded.

OpenMP's threads spin at the end of every parallel piece of work, for milliseconds, until the last one is there. On a
machine that others use too, that last one is often not running, because the spinning ones hold its core. A short spin
costs little where nobody else is, and keeps training at its speed where somebody is (docs/training.md has figures).

The runtimes read the environment once, when torch loads them: libgomp (GNU, in the wheels of torch for Linux) reads
GOMP_SPINCOUNT, libiomp5 (Intel and LLVM, in conda's and macOS' builds) reads KMP_BLOCKTIME. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""Turns of libgomp's waiting loop (some microseconds; its default is 300,000), and milliseconds of libiomp5 (200)."""
SPIN_IS_SET_BY = ("OMP_WAIT_POLICY", *SPIN)
NUMBER = "OMP_NUM_THREADS"
NUMBER_IS_SET_BY = (NUMBER, "MKL_NUM_THREADS")
LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
"""How many processes of one launch share this machine, as launchers say."""


def prepare(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Set what the user has not set; does nothing once torch is loaded, when it would come too late.

    The number of threads is set only where torch would take too many: it looks at the cores that a process may run on,
    but not at a container's quota, nor at the other processes of the launch.

    Args:
        root: where `proc` and `sys` are.
    """
    if "torch" in sys.modules:
        return
    if not any(name in environment for name in SPIN_IS_SET_BY):
        environment.update(SPIN)
    number = share(environment, root)
    if number < allowed() and not any(name in environment for name in NUMBER_IS_SET_BY):
        environment[NUMBER] = str(number)


def share(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Cores for this process: those of the machine, divided among the processes of its launch; at least 1."""
    given = next((environment[name] for name in LOCAL_PROCESSES if name in environment), "1")
    processes = int(given) if given.isdecimal() else 1
    return max(1, cores(root) // max(1, processes))


def cores(root: Path = Path("/")) -> int:
    """Cores that this process can really use: those it may run on, and no more than its quota of time; at least 1."""
    return max(1, int(min([allowed(), *quotas(root)])))


def allowed() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quotas(root: Path = Path("/")) -> Iterator[float]:
    """Limits on the time that this process gets, in cores: of its control group and of every group around it.

    Source: the kernel's cgroup-v2 (`cpu.max`: quota and period) and sched-bwc (v1: `cpu.cfs_quota_us`) pages.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be that of the host, which is not mounted: then its top is this group.
        inner = PurePosixPath("/", group)
        for folder in (inner, *inner.parents):
            for name in (controllers, "cpu") if controllers else ("",):
                yield from _quota(mounts / name / folder.relative_to("/"))


def _quota(folder: Path) -> Iterator[float]:
    v2 = _lines(folder / "cpu.max")
    words = v2[0].split() if v2 else [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
    # Without a limit the quota is "max", or -1.
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
        yield int(words[0]) / int(words[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
