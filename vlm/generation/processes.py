"""The processes that share one evaluation: as many as torchrun or `accelerate launch` has started.

They agree over gloo, which needs no GPU and whose waiting has no limit worth the name: one process may have finished
its share long before another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from vlm import ranks

_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among the others; alone, every method returns at once and torch is not imported."""

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


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this launch. A process group that exists is used, and stays; one that is made here ends here."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2 or "RANK" not in os.environ:
        yield ALONE
        return
    import torch.distributed as dist

    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    ranks.end_with_launcher()
    with ranks.all_or_none("then start all of them again, they go on where they stopped"):
        dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield Processes(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
