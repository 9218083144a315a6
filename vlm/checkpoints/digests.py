"""sha256 over tensors and over JSON values: what every statement that two things are the same is made of.

Knows no model and no file, so that whoever trains, caches or compares may ask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm.encoders.contract import RUNNING


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


def canonical(value: Any) -> Any:
    """A configuration's values without paths, versions, dtypes and other notes (`contract.RUNNING`), at any depth.

    What is None is left out: newer versions of transformers add fields that are off.
    """
    if isinstance(value, Mapping):
        kept = {str(key): canonical(item) for key, item in value.items() if str(key) not in RUNNING}
        return {key: kept[key] for key in sorted(kept) if kept[key] is not None}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value


def of_tokenizer(tokenizer: Any) -> str:
    """sha256 over a tokenizer's whole definition and its control tokens; of transformers', or one of ours."""
    if hasattr(tokenizer, "backend_tokenizer"):
        definition: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        # Of the last call, not of the tokenizer.
        definition.pop("truncation", None)
        definition.pop("padding", None)
    else:  # transformers' classes over a sentencepiece model
        definition = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    controls = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return of_values([definition, controls, sorted(tokenizer.all_special_ids)])


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the bytes: itself, or what a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
