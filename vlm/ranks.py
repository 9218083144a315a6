"""The processes of one launch (torchrun, srun, Lightning's own launcher): which this is, how they agree, and what when
one dies.

torch is imported only where there are several.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from vlm import children
from vlm.errors import LaunchError

T = TypeVar("T")

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
_ALL_VARIABLES = (*RANK_VARIABLES, "NODE_RANK", "GROUP_RANK")
_PATIENCE = timedelta(days=7)
"""Waiting has no limit worth the name: one process may have finished its share long before another."""
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


def is_main() -> bool:
    """Whether this is the first process of its launch, on the first node, as the launcher's environment tells."""
    return all(os.environ.get(name, "0") == "0" for name in _ALL_VARIABLES)


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


# --- agreement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among the others; alone, every method returns at once."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of the ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of the items that is this process's; the processes have all of them between them, each once."""
        return items[self.rank :: self.world] if self.world > 1 else items


ALONE = Processes()


def current() -> Processes:
    """The processes of torch's process group; this one alone where there is none."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return ALONE


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this launch, which agree over gloo: that needs no GPU.

    A process group that exists is used, and stays; one that is made here ends here.
    """
    if not launched() or "RANK" not in os.environ:
        yield ALONE
        return
    import torch.distributed as dist

    if dist.is_initialized():
        yield current()
        return
    end_with_launcher()
    with all_or_none("then start all of them again, they go on where they stopped"):
        dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield current()
        finally:
            dist.destroy_process_group()


# --- ends -------------------------------------------------------------------------------------------------------------


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
    elif "WORLD_SIZE" in os.environ and local_rank() != 0:
        children.when_gone(os.getppid(), _give_up)


def _give_up() -> None:
    """After a broken connection has had its time to be told; a GPU's backend tells nothing and waits."""
    time.sleep(GRACE_S)
    print("error: the first process of this launch has died", file=sys.stderr, flush=True)
    os._exit(2)
