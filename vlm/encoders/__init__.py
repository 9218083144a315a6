"""Vision towers, one file each; the file name is the encoder's kind.

A file defines

    Config       the tower's transformers configuration class
    Encoder      the tower: `Encoder(config)`, `forward(...) -> EncoderOutput`: patch tokens only, in row order, one for
                 each cell of the grid; class, register and prefix tokens are removed by the tower, no patch is
    transform    `transform(config, **settings) -> ImageTransform`: the image transform that the tower was trained with
    tokens_for   `tokens_for(config, image_size) -> int`: patch tokens of a square image
    tiny         `tiny() -> Config`: a configuration small enough for tests
    MODEL_TYPES  `model_type` of the checkpoints that it reads
    PREFIXES     what stands before the tower's tensors in their files, tried in order
    LEFT_OUT     regular expression of tensors (after the prefix) that the tower does not have

and, where it applies,

    read_config  `read_config(values) -> Config`: from a checkpoint's settings, where `Config(**values)` is not enough
    RENAMES      (regular expression, replacement) pairs: names of tensors in files, and in other versions of
                 transformers, to one spelling
    POSITIONS    name of the learned position table, and `resample(table, config) -> Tensor`: it at another image size
    FIXED        settings that the tower always has, whatever a checkpoint says
    BLOCKS, NORM how names of blocks and of the final norm start: needed for a choice of feature layers

and nothing else is needed: `VLMConfig(encoder="my_file")` and `vlm.new` find it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from vlm.config import OWN_ENCODERS, kinds, part
from vlm.errors import ConfigError

CONTRACT = ("Config", "transform", "tokens_for", "MODEL_TYPES", "PREFIXES", "LEFT_OUT")
"""What an encoder's file defines beside its tower; `tiny` is for the tests of this library."""


def use(name: str) -> Any:
    """Make an encoder of one's own known in this process, for `vlm.new(encoder_kind=name)` and for opening models.

    Only a call imports it: a name in a downloaded configuration never does.

    Args:
        name: `MODULE:CLASS`, such as `mylab.towers:MyTower`. The module is a file as described above; the class is its
            `Encoder`.

    Returns:
        The encoder, with the attributes of its module.

    Raises:
        ConfigError: it cannot be imported, or lacks a part of the contract.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ConfigError(f"encoder {name!r}: expected MODULE:CLASS, such as mylab.towers:MyTower")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"encoder {name!r} cannot be imported ({error}); install it, or set PYTHONPATH") from error
    missing = [entry for entry in (*CONTRACT, class_name) if not hasattr(module, entry)]
    if missing:
        raise ConfigError(f"encoder {name!r}: {module_name} has no {', '.join(missing)}; see docs/encoders.md")
    OWN_ENCODERS[name] = SimpleNamespace(**{**vars(module), "Encoder": getattr(module, class_name)})
    return OWN_ENCODERS[name]


class EncoderOutput(NamedTuple):
    """Patch features of M images.

    Attributes:
        features: float[M, P, E], row order, no class or register tokens.
        mask: bool[M, P], False on padding rows; None when every row is a patch.
        grid: int64[M, 2], (rows, columns) of each image.
    """

    features: Tensor
    mask: Tensor | None
    grid: Tensor


def model_types(own: str | None = None) -> dict[str, str]:
    """Encoder kind by the `model_type` of the checkpoints that it reads; an encoder of one's own comes first."""
    if own in OWN_ENCODERS:
        return {name: own for name in OWN_ENCODERS[own].MODEL_TYPES}
    return {name: kind for kind in kinds("vlm.encoders") for name in part("vlm.encoders", kind).MODEL_TYPES}


def read_config(kind: str, values: dict[str, Any]) -> PreTrainedConfig:
    """A tower's configuration from settings as a checkpoint or another configuration has them."""
    module = part("vlm.encoders", kind)
    values = {key: value for key, value in values.items() if not (key == "model_type" and hasattr(module, "Config"))}
    config: PreTrainedConfig = module.read_config(values) if hasattr(module, "read_config") else module.Config(**values)
    return config


def square_tokens(config: Any, image_size: int) -> int:
    """Patch tokens of a square image: one per whole patch."""
    return int(image_size // config.patch_size) ** 2


def check_square(config: Any, pixel_values: Tensor, kind: str) -> None:
    """Refuse images of another size than the tower's.

    Raises:
        ConfigError: `pixel_values` is not float[M, C, image_size, image_size].
    """
    side = config.image_size
    if tuple(pixel_values.shape[1:]) != (config.num_channels, side, side):
        raise ConfigError(
            f"the {kind} tower reads images of {config.num_channels}x{side}x{side}, got"
            f" {tuple(pixel_values.shape[1:])}; set the processor's image_transform.image_size to {side}"
        )


def square_output(config: Any, features: Tensor) -> EncoderOutput:
    """The features of square images with their grid."""
    rows = config.image_size // config.patch_size
    return EncoderOutput(features, None, torch.full((features.shape[0], 2), rows, device=features.device))


# --- feature layers -------------------------------------------------------------------------------------------------


def choose_layers(kind: str, config: PreTrainedConfig, layer: int | list[int]) -> PreTrainedConfig:
    """The configuration of a tower whose features are the outputs of these blocks.

    -1 is the last block followed by the final norm, -2 the one before it without a norm, and so on. A list is
    concatenated along the channels in its order; the norm is applied to -1 only. Blocks above the highest one, and a
    norm that is not applied, are no part of the tower: they would never get a gradient. The result states it in
    `num_hidden_layers`, `feature_layers` (blocks counted from 1) and `feature_norm`.

    Raises:
        ConfigError: a tower without this choice, or a layer that it does not have.
    """
    if layer in (-1, [-1]):
        return config
    if not hasattr(part("vlm.encoders", kind), "BLOCKS"):
        raise ConfigError(f"layer={layer}: a {kind} tower gives its last layer only; leave it out")
    asked = layer if isinstance(layer, list) else [layer]
    values = config.to_dict()
    if "feature_layers" in values:
        raise ConfigError(
            f"layer={layer}: this tower has its choice of layers, {values['feature_layers']}; leave it out"
        )
    depth = int(values["num_hidden_layers"])
    for number in asked:
        if isinstance(number, bool) or not isinstance(number, int) or not -depth <= number <= -1:
            raise ConfigError(f"layer is {layer!r}, expected numbers from -1, the last, to -{depth}, the first block")
    if not asked or len(set(asked)) < len(asked):
        raise ConfigError(f"layer is {layer!r}, expected one layer or several different ones")
    blocks = [depth + 1 + number for number in asked]
    return read_config(
        kind, {**values, "num_hidden_layers": max(blocks), "feature_layers": blocks, "feature_norm": -1 in asked}
    )


def feature_layers(config: Any) -> list[int]:
    """The blocks whose outputs are the features, counted from 1."""
    return list(getattr(config, "feature_layers", None) or [config.num_hidden_layers])


def feature_width(config: Any) -> int:
    """Channels of the features."""
    return int(config.hidden_size) * len(getattr(config, "feature_layers", None) or [0])


def final_norm(config: Any, norm: nn.Module) -> nn.Module:
    """The tower's final norm, or nothing where no feature goes through it."""
    return norm if getattr(config, "feature_norm", True) else nn.Identity()


def run_blocks(config: Any, blocks: Iterable[nn.Module], norm: nn.Module, hidden: Tensor, **inputs: Any) -> Tensor:
    """Run the blocks and collect the features.

    Args:
        hidden: float[M, T, E].
        norm: applied to the output of the last block.
        inputs: further arguments of every block.

    Returns:
        float[M, T, E * number of feature layers].
    """
    outputs = []
    for block in blocks:
        hidden = block(hidden, **inputs)
        outputs.append(hidden)
    outputs[-1] = norm(hidden)
    return torch.cat([outputs[number - 1] for number in feature_layers(config)], dim=-1)
