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

import functools
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.configuration_utils import PreTrainedConfig

from vlm.errors import ConfigError
from vlm.registry import OWN_ENCODERS, kinds, part

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


def model_types(own: str | None = None) -> dict[str, str]:
    """Encoder kind by the `model_type` of the checkpoints that it reads.

    Args:
        own: an encoder of one's own that alone is asked. Without it, those made known in this process (`use`) are read
            too, after the library's: a name that both have is the library's.
    """
    if own in OWN_ENCODERS:
        return {name: own for name in OWN_ENCODERS[own].MODEL_TYPES}
    known = {name: kind for kind in kinds("vlm.encoders") for name in part("vlm.encoders", kind).MODEL_TYPES}
    return {name: kind for kind in OWN_ENCODERS for name in OWN_ENCODERS[kind].MODEL_TYPES} | known


def read_config(kind: str, values: dict[str, Any]) -> PreTrainedConfig:
    """A tower's configuration from settings as a checkpoint or another configuration has them."""
    module = part("vlm.encoders", kind)
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


def missing_extra(library: str, extra: str, error: Exception) -> ConfigError:
    """What to say where a tower needs a library that is not there."""
    return ConfigError(
        f"this tower needs {library}, which cannot be imported ({error}): pip install 'vlm-backbone[{extra}]'"
    )


def count_flops(tower: Any, config: PreTrainedConfig) -> int:
    """Floating-point operations of one image, counted while the tower runs on nothing (meta tensors): 2 per
    multiply-add of matrix products, convolutions and attention.

    Args:
        tower: the `Encoder` class.
    """
    side: Any = getattr(config, "image_size", None)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(config).eval()(torch.empty(1, 3, side, side))
    return int(counter.get_total_flops())


# --- towers of other libraries --------------------------------------------------------------------------------------


def runs(module: nn.Module, method: Callable[..., Any]) -> None:
    """Make a call of the module run this in the place of its `forward`.

    A method that is called past the module goes without its hooks, among them those that bring offloaded parameters in.
    """
    module.forward = method


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


def measured_output(config: Any, features: Tensor) -> EncoderOutput:
    """The features of square images with their grid, if they are what the configuration says was measured.

    Raises:
        ConfigError: another number of patches or channels.
    """
    wanted = (square_tokens(config, config.image_size), feature_width(config))
    if tuple(features.shape[1:]) != wanted:
        raise ConfigError(
            f"the tower gives {tuple(features.shape[1:])} patches and channels, its configuration says {wanted}:"
            f" layout, num_prefix_tokens or patch_size is not the architecture's"
        )
    return square_output(config, features)


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


# --- feature layers -------------------------------------------------------------------------------------------------


def choose_layers(kind: str, config: PreTrainedConfig, layer: int | list[int]) -> PreTrainedConfig:
    """The configuration of a tower whose features are the outputs of these blocks (`choose_blocks`), or the tower's own
    way of choosing.

    Raises:
        ConfigError: a tower without this choice, or a layer that it does not have.
    """
    if layer in (-1, [-1]):
        return config
    module = part("vlm.encoders", kind)
    if hasattr(module, "choose_layers"):
        chosen: PreTrainedConfig = module.choose_layers(config, layer)
        return chosen
    return choose_blocks(kind, config, layer)


def choose_blocks(kind: str, config: PreTrainedConfig, layer: int | list[int]) -> PreTrainedConfig:
    """The configuration of a tower whose features are the outputs of these blocks.

    -1 is the last block followed by the final norm, -2 the one before it without a norm, and so on. A list is
    concatenated along the channels in its order; the norm is applied to -1 only. Blocks above the highest one, and a
    norm that is not applied, are no part of the tower: they would never get a gradient. The result states it in
    `num_hidden_layers`, `feature_layers` (blocks counted from 1) and `feature_norm`.

    Raises:
        ConfigError: a tower without this choice, or a layer that it does not have.
    """
    if not hasattr(part("vlm.encoders", kind), "BLOCKS"):
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
        kind, {**values, "num_hidden_layers": max(blocks), "feature_layers": blocks, "feature_norm": -1 in asked}
    )


def feature_layers(config: Any) -> list[int]:
    """The blocks whose outputs are the features, counted from 1."""
    return list(getattr(config, "feature_layers", None) or [config.num_hidden_layers])


def feature_width(config: Any) -> int:
    """Channels of the features."""
    return int(config.hidden_size) * len(getattr(config, "feature_layers", None) or [0])


def join_layers(config: Any, found: Iterable[Tensor], norm: nn.Module) -> Tensor:
    """Outputs of the chosen blocks, in rising order, as features in the order of the choice; the final norm on the
    highest one where it is chosen."""
    blocks = feature_layers(config)
    outputs = dict(zip(sorted(blocks), found, strict=True))
    if config.feature_norm:
        outputs[max(blocks)] = norm(outputs[max(blocks)])
    return torch.cat([outputs[block] for block in blocks], dim=-1)


def final_norm(config: Any, norm: nn.Module) -> nn.Module:
    """The tower's final norm, or nothing where no feature goes through it."""
    return norm if getattr(config, "feature_norm", True) else nn.Identity()


def hidden_features(config: Any, model: Any, norm: nn.Module | None, prefix: int, **inputs: Tensor) -> Tensor:
    """What `run_blocks` gives, from a model of transformers.

    Args:
        norm: the final norm, where `last_hidden_state` comes without it.
        prefix: class and register tokens before the patches.

    Returns:
        float[M, P, E * number of feature layers].
    """
    if not getattr(config, "feature_layers", None):
        last = model(**inputs).last_hidden_state
        return (last if norm is None else norm(last))[:, prefix:]
    states = list(model(**inputs, output_hidden_states=True).hidden_states)  # the embeddings are the first
    if config.feature_norm:
        own = next(getattr(model, name) for name in ("post_layernorm", "layernorm", "norm") if hasattr(model, name))
        states[config.num_hidden_layers] = own(states[config.num_hidden_layers])
    return torch.cat([states[number] for number in config.feature_layers], dim=-1)[:, prefix:]


def stated(config: PreTrainedConfig, **changes: Any) -> dict[str, Any]:
    """A configuration as a file of transformers states it: every field of the architecture, its choice of feature
    layers too, without those of a running model."""
    values = {key: value for key, value in sorted(config.to_dict().items()) if key not in RUNNING}
    return {**values, **changes}


RUNNING = (
    *("_attn_implementation", "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label"),
    *("is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
    *("torch_dtype", "transformers_version"),
)
"""Fields of every configuration that say nothing of an architecture."""


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
