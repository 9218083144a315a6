"""The processes of one launch (torchrun, srun, Lightning's own launcher): which this is, and what when one dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vlm import children
from vlm.errors import LaunchError

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
GRACE_S = 5
"""How long a process has to say by itself that the one that started it has died."""
_SAID = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL")
"""What the backends' errors have in common."""


def rank() -> int:
    """The number of this process among those of its launch, as the launcher's environment tells; 0 when alone."""
    return int(next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0"))


def launched() -> bool:
    """Whether this is one of several processes, as the launcher's environment tells."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def all_or_none(advice: str) -> Iterator[None]:
    """Around work of several processes: when another one dies, this one ends with one `LaunchError`.

    The one that had an error of its own has told of it. Here there is only a broken connection, wherever this process
    was waiting for the other.

    Args:
        advice: how to go on.
    """
    try:
        yield
    except RuntimeError as error:
        if not broken(error):
            raise
        raise LaunchError(
            f"another process of this launch has ended early (this is process {rank()}); its own last message, or the"
            f" launcher's, says why; {advice}"
        ) from error


def broken(error: BaseException) -> bool:
    """Whether an error says that the connection to another process of the launch is broken."""
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return of_torch or any(text in str(error) for text in _SAID)


def end_with_launcher() -> None:
    """See to it that this process ends when the one that started it is killed. Does nothing outside of a launch.

    torchrun's processes save and leave, as by SIGTERM. Those that Lightning's first process has started cannot go on
    without it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        children.when_gone(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    elif "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        children.when_gone(os.getppid(), _give_up)


def _give_up() -> None:
    """After a broken connection has had its time to be told; a GPU's backend tells nothing and waits."""
    time.sleep(GRACE_S)
    print("error: the first process of this launch has died", file=sys.stderr, flush=True)
    os._exit(2)
