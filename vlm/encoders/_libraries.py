"""Towers of other libraries: their features are measured, and what no feature goes through is left out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlm.encoders._layers import feature_layers, feature_width
from vlm.errors import ConfigError

TIMM_BLOCKS = ("Block", "EvaBlock", "ConvNeXtBlock", "SwinTransformerBlock")
"""Classes of timm's blocks, for `device_map` and FSDP."""


def missing_extra(library: str, extra: str, error: Exception) -> ConfigError:
    """What to say where a tower needs a library that is not there."""
    return ConfigError(
        f"this tower needs {library}, which cannot be imported ({error}): pip install 'vlm-backbone[{extra}]'"
    )


def count_flops(tower: Any, config: Any) -> int:
    """Floating-point operations of one image, counted while the tower runs on nothing (meta tensors): 2 per
    multiply-add of matrix products, convolutions and attention.

    Args:
        tower: the `Encoder` class.
    """
    side = config.image_size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(config).eval()(torch.empty(1, 3, side, side))
    return int(counter.get_total_flops())


def trunk_features(trunk: Any, config: Any) -> Callable[[Tensor], Any]:
    """What a call of a timm model has to run: its features, or the outputs of the chosen blocks in rising order."""
    if not config.feature_layers:
        features: Callable[[Tensor], Any] = trunk.forward_features
        return features
    indices = [block - 1 for block in feature_layers(config)]
    return functools.partial(
        trunk.forward_intermediates, indices=indices, norm=False, output_fmt="NLC", intermediates_only=True
    )


def unused_names(module: nn.Module) -> list[str]:
    """After a backward pass: the modules none of whose parameters has a gradient, outermost first, and single
    parameters without one."""
    found: list[str] = []
    for name, child in module.named_modules():
        parameters = list(child.parameters())
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and parameters and not inside and all(parameter.grad is None for parameter in parameters):
            found.append(name)
    alone = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    return found + [name for name in alone if not any(name.startswith(f"{outer}.") for outer in found)]


def without(module: nn.Module, names: Iterable[str]) -> None:
    """Take modules and parameters out that no feature goes through, and the counters of batch norms, which are integers
    among the weights and used with momentum None only.

    Raises:
        ConfigError: a name that is neither.
    """
    known = {name for found in (module.named_modules(), module.named_parameters()) for name, _ in found if name}
    for name in names:
        if name not in known:
            raise ConfigError(f"unused: the architecture has no {name!r}; leave `unused` out, and it is measured again")
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, leaf, None if leaf in owner._parameters else nn.Identity())
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.num_batches_tracked = None


def row_order(features: Tensor, layout: str, prefix: int) -> Tensor:
    """Features of a library as float[M, P, E].

    Args:
        features: float[M, prefix + P, E] (`NLC`), float[M, E, R, C] (`NCHW`) or float[M, R, C, E] (`NHWC`).
        prefix: class and register tokens before the patches.
    """
    if layout == "NLC":
        return features[:, prefix:]
    return features.flatten(1, 2) if layout == "NHWC" else features.flatten(2).transpose(1, 2)


def check_measured(config: Any, features: Tensor) -> Tensor:
    """The features of square images, if they are what the configuration says was measured.

    Raises:
        ConfigError: another number of patches or channels.
    """
    wanted = (int(config.image_size // config.patch_size) ** 2, feature_width(config))
    if tuple(features.shape[1:]) != wanted:
        raise ConfigError(
            f"the tower gives {tuple(features.shape[1:])} patches and channels, its configuration says {wanted}:"
            f" layout, num_prefix_tokens or patch_size is not the architecture's"
        )
    return features


def check_whole_cells(config: Any, name: str) -> None:
    """Refuse an image size at which a ConvNet has another number of cells than `image_size // patch_size`."""
    rows, cell = config.image_size // config.patch_size, config.patch_size
    if config.layout != "NLC" and rows * cell != config.image_size:
        raise ConfigError(
            f"image_size is {config.image_size}, but a cell of {name} is {cell} px; take {rows * cell} or"
            f" {(rows + 1) * cell}"
        )


def plain(value: Any) -> bool:
    """Whether a setting holds plain values only."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(plain(item) for item in value)
    return isinstance(value, str | int | float | bool | None)
