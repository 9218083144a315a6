"""Tensors to safetensors files of a bounded size, one shard in memory at a time, with the index that readers expect."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm.checkpoints.files import INDEX, SINGLE
from vlm.errors import CheckpointError
from vlm.files import write_json
from vlm.settings import parse_size

METADATA = {"format": "pt"}
"""transformers refuses a file without it."""


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
