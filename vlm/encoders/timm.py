"""Any vision transformer or ConvNet of timm (pip install 'vlm-backbone[timm]').

Library: timm (https://github.com/huggingface/pytorch-image-models), which cites the paper of each architecture; the
first: An Image is Worth 16x16 Words (arXiv 2010.11929). Features are timm's `forward_features`: patch tokens without
the `num_prefix_tokens` class and register tokens, or the last stage of a ConvNet with its cells in row order.

Final norm: the one inside `forward_features`, which is `norm` in most transformers. Models that normalise after pooling
(`fc_norm`, or the head of a ConvNeXt) give features without it; `feature_norm` in timm has no say. What only the head
uses is left out: it would never get a gradient.

Another image size goes through timm's own `set_input_size` and, for the position table of a checkpoint,
`resample_abs_pos_embed` (bicubic, antialias). Mean, deviation, filter and crop are those of `pretrained_cfg`.

A configuration names an architecture of timm's registry and plain numbers for it; neither names a file, a module or a
place to download from. timm is imported when a tower is built, never to open this file.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from vlm.encoders._layers import join_layers, runs
from vlm.encoders._libraries import (
    TIMM_BLOCKS,
    check_measured,
    check_whole_cells,
    count_flops,
    missing_extra,
    plain,
    row_order,
    trunk_features,
    unused_names,
    without,
)
from vlm.encoders.contract import EncoderOutput, Published, Spec, check_square, choose_blocks, square_output
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform

__all__ = ["SPEC"]

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
TAKEN = {"in_chans", "features_only", "out_indices", "device", "dtype"}
"""Arguments of timm's models that would change what a model is."""
DROPPED = {"num_classes", "patch_drop_rate"}
"""Of the head, which is left out, and of training that leaves patches out."""


class Config(PreTrainedConfig):
    """A timm architecture and what was measured of it.

    Attributes:
        architecture: a name of timm's registry, such as `vit_base_patch14_dinov2`.
        model_args: arguments of the architecture that differ from its own, plain values only.
        layout: of timm's features: `NLC` (tokens), `NCHW` or `NHWC` (a ConvNet, a Swin).
        patch_size: pixels per cell.
        num_prefix_tokens: class and register tokens before the patches.
        unused: modules that no feature goes through, left out.
        feature_layers, feature_norm: a choice of blocks, as `vlm.encoders.Spec.choose_layers` states it.
        mean, std, interpolation, crop_pct, crop_mode: timm's image transform.
    """

    model_type = "vlm_timm"

    architecture: str = ""
    model_args: Any = None
    layout: str = "NLC"
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_prefix_tokens: int = 1
    unused: Any = None
    feature_layers: Any = None
    feature_norm: bool = True
    mean: Any = (0.5, 0.5, 0.5)
    std: Any = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"


MEASURED = ("layout", "patch_size", "hidden_size", "num_hidden_layers", "num_prefix_tokens", "unused")
IMAGE = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def recognise(values: dict[str, Any]) -> dict[str, Any] | None:
    """The settings in timm's `config.json`, or None when it is not timm's."""
    if not isinstance(values.get("architecture"), str) or not isinstance(values.get("pretrained_cfg"), dict):
        return None
    keys = ("architecture", "pretrained_cfg", "model_args", "feature_layers", "feature_norm")
    return {key: values[key] for key in keys if values.get(key) is not None}


def read_config(values: dict[str, Any]) -> Config:
    """A configuration with its measured numbers: as they are stated, or read off the architecture.

    Args:
        values: those of `Config`; or `architecture` and, where they differ from its own, `model_args`, `image_size` and
            timm's `pretrained_cfg`.

    Raises:
        ConfigError: timm is missing, has no such architecture, or it gives no square grid of features.
    """
    values = dict(values)
    published = values.pop("pretrained_cfg", None)
    if all(key in values for key in MEASURED):
        return Config(**values)
    architecture, args = str(values.get("architecture", "")), _checked_args(values.get("model_args") or {})
    _check_name(architecture)
    published = published or library().get_pretrained_cfg(architecture)
    published = published if isinstance(published, dict) else published.to_dict() if published else {}
    size = values.get("image_size") or args.get("img_size") or published.get("input_size", (3, 224, 224))[-1]
    size = size[0] if isinstance(size, list | tuple) else size
    args.pop("img_size", None)
    image = {key: published[key] for key in IMAGE if published.get(key) is not None}
    start = {**image, **values, "architecture": architecture, "model_args": args, "image_size": int(size)}
    return Config(**{**start, **_measure(Config(**{**start, "feature_layers": None}))})


def library() -> Any:
    """timm.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise missing_extra("timm", "timm", error) from error
    return timm


def _check_name(architecture: str) -> None:
    if not NAME.fullmatch(architecture) or not library().is_model(architecture):
        raise ConfigError(
            f"architecture {architecture!r} is not in timm's registry; `timm.list_models()` lists the names"
            f" (timm {library().__version__})"
        )


def _checked_args(args: Any) -> dict[str, Any]:
    """Arguments of an architecture: plain values, and none that names weights or changes the kind of model."""
    if not isinstance(args, dict):
        raise ConfigError(f"model_args is {type(args).__name__}, expected a map of settings")
    timm = library()
    from timm.models import build_model_with_cfg

    taken = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    for key, value in args.items():
        if key in taken | TAKEN and (key, value) != ("in_chans", 3):
            raise ConfigError(f"model_args.{key} is not an argument of an architecture here; leave it out")
        if not plain(value):
            raise ConfigError(f"model_args.{key} is {value!r}, expected plain values")
    return {key: value for key, value in args.items() if key not in DROPPED}


def make_trunk(config: Config) -> nn.Module:
    """timm's model of a configuration at its image size, without what no feature goes through."""
    _check_name(config.architecture)
    args = _checked_args(config.model_args or {})
    try:
        trunk: Any = library().create_model(config.architecture, pretrained=False, num_classes=0, **args)
        if hasattr(trunk, "set_input_size"):
            trunk.set_input_size(img_size=(config.image_size, config.image_size))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"timm cannot build {config.architecture!r} at {config.image_size} px with {args}: {error}"
        ) from error
    without(trunk, config.unused or ())
    if config.feature_layers:
        trunk.prune_intermediate_layers(
            [block - 1 for block in config.feature_layers], prune_norm=not config.feature_norm
        )
    return trunk


def _measure(config: Config) -> dict[str, Any]:
    """What the features of an architecture look like, without memory for its weights."""
    with torch.device("meta"), torch.enable_grad():
        trunk: Any = make_trunk(config)
        trunk.eval()
        image = torch.empty(1, 3, config.image_size, config.image_size)
        try:
            features = trunk.forward_features(image)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"{config.architecture} does not read {config.image_size} px images: {error}") from error
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise ConfigError(f"{config.architecture} gives no grid of features, and cannot be a vision tower here")
    measured = _of_tokens(trunk, features, config) if features.ndim == 3 else _of_map(trunk, features)
    with torch.enable_grad():  # of the patches alone: what only a class token goes through is unused
        row_order(features, measured["layout"], measured["num_prefix_tokens"]).sum().backward()
    return {**measured, "unused": unused_names(trunk)}


def _of_tokens(trunk: Any, features: Tensor, config: Config) -> dict[str, Any]:
    """A transformer's numbers."""
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if not isinstance(patch, int) or not hasattr(trunk, "blocks"):
        raise ConfigError(f"{config.architecture} gives tokens, but has no patch_embed and blocks that say of what")
    prefix = int(getattr(trunk, "num_prefix_tokens", 0))
    if features.shape[1] - prefix != (config.image_size // patch) ** 2:
        raise ConfigError(
            f"{config.architecture} gives {features.shape[1] - prefix} patch tokens at {config.image_size} px, expected"
            f" one for each patch of {patch} px"
        )
    sizes = {"patch_size": patch, "hidden_size": int(features.shape[2]), "num_hidden_layers": len(trunk.blocks)}
    return {"layout": "NLC", "num_prefix_tokens": prefix, **sizes}


def _of_map(trunk: Any, features: Tensor) -> dict[str, Any]:
    """A ConvNet's numbers; its cells may not divide the image (`check_whole_cells`, when it is built)."""
    layout = str(getattr(trunk, "output_fmt", "NCHW"))
    stages = trunk.feature_info
    sizes = {
        "patch_size": int(stages[-1]["reduction"]),
        "hidden_size": int(features.shape[1 if layout == "NCHW" else 3]),
    }
    return {"layout": layout, "num_prefix_tokens": 0, **sizes, "num_hidden_layers": len(stages)}


def choose_layers(config: Config, layer: int | list[int]) -> PreTrainedConfig:
    """Blocks of a transformer.

    Raises:
        ConfigError: a ConvNet, whose stages have different grids.
    """
    if config.layout != "NLC":
        raise ConfigError(f"layer={layer}: {config.architecture} gives its last stage only; leave it out")
    return choose_blocks(SPEC, "timm", config, layer)


def resample(table: Tensor, config: Config) -> Tensor:
    """float[1, prefix + n, E] to the configuration's image size, as timm does it."""
    from timm.layers import resample_abs_pos_embed

    rows = config.image_size // config.patch_size
    patches = math.isqrt(table.shape[1]) ** 2
    prefix = 0 if patches == table.shape[1] else config.num_prefix_tokens
    resampled: Tensor = resample_abs_pos_embed(table, [rows, rows], num_prefix_tokens=prefix)
    return resampled


class Encoder(PreTrainedModel):
    """Features of a timm model."""

    config_class = Config
    config: Config
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.trunk = make_trunk(config)
        check_whole_cells(config, config.architecture)
        runs(self.trunk, trunk_features(self.trunk, config))
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls, *args: Any) -> bool:
        return True  # timm chooses its own; there is nothing that a backend could change

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """timm initialises its models itself."""

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode images.

        Args:
            pixel_values: float[M, 3, H, W] with H = W = `config.image_size`.

        Raises:
            ConfigError: images of another size.
        """
        check_square(self.config, pixel_values, "timm")
        return square_output(self.config, check_measured(self.config, self.features(pixel_values.to(self.dtype))))

    def features(self, pixel_values: Tensor) -> Tensor:
        """float[M, 3, H, W] -> float[M, P, E]."""
        if self.config.feature_layers:
            return self._blocks(pixel_values)
        features: Tensor = self.trunk(pixel_values)
        return row_order(features, self.config.layout, self.config.num_prefix_tokens)

    def _blocks(self, pixel_values: Tensor) -> Tensor:
        """Outputs of the chosen blocks, in their order; the final norm on the last one where it is chosen."""

        trunk: Any = self.trunk
        return join_layers(self.config, trunk(pixel_values), trunk.norm)


def flops(config: Config) -> int:
    """Of one image, class and register tokens included."""
    return count_flops(Encoder, config)


def transform(config: Config, **settings: Any) -> ImageTransform:
    """timm's evaluation transform: `crop_mode` center resizes the shorter side to size / crop_pct, squash the whole
    image to the square.

    Raises:
        ConfigError: another way to a square (`border`, or squash with a part cut off) and no `mode` in its place.
    """
    values: dict[str, Any] = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "resample": config.interpolation,
        "mean": tuple(config.mean),
        "std": tuple(config.std),
        **settings,
    }
    if "mode" not in values:
        squash = config.crop_mode == "squash" and config.crop_pct == 1
        if not squash and config.crop_mode != "center":
            raise ConfigError(
                f"timm's crop_mode {config.crop_mode!r} with crop_pct {config.crop_pct} is not known here; choose"
                f" image.mode: squash, crop or letterbox"
            )
        values["mode"] = "squash" if squash else "crop"
    if values["mode"] == "crop":
        values.setdefault("resize_shortest", max(config.image_size, math.floor(config.image_size / config.crop_pct)))
    return ImageTransform(**values)


def published(config: Config, transform: ImageTransform, head: Mapping[str, tuple[int, ...]] | None) -> Published:
    """As timm writes a model without classifier for the Hub (`save_for_hf`); its attention pool and other modules that
    no patch feature goes through are the checkpoint's, or new.

    Raises:
        ConfigError: an architecture whose number of blocks cannot be set, cut at its feature layers.
    """
    args = {**(config.model_args or {}), "num_classes": 0}
    if config.feature_layers:
        args["depth"] = config.num_hidden_layers
    whole: Any = _whole(config, args)
    if hasattr(whole, "set_input_size"):
        args["img_size"] = config.image_size
    image: dict[str, Any] = {
        "mean": list(transform.mean),
        "std": list(transform.std),
        "interpolation": transform.resample,
    }
    crop = transform.image_size or 1, transform.resize_shortest or transform.image_size or 1
    image |= {"crop_pct": crop[0] / crop[1], "crop_mode": "squash" if transform.mode == "squash" else "center"}
    side = config.image_size
    values = {
        "architecture": config.architecture,
        "num_classes": 0,
        "num_features": int(whole.num_features),
        "model_args": args,
        "feature_layers": config.feature_layers,
        "feature_norm": config.feature_norm,
        "pretrained_cfg": {**image, "num_classes": 0, "input_size": [3, side, side], "fixed_input_size": True},
    }

    def features(model: Any, pixel_values: Tensor) -> Tensor:
        if config.feature_layers:
            return join_layers(config, trunk_features(model, config)(pixel_values), model.norm)
        return row_order(model.forward_features(pixel_values), config.layout, config.num_prefix_tokens)

    return Published(
        architecture=f"timm.create_model {config.architecture}",
        config=values,
        rename=lambda name: name.removeprefix("trunk."),
        build=lambda: _whole(config, args),
        features=features,
        transformers=False,
        opened=lambda folder: library().create_model(f"local-dir:{folder}", pretrained=True),
    )


def _whole(config: Config, args: dict[str, Any]) -> nn.Module:
    """timm's model with all its modules, at the configuration's image size."""
    try:
        made: Any = library().create_model(config.architecture, pretrained=False, **args)
        if hasattr(made, "set_input_size"):
            made.set_input_size(img_size=(config.image_size, config.image_size))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"timm cannot build {config.architecture!r} with {args}: {error}; the tower cannot leave its model. Keep"
            f" the vlm directory, which `vlm new --encoder` reads"
        ) from error
    return made


def tiny() -> Config:
    """A transformer of 28x28 px, patch 14, 4 patches, a class token and two registers."""
    return small(28, 14, 32, 2, 4)


def small(image_size: int, patch_size: int, width: int, depth: int, heads: int) -> Config:
    """A vision transformer of these numbers."""
    args = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": 2}
    values = {"architecture": "vit_tiny_patch16_224", "model_args": {**args, "reg_tokens": 2}}
    return read_config({**values, "image_size": image_size})


SPEC = Spec(
    title="timm",
    config=Config,
    encoder=Encoder,
    transform=transform,
    model_types=("vlm_timm",),
    prefixes=("",),
    left_out=r"((head|head_dist|fc|classifier|last_linear|fc_norm|attn_pool)\.|.*\.num_batches_tracked$)",
    unused=lambda config: config.unused or (),
    extra_tokens=lambda config: int(config.num_prefix_tokens),
    blocks=TIMM_BLOCKS,
    block_names=("blocks.",),
    norm_names=("norm.",),
    choose=choose_layers,
    read=read_config,
    renames=((r"^trunk\.", ""),),
    positions=("trunk.pos_embed",),
    resample=resample,
    recognise=recognise,
    flops=flops,
    published=published,
    tiny=tiny,
    small=small,
    library_name="timm",
    extra="timm",
    library=library,
)
