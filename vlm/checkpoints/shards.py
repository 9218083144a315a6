"""Tensors to safetensors files of a bounded size, one shard in memory at a time, with the index that readers expect."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.checkpoints.files import INDEX, SINGLE
from vlm.errors import CheckpointError, ConfigError
from vlm.files import write_json

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
METADATA = {"format": "pt"}
"""transformers refuses a file without it."""
SMALLEST_BARE = 10**6
"""A plain number below it is a unit that was forgotten (`5` for 5 GB), not a size in bytes."""


def parse_size(size: str | int) -> int:
    """Bytes of `5GB`, `300KB`, `2GiB` or a plain number of a million and more.

    Raises:
        ConfigError: not a positive size, or a small number without a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip(), re.ASCII)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1 or len(match[1]) > 20:
        raise ConfigError(f"shard size {str(size)[:40]!r} is not a size; write it as 5GB or 500MB")
    if not match[2] and float(match[1]) < SMALLEST_BARE:
        raise ConfigError(
            f"shard size {str(size)!r} has no unit and would be {match[1]} bytes; write {match[1]}GB or {match[1]}MB"
        )
    return int(float(match[1]) * unit)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds all values of these (bfloat16 and float16: float32)."""
    return functools.reduce(torch.promote_types, dtypes)


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_size: str | int = "5GB",
    *,
    read: Callable[[str], Tensor] | None = None,
    allow_nonfinite: bool = False,
) -> list[Path]:
    """Write `model.safetensors`, or numbered shards and their index.

    Tensors are converted one shard at a time, and not copied at all where they have the dtype already.

    Args:
        tensors: name in the file -> tensor; on any device.
        dtype: of all tensors in the file; None keeps each tensor's own.
        max_shard_size: of a file, unless a single tensor is larger.
        read: name -> the tensor with its values, where those in `tensors` have none (offloaded).
        allow_nonfinite: write NaN and infinity too.

    Returns:
        the safetensors files.

    Raises:
        CheckpointError: the disk has no room, or a tensor is NaN or infinite in `dtype`.
        ConfigError: `max_shard_size` is no size.
    """
    sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()}
    shards = list(plan(sizes, parse_size(max_shard_size)))
    total = sum(sizes.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise CheckpointError(
            f"{folder}: {total / 1e9:.2f} GB of weights, but {free / 1e9:.2f} GB of the disk are free"
        )
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    get = read or tensors.__getitem__
    for name, shard in zip(names, shards, strict=True):
        held = {key: _stored(key, get(key), dtype or tensors[key].dtype, allow_nonfinite) for key in shard}
        save_file(held, folder / name, metadata=METADATA)
        del held  # before the next shard is made
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / INDEX, index)
    return [folder / name for name in names]


def plan(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order, each file at most `limit` bytes or one tensor.

    Args:
        sizes: name -> bytes.
    """
    shard: list[str] = []
    held = 0
    for name, size in sizes.items():
        if shard and held + size > limit:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    if shard:
        yield shard


def _stored(name: str, tensor: Tensor, dtype: torch.dtype, allow_nonfinite: bool) -> Tensor:
    converted = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if allow_nonfinite or not converted.numel():
        return converted
    lowest, highest = converted.aminmax()  # NaN is passed on
    if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity in {str(dtype).removeprefix('torch.')}; the training had diverged, or"
            f" the dtype is too narrow: take an earlier checkpoint or another --dtype"
        )
    return converted
