"""What a vision tower's file defines, and what it hands over.

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
    POSITIONS    name (or names) of the learned position table, and `resample(table, config) -> Tensor`: it at another
                 image size
    FIXED        settings that the tower always has, whatever a checkpoint says
    BLOCKS, NORM how names of blocks and of the final norm start (a string or several): needed for a choice of feature
                 layers
    choose_layers `choose_layers(config, layer) -> Config`, where a choice of feature layers is made in another way
    recognise    `recognise(values) -> dict | None`: the settings in a configuration file of another library, or None
                 when it is not of its kind. CONFIG_FILE is its name, if not config.json, WEIGHTS that of the weights
    flops        `flops(config) -> int`: of one image, where counting matrix weights per patch is wrong
    published    `published(config, transform, head) -> Published`: the tower alone in its library's format, for `vlm
                 export --to tower`; without it a tower cannot leave its model. `head` is name in the file -> shape of
                 what its checkpoint had beside it, or None for the format without a pooling head

and nothing else is needed: `VLMConfig(encoder="my_file")` and `vlm.new` find it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from vlm.encoders._layers import feature_width
from vlm.errors import ConfigError

CONTRACT = ("Config", "transform", "tokens_for", "MODEL_TYPES", "PREFIXES", "LEFT_OUT")
"""What an encoder's file defines beside its tower; `tiny` is for the tests of this library."""


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


class Published(NamedTuple):
    """A tower alone, as its own library has it.

    Attributes:
        architecture: the class or function that opens it, for people and for transformers' `architectures`.
        config: what its configuration file holds.
        rename: name of one of the tower's tensors, or of the library's own model -> name in the file.
        build: the library's own model of this configuration with new weights, to know what else its file has.
        features: (the library's model, its inputs by name) -> float[M, P, E], the features as the tower gives them.
        config_file, weights: names of the files.
        transformers: transformers opens it, by the name of the class.
        opened: opens the directory with another library; None: `build` with the tensors in their places.
    """

    architecture: str
    config: dict[str, Any]
    rename: Callable[[str], str]
    build: Callable[[], nn.Module]
    features: Callable[..., Tensor]
    config_file: str = "config.json"
    weights: str = "model.safetensors"
    transformers: bool = True
    opened: Callable[[Path], nn.Module] | None = None


def read_config(module: Any, values: dict[str, Any]) -> PreTrainedConfig:
    """A tower's configuration from settings as a checkpoint or another configuration has them."""
    values = {key: value for key, value in values.items() if not (key == "model_type" and hasattr(module, "Config"))}
    config: PreTrainedConfig = module.read_config(values) if hasattr(module, "read_config") else module.Config(**values)
    return config


def square_tokens(config: Any, image_size: int) -> int:
    """Patch tokens of a square image: one per whole patch."""
    return int(image_size // config.patch_size) ** 2


def square_grid(config: Any) -> tuple[int, int]:
    """(rows, columns) of the features of a tower that reads squares."""
    if getattr(config, "grid", None) is not None:
        return int(config.grid[0]), int(config.grid[1])
    rows = int(config.image_size // config.patch_size)
    return rows, rows


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


def check_output(output: Any, config: Any, num_images: int | None = None) -> None:
    """Refuse what a tower returns if it is not float[M, P, E] features with a mask and a grid, before a projector makes
    a message about matrices of it. Looks at types and shapes only, so nothing waits for a GPU.

    Args:
        output: what the tower returned for `num_images` images (None: for any number).
        config: the `VLMConfig`.

    Raises:
        ConfigError: says what was returned, what the contract is and what to do.
    """
    kind, width = config.encoder, feature_width(config.vision_config)
    if not isinstance(output, EncoderOutput):
        raise ConfigError(
            f"the {kind} tower returned {_described(output)}, expected vlm.encoders.EncoderOutput(features, mask,"
            f" grid); vlm.encoders.square_output(config, features) makes one for square images"
        )
    features, mask, grid = output
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.ndim != 3:
        problem = f"features are {_described(features)}, expected float[M, P, E]"
    elif num_images not in (None, features.shape[0]):
        problem = f"features are {_described(features)}, expected those of {num_images} images"
    elif features.shape[2] != width:
        problem = (
            f"features are {features.shape[2]} wide, its configuration says {width} (hidden_size, times the number of"
            f" feature_layers); the projector was built for that"
        )
    elif mask is not None and not (
        isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == features.shape[:2]
    ):
        problem = (
            f"the mask is {_described(mask)}, expected None or bool{list(features.shape[:2])}, False on padding rows"
        )
    elif not (
        isinstance(grid, Tensor) and grid.dtype in (torch.int64, torch.int32) and grid.shape == (features.shape[0], 2)
    ):
        problem = (
            f"the grid is {_described(grid)}, expected int64[{features.shape[0]}, 2]: (rows, columns) of each image"
        )
    else:
        return
    raise ConfigError(f"the {kind} tower does not keep its contract (docs/encoders.md): {problem}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def choose_layers(module: Any, kind: str, config: PreTrainedConfig, layer: int | list[int]) -> PreTrainedConfig:
    """The configuration of a tower whose features are the outputs of these blocks (`choose_blocks`), or the tower's own
    way of choosing.

    Raises:
        ConfigError: a tower without this choice, or a layer that it does not have.
    """
    if layer in (-1, [-1]):
        return config
    if hasattr(module, "choose_layers"):
        chosen: PreTrainedConfig = module.choose_layers(config, layer)
        return chosen
    return choose_blocks(module, kind, config, layer)


def choose_blocks(module: Any, kind: str, config: PreTrainedConfig, layer: int | list[int]) -> PreTrainedConfig:
    """The configuration of a tower whose features are the outputs of these blocks.

    -1 is the last block followed by the final norm, -2 the one before it without a norm, and so on. A list is
    concatenated along the channels in its order; the norm is applied to -1 only. Blocks above the highest one, and a
    norm that is not applied, are no part of the tower: they would never get a gradient. The result states it in
    `num_hidden_layers`, `feature_layers` (blocks counted from 1) and `feature_norm`.

    Raises:
        ConfigError: a tower without this choice, or a layer that it does not have.
    """
    if not hasattr(module, "BLOCKS"):
        raise ConfigError(f"layer={layer}: a {kind} tower gives its last layer only; leave it out")
    asked = layer if isinstance(layer, list) else [layer]
    values = config.to_dict()
    if values.get("feature_layers"):
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
        module, {**values, "num_hidden_layers": max(blocks), "feature_layers": blocks, "feature_norm": -1 in asked}
    )


RUNNING = (
    *("_attn_implementation", "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label"),
    *("is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
    *("torch_dtype", "transformers_version"),
)
"""Fields of every configuration that say nothing of an architecture."""


def stated(config: PreTrainedConfig, **changes: Any) -> dict[str, Any]:
    """A configuration as a file of transformers states it: every field of the architecture, its choice of feature
    layers too, without those of a running model."""
    values = {key: value for key, value in sorted(config.to_dict().items()) if key not in RUNNING}
    return {**values, **changes}
