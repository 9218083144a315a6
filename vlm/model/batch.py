"""`Batch`: what a model reads. Only `vlm.model.processor.Processor` makes one."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vlm.errors import DataError, nearest


@dataclass(init=False)
class Batch(MutableMapping[str, Tensor]):
    """What a model reads, made by `Processor` only. `model(**batch)` passes the tensors that are there.

    A mapping from their names to them, but for `len`: that is the number of samples.

    Shape letters: B samples, S sequence length, M images of the whole batch, N patches, P patch side.

    Attributes:
        input_ids: int64[B, S], image placeholders, BOS prefix newline suffix EOS, padding.
        attention_mask: int64[B, S], 0 on padding.
        token_type_ids: int64[B, S], 0 = image and prefix, 1 = suffix (0 on padding).
        position_ids: int64[B, S], count real tokens only.
        labels: int64[B, S], the token itself where it is supervised, -100 elsewhere; None when generating.
        sequence_ids: int64[B, S], which packed sample a token belongs to; None when nothing is packed.
        pixel_values: float32[M, 3, H, W], or float32[M, N, P*P*3] for NaFlex, or float32[M, N] for a fused tower (its
            members' squares one after the other, `vlm.images.fused`); None without images.
        pixel_attention_mask: int64[M, N], NaFlex only.
        spatial_shapes: int64[M, 2], (rows, columns), NaFlex only.
        ids: names of the samples, for messages; not passed to the model.
        truncated: ids of the samples whose suffix was cut; not passed to the model.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    labels: Tensor | None = None
    sequence_ids: Tensor | None = None
    pixel_values: Tensor | None = None
    pixel_attention_mask: Tensor | None = None
    spatial_shapes: Tensor | None = None
    ids: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)

    def __init__(self, tensors: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """From what belongs in it by name; or from one mapping, as libraries build a mapping anew."""
        given = {**(tensors or {}), **named}
        known = {item.name: item for item in fields(self)}
        for name in given:
            if name not in known:
                raise TypeError(f"a batch has no {name!r}{nearest(name, known)}")
        for name, item in known.items():
            if name not in given and item.default is MISSING and item.default_factory is MISSING:
                raise TypeError(f"a batch needs {name}")
            default = item.default if item.default_factory is MISSING else item.default_factory()
            setattr(self, name, given.get(name, default))

    # Views of a dictionary: those of `Mapping` would count samples.
    def keys(self) -> KeysView[str]:
        """Names of the tensors that are there, for `**batch`."""
        return dict(self._tensors()).keys()

    def items(self) -> ItemsView[str, Tensor]:
        """The tensors that are there, with their names."""
        return dict(self._tensors()).items()

    def values(self) -> ValuesView[Tensor]:
        """The tensors that are there."""
        return dict(self._tensors()).values()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, name: str) -> Tensor:
        return dict(self._tensors())[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        known = [item.name for item in fields(self)]
        if name not in known or not isinstance(tensor, Tensor):
            raise DataError(f"a batch holds tensors called {', '.join(known)}; got {name!r}, {type(tensor).__name__}")
        setattr(self, name, tensor)

    def __delitem__(self, name: str) -> None:
        if name not in self.keys():
            raise KeyError(name)
        setattr(self, name, None)

    def __len__(self) -> int:
        """Samples."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's data loader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors()}
        return replace(self, **changed)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                yield item.name, value
