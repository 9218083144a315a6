"""Which parameters train: freezing by part, the manifest that records it, and the proof that it held."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm import files
from vlm.checkpoints import digests
from vlm.errors import TrainingError, nearest
from vlm.train.stage_config import PARTS, StageConfig


@dataclass(frozen=True)
class Row:
    """One parameter of the model, as a stage treats it."""

    name: str
    shape: tuple[int, ...]
    part: str
    trainable: bool
    lr: float | None
    weight_decay: float | None


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The encoder, projector and decoder of a `vlm.VLM`."""
    return model.parts()  # type: ignore[operator]


def freeze(model: nn.Module, stage: StageConfig) -> None:
    """Set `requires_grad` of every parameter as the stage says.

    Raises `TrainingError` when the stage names a part the model does not have, or no parameter is left to train.
    """
    parts = parts_of(model)
    for part in stage.train:
        if part not in parts:
            raise TrainingError(
                f"stage {stage.name}: the model has no part {part!r}{nearest(part, parts)}; it has {', '.join(parts)}"
            )
    for part, module in parts.items():
        module.requires_grad_(part in stage.train)
    if not any(True for part in stage.train for _ in parts[part].parameters()):
        raise TrainingError(
            f"stage {stage.name}: no parameter would train ({', '.join(stage.train)} have none); "
            f"give another part a learning rate"
        )


@contextmanager
def frozen(model: nn.Module, stage: StageConfig) -> Iterator[None]:
    """Hold the parts that a stage freezes in eval mode, whoever calls `train()`; afterwards nothing is frozen.

    A later `model.train()`, by Lightning, transformers or a callback, would otherwise turn dropout and moving
    statistics of frozen parts on again.
    """
    freeze(model, stage)
    model.train()
    held = [
        module for part, root in parts_of(model).items() if part not in stage.train for module in root.eval().modules()
    ]
    for module in held:
        # On the instance: `train()` of every parent, however it was reached, finds this one.
        module.__dict__["train"] = partial(_stay, module)
    try:
        yield
    finally:
        for module in held:
            del module.__dict__["train"]
        model.eval()
        model.requires_grad_(True)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def decays(parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices, kernels and embeddings; norms and biases have fewer than two axes."""
    return parameter.ndim >= 2


def manifest(model: nn.Module, stage: StageConfig) -> list[Row]:
    """A row per parameter, read off the model as it is now (so it can be compared with one taken earlier).

    Raises `TrainingError` when a parameter is in no part or in two.
    """
    owner: dict[int, str] = {}
    for part, module in parts_of(model).items():
        for parameter in module.parameters():
            if owner.setdefault(id(parameter), part) != part:
                raise TrainingError(f"a parameter is shared by the parts {owner[id(parameter)]} and {part}")
    rows = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in owner:
            raise TrainingError(f"parameter {name} belongs to no part of the model ({', '.join(PARTS)})")
        part, trains = owner[id(parameter)], parameter.requires_grad
        rate = stage.train.get(part) if trains else None
        decay = stage.weight_decay * decays(parameter) if trains else None
        rows.append(Row(name, tuple(parameter.shape), part, trains, rate, decay))
    return rows


def check_manifest(model: nn.Module, stage: StageConfig, expected: list[Row], when: str) -> None:
    """Raise `TrainingError` unless the model still matches the manifest; `when` says what happened in between."""
    actual = manifest(model, stage)
    if actual != expected:
        changed = sorted({row.name for row in set(actual) ^ set(expected)})
        raise TrainingError(
            f"stage {stage.name}: what trains changed {when}: {', '.join(changed[:5])} "
            f"({len(changed)} parameters); expected the manifest taken when the stage was set up"
        )


def table(rows: list[Row]) -> str:
    """The manifest summed per part, for people."""
    lines = [f"{'part':<10} {'parameters':>12} {'trainable':>12} {'lr':>9} {'weight decay':>13}"]
    for part in dict.fromkeys(row.part for row in rows):
        own = [row for row in rows if row.part == part]
        total, trained = _count(own), _count([row for row in own if row.trainable])
        rate = next((f"{row.lr:g}" for row in own if row.lr is not None), "frozen")
        decayed = [row for row in own if row.weight_decay]
        decay = f"{decayed[0].weight_decay:g} on {len(decayed)}/{len(own)}" if decayed else "-"
        lines.append(f"{part:<10} {total:>12,} {trained:>12,} {rate:>9} {decay:>13}")
    return "\n".join(lines)


def _count(rows: list[Row]) -> int:
    return sum(torch.Size(row.shape).numel() for row in rows)


def write_manifest(path: Path, rows: list[Row], **extra: Any) -> None:
    """The manifest as JSON: `{"parameters": [...], ...extra}`."""
    files.write_json(path, {**extra, "parameters": [asdict(row) for row in rows]})


def frozen_digests(model: nn.Module, stage: StageConfig) -> dict[str, str]:
    """The digest of each frozen part."""
    return {part: digests.of_module(module) for part, module in parts_of(model).items() if part not in stage.train}


def trained_tensors(model: nn.Module, stage: StageConfig) -> dict[str, torch.Tensor]:
    """What a checkpoint of a stage must hold: trainable parameters, and the saved buffers of the trained parts."""
    parts = parts_of(model)
    buffers = {id(buffer) for part in stage.train for buffer in parts[part].buffers()}
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    # state_dict leaves out buffers that are recomputed anyway.
    saved = {name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) in buffers}
    return {**tensors, **saved}
