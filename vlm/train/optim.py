"""AdamW over named parameter groups, with state that goes to safetensors and back by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlm.errors import CheckpointError
from vlm.train.freezing import Row
from vlm.train.stage_config import StageConfig


def adamw(model: nn.Module, rows: list[Row], stage: StageConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW with a group per (part, weight decay); each group has `part`, `peak_lr` and the parameters' `names`.

    Learning rates start at the peak; the trainer sets them from the schedule before each step. Fused is several times
    faster than torch's default loop, also on a CPU.
    """
    named = dict(model.named_parameters())
    groups: dict[tuple[str, float], dict] = {}
    for row in rows:
        if not row.trainable:
            continue
        assert row.lr is not None and row.weight_decay is not None
        group = groups.setdefault(
            (row.part, row.weight_decay),
            {
                "params": [],
                "names": [],
                "part": row.part,
                "weight_decay": row.weight_decay,
                "lr": row.lr,
                "peak_lr": row.lr,
            },
        )
        group["params"].append(named[row.name])
        group["names"].append(row.name)
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert len(set(grouped)) == len(grouped), "a parameter is in two groups"
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}, (
        "a trainable parameter is in no group"
    )
    return torch.optim.AdamW(list(groups.values()), betas=stage.betas, eps=stage.eps, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Set every group's rate to its peak times `multiplier`; returns part -> rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `{"<parameter name>.<state name>": tensor}`; parameters never stepped have none."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave. Raises `CheckpointError` naming tensors that fit no parameter."""
    owners = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in owners or (tensor.ndim and tensor.shape != owners[name].shape):
            raise CheckpointError(
                f"optimizer state {full_name} {tuple(tensor.shape)} fits no trainable parameter of this stage"
            )
        # A copy: the file's tensors may share one buffer, and the optimizer changes them in place.
        optimizer.state[owners[name]][key] = tensor.to(owners[name].device, copy=True)
