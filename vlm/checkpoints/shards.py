"""Tensors to safetensors files of a bounded size, one shard in memory at a time, with the index that readers expect."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.checkpoints.files import INDEX, SINGLE
from vlm.errors import CheckpointError, ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
METADATA = {"format": "pt"}
"""transformers refuses a file without it."""
MODE = 0o644
"""The library makes its files readable by their owner only; a server often runs as someone else."""


def parse_size(size: str | int) -> int:
    """Bytes of `5GB`, `300KB`, `2GiB` or a plain number.

    Raises:
        ConfigError: not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ConfigError(f"shard size {size!r} is not a size; write it as 5GB or 500MB")
    return int(float(match[1]) * unit)


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, max_shard_size: str | int = "5GB"
) -> list[Path]:
    """Write `model.safetensors`, or numbered shards and their index.

    Tensors are converted one shard at a time, and not copied at all where they have the dtype already.

    Args:
        tensors: name in the file -> tensor; on any device.
        dtype: of all tensors in the file.
        max_shard_size: of a file, unless a single tensor is larger.

    Returns:
        the safetensors files.

    Raises:
        CheckpointError: the disk has no room, or a tensor is NaN or infinite in `dtype`.
        ConfigError: `max_shard_size` is no size.
    """
    shards = list(plan(tensors, dtype.itemsize, parse_size(max_shard_size)))
    total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if total > free:
        raise CheckpointError(
            f"{folder}: {total / 1e9:.2f} GB of weights, but {free / 1e9:.2f} GB of the disk are free"
        )
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file({key: _stored(key, tensors[key], dtype) for key in shard}, folder / name, metadata=METADATA)
        (folder / name).chmod(MODE)
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def plan(tensors: Mapping[str, Tensor], itemsize: int, limit: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order, each file at most `limit` bytes or one tensor."""
    shard: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * itemsize
        if shard and held + size > limit:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    if shard:
        yield shard


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    lowest, highest = converted.aminmax()  # NaN is passed on
    if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity in {str(dtype).removeprefix('torch.')}; the training had diverged, or"
            f" the dtype is too narrow: take an earlier checkpoint or another --dtype"
        )
    return converted
