"""Visual towers of open_clip models (pip install 'vlm-backbone[open-clip]').

Paper: Reproducible Scaling Laws for Contrastive Language-Image Learning (arXiv 2212.07143). Library: open_clip
(https://github.com/mlfoundations/open_clip). Three kinds of towers: its own vision transformer, its ResNets, and models
of timm inside it (SigLIP, EVA-02, PE). Features are patch tokens without class and register tokens, or the cells of the
last stage of a ConvNet in row order.

Final norm of `layer=-1`: `ln_post` on every patch (the library applies it to the pooled token alone where
`final_ln_after_pool` says so), `norm` inside a timm model, none in ResNets and where an attentional pool comes first
(CoCa). Pooling, projection and what else no feature goes through is left out.

Another image size resamples the position table as the library does when it loads a checkpoint: bicubic, half-pixel
centres, antialias; the class token's row stays.

A configuration holds open_clip's `vision_cfg`; a timm model in it must be of timm's registry and is never downloaded.
open_clip is imported when a tower is built, never to open this file.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from vlm.encoders._layers import feature_layers, join_layers, runs
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
from vlm.encoders._positions import resample_after
from vlm.encoders.contract import (
    EncoderOutput,
    Published,
    Spec,
    check_square,
    choose_blocks,
    square_grid,
    square_output,
)
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform

__all__ = ["SPEC"]

CONFIG_FILE = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's training images, the library's default."""
MODES = {"shortest": "crop", "longest": "letterbox", "squash": "squash"}
"""Our image modes by open_clip's `resize_mode`."""


class Config(PreTrainedConfig):
    """An open_clip tower and what was measured of it.

    Attributes:
        vision_cfg: open_clip's own settings of the tower.
        embed_dim, quick_gelu: of the whole model, as open_clip's `model_cfg` says them.
        layout: of the features: `NLC` (tokens), `NCHW` or `NHWC`.
        patch_size: pixels per cell.
        num_prefix_tokens: class and register tokens before the patches.
        unused: modules and parameters that no feature goes through, left out.
        feature_layers, feature_norm: a choice of blocks, as `vlm.encoders.Spec.choose_layers` states it.
        mean, std, interpolation, resize_mode, fill_color: open_clip's `preprocess_cfg`.
    """

    model_type = "vlm_open_clip"

    vision_cfg: Any = None
    embed_dim: int = 512
    quick_gelu: bool = False
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
    mean: Any = MEAN
    std: Any = STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: Any = 0


MEASURED = ("layout", "patch_size", "hidden_size", "num_hidden_layers", "num_prefix_tokens", "unused")
IMAGE = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def recognise(values: dict[str, Any]) -> dict[str, Any] | None:
    """The settings in `open_clip_config.json`, or None when it has no vision tower."""
    model, image = values.get("model_cfg"), values.get("preprocess_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        return None
    settings = {key: model[key] for key in ("vision_cfg", "embed_dim", "quick_gelu") if key in model}
    given = image if isinstance(image, dict) else {}
    settings |= {key: values[key] for key in ("feature_layers", "feature_norm") if values.get(key) is not None}
    return {**settings, **{key: given[key] for key in IMAGE if given.get(key) is not None}}


def read_config(values: dict[str, Any]) -> Config:
    """A configuration with its measured numbers: as they are stated, or read off the tower.

    Args:
        values: those of `Config`; or `vision_cfg`, `embed_dim` and, where they differ, `quick_gelu`, `image_size` and
            the settings of the image transform.

    Raises:
        ConfigError: open_clip is missing, does not know a setting, or the tower gives no square grid of features.
    """
    values = dict(values)
    if all(key in values for key in MEASURED):
        return Config(**values)
    size = values.get("image_size") or (values.get("vision_cfg") or {}).get("image_size", 224)
    size = size[0] if isinstance(size, list | tuple) else size
    config = Config(**{**values, "image_size": size, "feature_layers": None})  # of the whole tower
    return Config(**{**values, "image_size": size, **_measure(config)})


def library() -> Any:
    """open_clip.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        import open_clip
        import open_clip.model
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise missing_extra("open_clip", "open-clip", error) from error
    return open_clip


def checked(vision_cfg: Any) -> dict[str, Any]:
    """`vision_cfg` with known settings of plain values, and nothing to download.

    Raises:
        ConfigError: names the setting.
    """
    known = [field.name for field in fields(library().model.CLIPVisionCfg)]
    if not isinstance(vision_cfg, dict):
        raise ConfigError(f"vision_cfg is {type(vision_cfg).__name__}, expected open_clip's map of settings")
    for key, value in vision_cfg.items():
        if key not in known or not plain(value):
            raise ConfigError(f"vision_cfg.{key} is {value!r}; open_clip knows {', '.join(known)}, of plain values")
    name = vision_cfg.get("timm_model_name")
    if name is not None:
        import timm

        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", str(name)) or not timm.is_model(name):
            raise ConfigError(
                f"vision_cfg.timm_model_name {name!r} is not in timm's registry (timm {timm.__version__})"
            )
    return {**vision_cfg, "timm_model_pretrained": False, "patch_dropout": 0.0}


def make_visual(config: Config) -> nn.Module:
    """open_clip's tower of a configuration at its image size, without what no feature goes through."""
    settings = {**checked(config.vision_cfg), "image_size": config.image_size}
    try:
        visual: Any = library().model._build_vision_tower(config.embed_dim, settings, bool(config.quick_gelu))
        if hasattr(getattr(visual, "trunk", None), "set_input_size"):
            visual.trunk.set_input_size(img_size=(config.image_size, config.image_size))
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"open_clip cannot build a tower of {settings}: {error}") from error
    without(visual, config.unused or ())
    if config.feature_layers:
        indices = [block - 1 for block in config.feature_layers]
        getattr(visual, "trunk", visual).prune_intermediate_layers(indices, prune_norm=not config.feature_norm)
    return visual


def _has_norm(visual: Any) -> bool:
    """Whether `ln_post` is a norm of the blocks' outputs: an attentional pool comes before it."""
    return getattr(visual, "attn_pool", None) is None


def raw_features(visual: Any, pixel_values: Tensor) -> Tensor:
    """What the tower gives before pooling, in its own layout: the last block, with its norm."""
    if hasattr(visual, "trunk"):
        features: Tensor = visual.trunk.forward_features(pixel_values)
    elif hasattr(visual, "layer4"):
        features = visual.stem(pixel_values)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            features = stage(features)
    else:
        features = visual.transformer(visual._embeds(pixel_values))
        features = visual.ln_post(features) if _has_norm(visual) else features
    return features


def _measure(config: Config) -> dict[str, Any]:
    """What the features of a tower look like, without memory for its weights."""
    with torch.device("meta"), torch.enable_grad():
        visual: Any = make_visual(config)
        visual.eval()
        try:
            features = raw_features(visual, torch.empty(1, 3, config.image_size, config.image_size))
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"the tower does not read {config.image_size} px images: {error}") from error
    trunk = getattr(visual, "trunk", visual)
    if features.ndim == 3:
        layout, prefix = "NLC", int(trunk.num_prefix_tokens) if trunk is not visual else 1
        width, side = features.shape[2], math.isqrt(features.shape[1] - prefix)
        square = side * side == features.shape[1] - prefix
        sizes = trunk.patch_embed.patch_size if trunk is not visual else visual.patch_size
        patch, depth = int(sizes[0]), len(trunk.blocks if trunk is not visual else visual.transformer.resblocks)
    else:
        layout, prefix = str(getattr(trunk, "output_fmt", "NCHW")), 0
        sides = features.shape[2:] if layout == "NCHW" else features.shape[1:3]
        width, side, square = features.shape[1 if layout == "NCHW" else 3], int(sides[0]), len(set(sides)) == 1
        patch, depth = int(trunk.feature_info[-1]["reduction"]) if trunk is not visual else 32, 4
    if not square or side != config.image_size // patch:
        raise ConfigError(
            f"the tower gives {tuple(features.shape)} at {config.image_size} px, which is no square grid of cells of"
            f" {patch} px; take a multiple of {patch} as image_size"
        )
    with torch.enable_grad():  # of the patches alone: what only a class token goes through is unused
        row_order(features, layout, prefix).sum().backward()
    measured = (layout, patch, int(width), depth, prefix, unused_names(visual))
    return dict(zip(MEASURED, measured, strict=True))


def choose_layers(config: Config, layer: int | list[int]) -> PreTrainedConfig:
    """Blocks of a transformer.

    Raises:
        ConfigError: a ConvNet, whose stages have different grids.
    """
    if config.layout != "NLC":
        raise ConfigError(f"layer={layer}: an open_clip ConvNet gives its last stage only; leave it out")
    return choose_blocks(SPEC, "open_clip", config, layer)


def resample(table: Tensor, config: Config) -> Tensor:
    """float[1 + n, E], or a timm model's float[1, prefix + n, E], to the configuration's image size."""
    line = table if table.ndim == 2 else table[0]
    prefix = 0 if math.isqrt(len(line)) ** 2 == len(line) else config.num_prefix_tokens
    line = resample_after(line, prefix, square_grid(config)[0], smooth=True)
    return line if table.ndim == 2 else line[None]


class Encoder(PreTrainedModel):
    """Features of an open_clip tower."""

    config_class = Config
    config: Config
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.visual = make_visual(config)
        check_whole_cells(config, "the open_clip tower")
        visual: Any = self.visual
        if hasattr(visual, "trunk"):
            runs(visual.trunk, trunk_features(visual.trunk, config))
            runs(visual, functools.partial(_through_trunk, visual))
        else:
            runs(visual, features_of(visual, config))
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls, *args: Any) -> bool:
        return True  # the library has its own attention; there is nothing that a backend could change

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """open_clip initialises its towers itself."""

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode images.

        Args:
            pixel_values: float[M, 3, H, W] with H = W = `config.image_size`.

        Raises:
            ConfigError: images of another size.
        """
        check_square(self.config, pixel_values, "open_clip")
        pixel_values = pixel_values.to(self.dtype)
        if self.config.feature_layers:
            return square_output(self.config, check_measured(self.config, self._blocks(pixel_values)))
        features = row_order(self.visual(pixel_values), self.config.layout, self.config.num_prefix_tokens)
        return square_output(self.config, check_measured(self.config, features))

    def _blocks(self, pixel_values: Tensor) -> Tensor:
        """Outputs of the chosen blocks, in their order; the final norm on the last one where it is chosen."""
        visual: Any = self.visual
        found = visual(pixel_values)
        return _joined(visual, self.config, found)


def _joined(visual: Any, config: Config, found: Any) -> Tensor:
    """float[M, P, E * number of feature layers], of what `features_of` or `trunk_features` gives."""
    if hasattr(visual, "trunk"):
        norm = getattr(visual.trunk, "norm", nn.Identity())
    else:
        found = found["image_intermediates"]
        norm = visual.ln_post if _has_norm(visual) else nn.Identity()
    return join_layers(config, found, norm)


def features_of(visual: Any, config: Config) -> Callable[[Tensor], Any]:
    """What a call of the tower has to run: its features, or the outputs of the chosen blocks in rising order."""
    if not config.feature_layers:
        return functools.partial(raw_features, visual)
    indices = [block - 1 for block in feature_layers(config)]
    return functools.partial(visual.forward_intermediates, indices=indices, output_fmt="NLC", intermediates_only=True)


def _through_trunk(visual: Any, pixel_values: Tensor) -> Any:
    return visual.trunk(pixel_values)


def flops(config: Config) -> int:
    """Of one image, class and register tokens included."""
    return count_flops(Encoder, config)


def transform(config: Config, **settings: Any) -> ImageTransform:
    """open_clip's evaluation transform: `resize_mode` shortest crops the middle, longest pads, squash does neither.

    Raises:
        ConfigError: an unknown `resize_mode`.
    """
    if config.resize_mode not in MODES:
        raise ConfigError(f"open_clip's resize_mode is {config.resize_mode!r}, known: {', '.join(MODES)}")
    fill = config.fill_color
    values = {
        "mode": MODES[config.resize_mode],
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "resample": "bilinear" if config.interpolation == "bilinear" else "bicubic",  # as the library reads it
        "mean": tuple(config.mean),
        "std": tuple(config.std),
    }
    if values["mode"] == "letterbox":
        values["background"] = tuple(fill) if isinstance(fill, list | tuple) else (fill,) * 3
    return ImageTransform(**{**values, **settings})


def published(config: Config, transform: ImageTransform, head: Mapping[str, tuple[int, ...]] | None) -> Published:
    """As the visual part of an open_clip checkpoint: `open_clip_config.json` and tensors under `visual.`. The library
    has no format for a tower alone; this one goes into a whole model with `model.visual.load_state_dict`. Pools and
    projection are the checkpoint's, or new.

    Raises:
        ConfigError: a timm model cut at its feature layers, whose number of blocks open_clip cannot set.
    """
    vision = dict(config.vision_cfg)
    if config.feature_layers:
        if vision.get("timm_model_name"):
            raise ConfigError(
                f"the tower is a timm model inside open_clip, cut at block {config.num_hidden_layers}, which open_clip"
                f" cannot say; keep the vlm directory, which `vlm new --encoder` reads"
            )
        vision["layers"] = config.num_hidden_layers
    vision["image_size"] = config.image_size
    modes = {ours: theirs for theirs, ours in MODES.items()}
    background = [int(value) for value in transform.background]
    image = {"size": config.image_size, "mean": list(transform.mean), "std": list(transform.std)}
    image |= {"interpolation": transform.resample, "resize_mode": modes.get(transform.mode, "squash")}
    image["fill_color"] = background[0] if len(set(background)) == 1 else background
    model = {"embed_dim": config.embed_dim, "quick_gelu": bool(config.quick_gelu), "vision_cfg": vision}
    choice = {"feature_layers": config.feature_layers, "feature_norm": config.feature_norm}

    def build() -> nn.Module:
        settings = checked(vision)
        visual: Any = library().model._build_vision_tower(config.embed_dim, settings, bool(config.quick_gelu))
        if hasattr(getattr(visual, "trunk", None), "set_input_size"):
            visual.trunk.set_input_size(img_size=(config.image_size, config.image_size))
        holder = nn.Module()
        holder.visual = visual
        return holder

    def features(model: Any, pixel_values: Tensor) -> Tensor:
        if config.feature_layers:
            inner = getattr(model.visual, "trunk", None)
            run = features_of(model.visual, config) if inner is None else trunk_features(inner, config)
            return _joined(model.visual, config, run(pixel_values))
        return row_order(raw_features(model.visual, pixel_values), config.layout, config.num_prefix_tokens)

    return Published(
        architecture="open_clip visual tower",
        config={"model_cfg": model, "preprocess_cfg": image, **choice},
        rename=str,
        build=build,
        features=features,
        config_file=CONFIG_FILE,
        weights=WEIGHTS,
        transformers=False,
    )


def tiny() -> Config:
    """A transformer of 28x28 px, patch 14, 4 patches."""
    return small(28, 14, 32, 2, 4)


def small(image_size: int, patch_size: int, width: int, depth: int, heads: int) -> Config:
    """A vision transformer of these numbers."""
    settings: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size, "width": width, "layers": depth}
    settings |= {"head_width": width // heads, "mlp_ratio": 2.0}
    return read_config({"vision_cfg": settings, "embed_dim": width})


SPEC = Spec(
    title="open_clip",
    config=Config,
    encoder=Encoder,
    transform=transform,
    model_types=("vlm_open_clip",),
    prefixes=("visual.",),
    left_out=r".*\.num_batches_tracked$",
    unused=lambda config: config.unused or (),
    extra_tokens=lambda config: int(config.num_prefix_tokens),
    blocks=("ResidualAttentionBlock", *TIMM_BLOCKS),
    block_names=("transformer.resblocks.", "trunk.blocks."),
    norm_names=("ln_post.", "trunk.norm."),
    choose=choose_layers,
    read=read_config,
    renames=((r"^visual\.", ""),),
    positions=("visual.positional_embedding", "visual.trunk.pos_embed"),
    resample=resample,
    config_file=CONFIG_FILE,
    weights_file=WEIGHTS,
    recognise=recognise,
    flops=flops,
    published=published,
    tiny=tiny,
    small=small,
    library_name="open_clip",
    extra="open-clip",
    library=library,
)
