"""sha256 over tensors and over JSON values: what every statement that two things are the same is made of.

Knows no model and no file, so that whoever trains, caches or compares may ask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def of_module(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and buffers of a part, computed ones too."""
    return of_tensors([*module.named_parameters(), *module.named_buffers()])


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order given."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for plain in _plain(tensor.detach()):
            total.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def of_values(values: Any) -> str:
    """sha256 over JSON values; the order of keys does not count."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the bytes: itself, or what a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
