"""The parameters of a model in memory by name, wherever they are: brought from the disk or another device when read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from vlm.errors import CheckpointError


class State(Mapping[str, Tensor]):
    """`state_dict` of a model whose offloaded tensors are read one at a time, when they are asked for.

    Attributes:
        headers: name -> tensor, whose shape and dtype are true and whose values may be missing (on the meta device).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.headers: dict[str, Tensor] = model.state_dict(keep_vars=True)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, on any device but meta.

        Raises:
            CheckpointError: it has no values anywhere.
        """
        tensor = self.headers[name]
        if not tensor.is_meta:
            return tensor.detach()
        self._check_offloaded(name)
        module, leaf = self._place(name)
        with align_module_device(module, torch.device("cpu")):
            found: Tensor = getattr(module, leaf).detach()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def check(self) -> None:
        """Raise CheckpointError for tensors that have no values anywhere, before any is read."""
        for name, tensor in self.headers.items():
            if tensor.is_meta:
                self._check_offloaded(name)

    def _check_offloaded(self, name: str) -> None:
        if not has_offloaded_params(self._place(name)[0]):
            raise CheckpointError(
                f"{name} has no values: the model was built on the meta device and never filled; open it with vlm.load"
            )

    def _place(self, name: str) -> tuple[nn.Module, str]:
        parent, _, leaf = name.rpartition(".")
        return self._model.get_submodule(parent), leaf
