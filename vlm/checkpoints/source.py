"""Tensors to load, wherever they come from, and a module to fill with them, strictly.

Names, shapes and dtypes are compared before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.checkpoints.names import EMBEDDING, HEAD, to_live
from vlm.errors import CheckpointError
from vlm.words import listed

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Tensor types that are weights. Integers and 8-bit floats are quantised and need their own code."""
BUFFERS = re.compile(r".*(position_ids|rotary_emb\.inv_freq|embed_tokens\.embed_scale)$")
"""Constants that older versions of transformers stored with the weights; the model computes them itself."""
SHOWN = 8
"""So many tensors are named in a message, and how many more there are."""


@dataclass(frozen=True)
class Source:
    """Tensors to load: what is known of each before it is read, and how to read it.

    Attributes:
        origin: the path, for messages.
        shapes: live name -> shape.
        dtypes: live name -> the file's dtype name, such as `BF16`.
        read: live name -> the tensor in its stored dtype, in memory that nobody else holds.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read: Callable[[str], Tensor]


def live_source(origin: str, stored: Mapping[str, Any], read: Callable[[str], Tensor]) -> Source:
    """A source whose tensors get their live names; stored constants are left out.

    Args:
        stored: name in the file -> object with `shape` and `dtype`.

    Raises:
        CheckpointError: two tensors are the same parameter under two names.
    """
    names: dict[str, str] = {}
    for name in stored:
        if BUFFERS.fullmatch(name):
            continue
        live = to_live(name)
        if live in names:
            raise CheckpointError(f"{origin}: {name} and {names[live]} are the same parameter; delete one of the two")
        names[live] = name
    return Source(
        origin,
        {live: tuple(stored[name].shape) for live, name in names.items()},
        {live: stored[name].dtype for live, name in names.items()},
        lambda live: read(names[live]),
    )


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a checkpoint has to hold: every parameter and saved buffer, tied ones once."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if EMBEDDING in shapes:  # of a whole model: its output embedding is that one
        shapes.pop(HEAD, None)
    return shapes


def check_fit(source: Source, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names, shapes and dtypes, before anything is read.

    Raises:
        CheckpointError: with the lists of missing, unexpected, mis-shaped and wrong-dtype tensors.
    """
    got = set(source.shapes) - ({HEAD} if HEAD not in wanted else set())
    problems = {
        "missing": sorted(set(wanted) - got),
        "unexpected": sorted(got - set(wanted)),
        "mis-shaped": [
            f"{name} {source.shapes[name]} for {shape}"
            for name, shape in sorted(wanted.items())
            if name in got and source.shapes[name] != shape
        ],
        "not float32, bfloat16 or float16": [
            f"{name} {dtype}" for name, dtype in sorted(source.dtypes.items()) if dtype not in FLOATS
        ],
    }
    found = [f"{len(names)} {what}: {listed(names, SHOWN)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{source.origin}: the weights do not fit the configuration: {'; '.join(found)}")


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter (or buffer) of this name, without a copy."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        setattr(module, leaf, tensor)


def finite(tensor: Tensor, name: str, origin: str, allow: bool) -> Tensor:
    """The tensor, if it holds no NaN and no infinity.

    Raises:
        CheckpointError: names the tensor.
    """
    if not allow and tensor.numel():
        lowest, highest = tensor.aminmax()  # NaN is passed on; no mask of the tensor's size is made
        if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
            raise CheckpointError(
                f"{origin}: tensor {name} holds NaN or infinity; the file is damaged or the training had diverged; take"
                f" an earlier checkpoint, or open it with allow_nonfinite=True (`vlm import --allow-nonfinite`)"
            )
    return tensor


def fill(module: nn.Module, source: Source, *, allow_nonfinite: bool = False) -> None:
    """Strict: every tensor of a module from the source, nothing left over, copied in the module's dtype.

    Raises:
        CheckpointError: with the lists.
    """
    own: Mapping[str, Tensor] = module.state_dict()
    check_fit(source, expected_shapes(module))
    with torch.no_grad():
        for name in source.shapes:
            own[name].copy_(finite(source.read(name), name, source.origin, allow_nonfinite))


def place(
    module: nn.Module, source: Source, *, dtype: torch.dtype | None = None, allow_nonfinite: bool = False
) -> None:
    """Strict as `fill`, for a module without memory: the tensors become its own, without a copy.

    Args:
        dtype: of all of them; None keeps each tensor's.
    """
    check_fit(source, expected_shapes(module))
    with torch.no_grad():
        for name in source.shapes:
            tensor = finite(source.read(name), name, source.origin, allow_nonfinite)
            put(module, name, tensor if dtype is None else tensor.to(dtype))
