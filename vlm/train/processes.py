"""Agreement between the processes of a run before Lightning has made its process group."""

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

T = TypeVar("T")


def join_process_group() -> None:
    """Join the other processes when a launcher (torchrun, srun) started them all at once.

    With Lightning's own launcher there is nothing to do: rank 0 is alone until its first `fit`, which starts the others
    and waits for them, so they find everything that rank 0 has prepared.
    """
    environment = _launcher()
    if environment is None or environment.world_size() < 2 or dist.is_initialized():
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank())
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
    )


def barrier() -> None:
    """Wait for the other processes, if there is a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of the ranks; that of this one where there is no process group."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share(items: Sequence[T]) -> Sequence[T]:
    """The part of the items that is this process's; the processes have all of them between them, each once."""
    return items[dist.get_rank() :: world_size()] if world_size() > 1 else items


def world_size() -> int:
    """How many processes take part now."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _launcher() -> ClusterEnvironment | None:
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            return environment()
    return None
