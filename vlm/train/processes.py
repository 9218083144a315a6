"""Agreement between the processes of a run before Lightning has made its process group."""

import os

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment


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


def _launcher() -> ClusterEnvironment | None:
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            return environment()
    return None
