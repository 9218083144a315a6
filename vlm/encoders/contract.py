"""What an encoder says of itself: the `Spec` of its file, and what its tower takes and gives.

A file of the room declares `SPEC`, and nothing else is needed: `VLMConfig(encoder="my_file")` and `vlm.new` find it.
Nothing else in the library asks a tower by name, class, attribute or `model_type`.

A tower is `Encoder(config)` with `forward(...) -> EncoderOutput`: patch tokens only, in row order, one for each cell of
the grid; class, register and prefix tokens are removed by the tower, no patch is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from vlm.encoders._layers import chosen_layers, feature_width
from vlm.errors import ConfigError


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


def square_tokens(config: Any, image_size: int) -> int:
    """Patch tokens of a square image: one per whole patch."""
    return int(image_size // config.patch_size) ** 2


def square_grid(config: Any) -> tuple[int, int]:
    """(rows, columns) of a square image: its whole patches."""
    rows = int(config.image_size // config.patch_size)
    return rows, rows


def _no_tiny() -> Any:
    raise ConfigError("this tower's file has no configuration that is small enough for tests; give its SPEC a `tiny`")


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """The text tower that checkpoints of a vision tower hold beside it, with its pooling head.

    Attributes:
        config, model: transformers' classes of both towers.
        model_type: of such a checkpoint.
        family: whose rule its texts follow where the checkpoint does not say another (`vlm.siglip.rules.RULES`).
        objective: what it was trained with: `sigmoid` (each pair a question of its own, with a bias) or `softmax` (one
            text among the others, without).
        width: `width(config) -> int`: of an embedding.
        adapt: changes the model of both towers so that its images are read as the file's own tower reads them.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    model_type: str
    family: str
    objective: Literal["sigmoid", "softmax"] = "sigmoid"
    width: Callable[[Any], int] = lambda config: int(config.vision_config.hidden_size)
    adapt: Callable[[Any], None] = lambda model: None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A vision tower, declared by its file as `SPEC`.

    Attributes:
        title: its name for people.
        config: the tower's transformers configuration class.
        encoder: the tower.
        transform: `transform(config, **settings) -> ImageTransform`: the image transform that it was trained with.
        model_types: `model_type` of the checkpoints that it reads.
        prefixes: what stands before the tower's tensors in their files, tried in order.
        left_out: regular expression of tensors (after the prefix) that the tower does not have.
        unused: further names that a configuration leaves out.

        tokens_for: `tokens_for(config, image_size) -> int`: patch tokens of a square image.
        any_aspect: it reads patches of images of any aspect ratio, with a mask (NaFlex); else squares of
            `config.image_size` pixels.
        grid: `grid(config) -> (rows, columns)` of the features of a square image.
        extra_tokens: tokens in its blocks that are not patches (class, registers).
        members: (kind, configuration) of each tower that it is made of; none where it is one.
        with_members: `with_members(config, members)`: the same with other configurations of its members.

        blocks: names of the classes that `device_map` and FSDP keep whole.
        block_names, norm_names: how names of blocks and of the final norm start: needed for a choice of feature layers.
        choose: `choose(config, layer)`, where feature layers are chosen in another way than by blocks.

        read: `read(values) -> config`: from a checkpoint's settings, where `config(**values)` is not enough.
        renames: (regular expression, replacement) pairs: names of tensors in files, and in other versions of
            transformers, to one spelling.
        fixed: settings that the tower always has, whatever a checkpoint says.
        positions: names of the learned position table.
        resample: `resample(table, config)`: it at another image size.
        config_file, weights_file: names of a checkpoint's files.
        recognise: `recognise(values)`: the settings in a configuration file of another library, or None when it is not
            of its kind. Such a configuration holds the image transform too.

        weights: kinds with the same word here read each other's weights, and their tensors differ in shape only.
        adopt: `adopt(values, image_size)`: settings of this kind from those of another with the same weights.
        adopt_positions: `adopt_positions(table, config)`: the position table of such a kind as this one has it.
        text_tower: what its checkpoints have beside it.
        in_paligemma: PaliGemma's format holds it.

        flops: `flops(config) -> int`: of one image, where counting matrix weights per patch is wrong.
        published: `published(config, transform, head) -> Published`: the tower alone in its library's format, for `vlm
            export --to tower`; without it a tower cannot leave its model. `head` is name in the file -> shape of what
            its checkpoint had beside it, or None for the format without a pooling head.
        tiny: `tiny() -> config`: small enough for tests.
        small: `small(image_size, patch_size, width, depth, heads) -> config`, where a configuration of such numbers is
            not `tiny` with other settings.
        library_name: of the Hub, for a tower alone.
        extra, library: the extra that installs the library it runs on, and a function that imports it.
    """

    title: str
    config: type[Any]
    encoder: type[Any]
    transform: Callable[..., Any]
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    left_out: str
    unused: Callable[[Any], Iterable[str]] = lambda config: ()

    tokens_for: Callable[[Any, int], int] = square_tokens
    any_aspect: bool = False
    grid: Callable[[Any], tuple[int, int]] = square_grid
    extra_tokens: Callable[[Any], int] = lambda config: 0
    members: Callable[[Any], list[tuple[str, Any]]] = lambda config: []
    with_members: Callable[[Any, list[tuple[str, Any]]], Any] | None = None

    blocks: tuple[str, ...] = ()
    block_names: tuple[str, ...] = ()
    norm_names: tuple[str, ...] = ()
    choose: Callable[[Any, int | list[int]], Any] | None = None

    read: Callable[[dict[str, Any]], Any] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    positions: tuple[str, ...] = ()
    resample: Callable[[Tensor, Any], Tensor] = lambda table, config: table
    config_file: str = "config.json"
    weights_file: str = "model.safetensors"
    recognise: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None

    weights: str | None = None
    adopt: Callable[[dict[str, Any], int | None], dict[str, Any]] | None = None
    adopt_positions: Callable[[Tensor, Any], Tensor] | None = None
    text_tower: TextTower | None = None
    in_paligemma: bool = False

    flops: Callable[[Any], int] | None = None
    published: Callable[[Any, Any, Mapping[str, tuple[int, ...]] | None], Published] | None = None
    tiny: Callable[[], Any] = _no_tiny
    small: Callable[[int, int, int, int, int], Any] | None = None
    library_name: str = "transformers"
    extra: str | None = None
    library: Callable[[], Any] = lambda: None

    def read_config(self, values: Mapping[str, Any]) -> Any:
        """The tower's configuration from settings as a checkpoint or another configuration has them."""
        settings = {key: value for key, value in values.items() if key != "model_type"}
        return self.config(**settings) if self.read is None else self.read(settings)

    def image_size(self, config: Any) -> int | None:
        """Side of the square images in pixels; None where images have any aspect ratio."""
        return None if self.any_aspect else int(config.image_size)

    def width(self, config: Any) -> int:
        """Channels of the features."""
        return feature_width(config)

    def chosen_layers(self, config: Any) -> list[int]:
        """The blocks whose outputs are the features, counted from 1; none where it is the whole tower."""
        return chosen_layers(config)

    def choose_layers(self, kind: str, config: Any, layer: int | list[int]) -> Any:
        """The configuration of a tower whose features are the outputs of these blocks (`choose_blocks`), or the tower's
        own way of choosing.

        Raises:
            ConfigError: a tower without this choice, or a layer that it does not have.
        """
        if layer in (-1, [-1]):
            return config
        return choose_blocks(self, kind, config, layer) if self.choose is None else self.choose(config, layer)

    def rename(self, name: str) -> str:
        """One spelling for names that files and versions of transformers spell differently."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def not_read(self, config: Any) -> str:
        """Regular expression of names (after the prefix and `rename`) that the tower does not have: the file's, and
        what lies above its feature layers."""
        patterns = [self.left_out, *(rf"{re.escape(name)}(\.|$)" for name in self.unused(config))]
        if self.chosen_layers(config):
            used = "|".join(map(str, range(config.num_hidden_layers)))
            patterns += [rf"{re.escape(blocks)}(?!({used})\.)\d+\." for blocks in self.block_names]
            if not config.feature_norm:
                patterns += [re.escape(norm) for norm in self.norm_names]
        return "|".join(patterns)


def choose_blocks(spec: Spec, kind: str, config: Any, layer: int | list[int]) -> Any:
    """The configuration of a tower whose features are the outputs of these blocks.

    -1 is the last block followed by the final norm, -2 the one before it without a norm, and so on. A list is
    concatenated along the channels in its order; the norm is applied to -1 only. Blocks above the highest one, and a
    norm that is not applied, are no part of the tower: they would never get a gradient. The result states it in
    `num_hidden_layers`, `feature_layers` (blocks counted from 1) and `feature_norm`.

    Raises:
        ConfigError: a tower without this choice, or a layer that it does not have.
    """
    if not spec.block_names:
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
    chosen = {"num_hidden_layers": max(blocks), "feature_layers": blocks, "feature_norm": -1 in asked}
    return spec.read_config({**values, **chosen})


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
