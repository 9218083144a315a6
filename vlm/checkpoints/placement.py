"""Where the parts of a model go: one device, or a map of devices as accelerate understands it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn

from vlm.checkpoints.names import EMBEDDING, HEAD
from vlm.checkpoints.source import expected_shapes
from vlm.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Where a model goes.

    Attributes:
        dtype: of all parameters; None keeps each tensor's own.
        device: a single device.
        device_map: `auto`, or part name -> device (`cpu`, `disk`, a GPU number), as accelerate understands it.
        offload_folder: where `disk` parts are written.
        max_memory: device -> bytes or `"10GB"`, for `auto`.
    """

    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    device_map: str | Mapping[str, Any] | None = None
    offload_folder: str | Path | None = None
    max_memory: Mapping[Any, Any] | None = None


def device_map(model: Any, placement: Placement) -> dict[str, Any] | None:
    """Part name -> device for `placement.device_map`; None when all goes to one device.

    Args:
        model: a model of transformers, its parameters not in memory yet.

    Raises:
        ConfigError: a map without a device for a part, or one that puts the tied embeddings on two.
    """
    asked = placement.device_map
    if asked is None:
        return None
    if isinstance(asked, str):
        if asked != "auto":
            raise ConfigError(f"device_map is {asked!r}, expected 'auto' or a map from part names to devices")
        if not torch.cuda.is_available() and placement.max_memory is None:
            return None  # everything fits nowhere else
        blocks = list(model._no_split_modules or [])
        memory: Any = get_balanced_memory(
            model, dict(placement.max_memory) if placement.max_memory else None, blocks, placement.dtype
        )
        devices = dict(infer_auto_device_map(model, memory, blocks, dtype=placement.dtype))
    else:
        devices = dict(asked)
    if "disk" in devices.values():
        if placement.offload_folder is None:
            raise ConfigError("parts of the model go to disk, but there is no folder for them; pass offload_folder=")
        Path(placement.offload_folder).mkdir(parents=True, exist_ok=True)
    for name in expected_shapes(model):
        device_of(name, devices)
    _place_head(devices, asked)
    return _without_overlap(model, devices)


def _without_overlap(model: nn.Module, devices: dict[str, Any]) -> dict[str, Any]:
    """The same map with names of which none lies inside another: accelerate would move the whole of the outer one."""
    if not any(_inside(one, other) for one in devices for other in devices):
        return devices
    parted: dict[str, Any] = {}

    def place(name: str, module: nn.Module) -> None:
        own = [f"{name}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False)]
        if not any(_inside(key, name) for key in devices):
            parted[name] = device_of(name, devices)
            return
        for leaf in own:
            parted[leaf] = device_of(leaf, devices)
        for child, inner in module.named_children():
            place(f"{name}.{child}".lstrip("."), inner)

    place("", model)
    return parted


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(outer + "."))


def _place_head(devices: dict[str, Any], asked: str | Mapping[str, Any]) -> None:
    """The output embedding is the input embedding: one tensor, on one device.

    Raises:
        ConfigError: a map that puts them on two.
    """
    module, table = HEAD.rpartition(".")[0], device_of(EMBEDDING, devices)
    try:
        head = device_of(HEAD, devices)
    except ConfigError:  # a map need not name what it has placed already
        devices[module] = table
        return
    if _canonical(head) == _canonical(table):
        return
    if not isinstance(asked, str):
        raise ConfigError(
            f"device_map puts {module} on {head!r} and {EMBEDDING.rpartition('.')[0]} on {table!r}; they are one"
            f" tensor (Gemma's output embedding is its input embedding): give both the same device"
        )
    devices.pop(HEAD, None)
    devices[module] = table


def _canonical(device: Any) -> str:
    if isinstance(device, str) and device == "disk":
        return device
    place = torch.device(device)
    return str(torch.device(place.type, place.index or 0)) if place.type != "cpu" else "cpu"


def device_of(name: str, devices: Mapping[str, Any]) -> Any:
    """The device of a parameter: its own, or that of the nearest part around it that has one.

    Raises:
        ConfigError: there is none.
    """
    prefix = name
    while prefix not in devices:
        if not prefix:
            raise ConfigError(f"device_map has no device for {name}; add it or one of its parents ('' is the whole)")
        prefix = prefix.rpartition(".")[0]
    return devices[prefix]
