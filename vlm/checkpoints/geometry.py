"""A trained model in another geometry: its image size, patch budget, feature layer or projector.

One function, `with_geometry`, is behind `vlm new --from`, the settings of a training stage, and `--image-size` of the
commands that run a model. What a change does not concern stays bit for bit; a position table is resampled as the
tower's file says, which for SigLIP is what big_vision does when it loads a checkpoint (PaliGemma's own stages 2 and 3);
another projector has new weights.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints.configs import NOTES
from vlm.checkpoints.loader import Source, check_fit, empty, expected_shapes, put
from vlm.checkpoints.names import PROJECTOR, TOWER
from vlm.checkpoints.parts import as_tower
from vlm.encoders._layers import feature_layers, feature_width
from vlm.errors import ConfigError, nearest
from vlm.images.fused import FusedTransform, one_view
from vlm.images.transforms import ImageTransform
from vlm.model import projecting
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM
from vlm.model.parts import choose_layers
from vlm.model.processor import Processor
from vlm.registry import part

logger = logging.getLogger(__name__)

SETTINGS = ("image_size", "image", "layer", "projector", "encoder_kind")
"""What can be changed, by the names that `vlm.new` and a run's YAML have for it."""
NAFLEX, SQUARES = "siglip2_naflex", "siglip"
"""The two ways of reading SigLIP's weights."""


class Tower(NamedTuple):
    """A vision tower without its weights.

    Attributes:
        kind: the encoder's kind.
        config: its configuration.
        transform: its image transform.
    """

    kind: str
    config: Any
    transform: ImageTransform


def with_geometry(
    model: VLM,
    processor: Processor,
    *,
    image_size: int | list[int] | None = None,
    image: dict[str, Any] | None = None,
    layer: int | list[int] | None = None,
    projector: str | dict[str, Any] | None = None,
    encoder_kind: str | None = None,
    seed: int = 0,
) -> tuple[VLM, Processor]:
    """The same model in another geometry; the model given is not changed, and weights are shared, not copied.

    Args:
        image_size: side of the square images in pixels; the position table is resampled. For a fused tower a list, one
            for each member.
        image: settings of the image transform to change, such as `{"max_num_patches": 1024}` of a NaFlex tower.
        layer: feature layer, as for `vlm.new`; blocks above it leave the model.
        projector: another projector, or other settings of the same kind: its weights are new (a linear one starts at
            zero), and a warning says so. The settings that the model has are no change.
        encoder_kind: `siglip2_naflex` reads a SigLIP tower at any aspect ratio from now on, `siglip` a NaFlex one in
            squares: the same function at the image size, to rounding.
        seed: of a new projector's weights.

    Returns:
        (model in eval mode, processor), or those given where nothing changes.

    Raises:
        ConfigError: a change that this model cannot have, such as a feature layer that is wider than its projector.
    """
    config, transform = planned(
        model.config,
        processor.image_transform,
        image_size=image_size,
        image=image,
        layer=layer,
        projector=projector,
        encoder_kind=encoder_kind,
    )
    if config is model.config and transform == processor.image_transform:
        return model, processor
    if config is not model.config:
        model = _rebuilt(model, config, seed)
    return model, Processor(processor.tokenizer, transform, config.projector_config)


def planned(
    config: VLMConfig,
    transform: ImageTransform,
    *,
    image_size: int | list[int] | None = None,
    image: dict[str, Any] | None = None,
    layer: int | list[int] | None = None,
    projector: str | dict[str, Any] | None = None,
    encoder_kind: str | None = None,
) -> tuple[VLMConfig, ImageTransform]:
    """The configuration and image transform that `with_geometry` makes; no weight is needed.

    Raises:
        ConfigError: as `with_geometry`.
    """
    before = Tower(config.encoder, config.vision_config, transform)
    after = change_tower(before, image_size=image_size, image=image, layer=layer, encoder_kind=encoder_kind)
    wanted = config.projector_config if projector is None else projector
    wanted = {"kind": wanted} if isinstance(wanted, str) else dict(wanted)
    same = projecting.full_settings(wanted) == projecting.full_settings(config.projector_config)
    width, old = feature_width(after.config), feature_width(config.vision_config)
    if same and width != old:
        raise ConfigError(
            f"layer={layer}: the features would be {width} wide, the model's projector reads {old}; choose as many"
            f" layers as before, or give another projector, which starts with new weights"
        )
    if after.config is config.vision_config and same:
        return config, after.transform
    changed = copy.deepcopy(config)
    changed.encoder, changed.vision_config = after.kind, after.config
    changed.projector_config = config.projector_config if same else wanted
    _check_context(changed, after.transform)
    return changed, after.transform


def change_tower(
    tower: Tower,
    *,
    image_size: int | list[int] | None = None,
    image: dict[str, Any] | None = None,
    layer: int | list[int] | None = None,
    encoder_kind: str | None = None,
    name: str = "the model's tower",
) -> Tower:
    """A tower's configuration and image transform in another geometry; the arguments are those of `with_geometry`.

    Raises:
        ConfigError: a change that this tower cannot have.
    """
    kind, config, transform = tower
    if encoder_kind not in (None, kind):
        config = read_as(config, kind, str(encoder_kind), name, image_size)
        transform = _transform_as(transform, str(encoder_kind), config)
        kind = str(encoder_kind)
    if image_size is not None:
        resized = copy.deepcopy(config)
        set_image_size(resized, kind, image_size)
        config = config if _sizes(resized) == _sizes(config) else resized
    if layer is not None:
        config = _with_layer(kind, config, layer)
    if config is not tower.config:
        config._attn_implementation = tower.config._attn_implementation
    return Tower(kind, config, change_transform(transform, kind, config, image or {}))


def _with_layer(kind: str, config: Any, layer: int | list[int]) -> Any:
    """The configuration with another choice of feature layers.

    Raises:
        ConfigError: blocks or a norm that this model has given up.
    """
    towers = [member for _, member in getattr(config, "towers", ())]
    chosen = next((one for one in towers or [config] if getattr(one, "feature_layers", None)), None)
    if chosen is None:
        return choose_layers(kind, config, layer)
    blocks = ", ".join(map(str, feature_layers(chosen)))
    raise ConfigError(
        f"layer={layer}: this model's features are the outputs of block {blocks} of {chosen.num_hidden_layers}"
        f"{'' if chosen.feature_norm else ', without the final norm'}; what it does not use is no part of it, so the"
        f" choice cannot be changed: build the model anew from its tower's checkpoint"
    )


# --- image size -------------------------------------------------------------------------------------------------------


def set_image_size(config: Any, kind: str, image_size: int | list[int] | None) -> None:
    """Give a tower's configuration another image size, and warn of pixels that it would never see.

    Args:
        image_size: in pixels; None leaves it. For a fused tower, one for each member.

    Raises:
        ConfigError: a tower of any aspect ratio, a fused tower without a size for each member, or no size.
    """
    if getattr(config, "towers", None):
        _set_member_sizes(config, image_size)
        return
    if not hasattr(config, "image_size"):
        if image_size is not None:
            shown = image_size if isinstance(image_size, int) else config.patch_size
            raise ConfigError(
                f"image_size={image_size}: a {kind} tower takes images of any size; set its budget,"
                f' image={{"max_num_patches": {max(1, shown // config.patch_size) ** 2}}} (--max-num-patches)'
            )
        return
    if image_size is not None:
        patch = config.patch_size
        if isinstance(image_size, list) and len(image_size) == 1:
            image_size = image_size[0]
        if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < patch:
            raise ConfigError(f"image_size is {image_size!r}, expected a whole number from {patch}, a patch, upwards")
        config.image_size = image_size
    say_unseen(config)


def _set_member_sizes(config: Any, image_size: int | list[int] | None) -> None:
    towers = config.towers
    if image_size is None:
        for _, member in towers:
            say_unseen(member)
        return
    sizes = image_size if isinstance(image_size, list) else [image_size]
    if len(sizes) != len(towers):
        now = ", ".join(f"{kind} {member.image_size}" for kind, member in towers)
        raise ConfigError(
            f"image_size={image_size}: each member of a fused tower has its own ({now}); give {len(towers)} sizes, one"
            f" for each, or build it from the members: A@{sizes[0]}+B@{sizes[0]}"
        )
    for (kind, member), size in zip(towers, sizes, strict=True):
        set_image_size(member, kind, size)
    made = part("vlm.encoders", "fused").fuse(towers, config.grid if config.resample else None, config.resample)
    config.members, config.grid = made.members, made.grid


def _sizes(config: Any) -> list[Any]:
    towers = [member for _, member in getattr(config, "towers", ())]
    return [getattr(member, "image_size", None) for member in towers or [config]]


def say_unseen(config: Any) -> None:
    """Warn where the last pixels of an image make no whole patch."""
    patch, unseen = config.patch_size, config.image_size % config.patch_size
    if unseen:
        lower = config.image_size - unseen
        logger.warning(
            "image_size %d is no multiple of the patch size %d: the last %d pixels of each side are never seen;"
            " %d or %d uses every pixel",
            *(config.image_size, patch, unseen, lower, lower + patch),
        )


# --- squares and NaFlex -----------------------------------------------------------------------------------------------


def read_as(
    full: PreTrainedConfig, source: str, kind: str, name: str, image_size: int | list[int] | None = None
) -> Any:
    """The configuration of a SigLIP tower read as the other kind: squares as NaFlex, or NaFlex as squares.

    Args:
        full: the tower's configuration, of kind `source`.
        image_size: of the squares; None: those whose patches are the position table's.

    Raises:
        ConfigError: other kinds, or a tower of which only some layers are there.
    """
    if {source, kind} != {SQUARES, NAFLEX}:
        raise ConfigError(
            f"{name} is a {source!r} tower and cannot be read as {kind!r}; only siglip -> siglip2_naflex is possible,"
            f" and back"
        )
    values: Any = full.to_dict()
    if values.get("feature_layers"):
        raise ConfigError(
            f"{name} gives other layers than the last, which a {kind} tower cannot; leave the kind as it is"
        )
    settings = {
        key: value for key, value in values.items() if key not in (*NOTES, "model_type", "image_size", "num_patches")
    }
    if kind == NAFLEX:
        settings["num_patches"] = (values["image_size"] // values["patch_size"]) ** 2
    else:
        own = math.isqrt(values["num_patches"]) * values["patch_size"]
        settings["image_size"] = image_size if isinstance(image_size, int) else own
    return part("vlm.encoders", kind).Config(**settings)


def _transform_as(transform: ImageTransform, kind: str, config: Any) -> ImageTransform:
    """Normalisation and background stay, the geometry is the other kind's. A NaFlex tower gets as many patches as its
    squares had."""
    kept: dict[str, Any] = {"mean": transform.mean, "std": transform.std, "background": transform.background}
    if kind == NAFLEX:
        kept["max_num_patches"] = transform.max_patches
    made: ImageTransform = part("vlm.encoders", kind).transform(config, **kept)
    return made


# --- the image transform ----------------------------------------------------------------------------------------------


def known_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an image transform, if all are known.

    Raises:
        ConfigError: names the unknown one and the nearest.
    """
    known = [field.name for field in fields(ImageTransform)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"unknown image setting {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    return settings


def check_settings(settings: dict[str, Any], config: Any) -> None:
    """Refuse image settings that are the tower's, or that it does not have.

    Raises:
        ConfigError: with what to set instead.
    """
    for key, value in known_settings(settings).items():
        own = getattr(config, key, value) if key in ("image_size", "patch_size") else value
        if own != value:
            advice = f"use image_size={value}, which resamples the tower" if key == "image_size" else "leave it out"
            raise ConfigError(f"image setting {key} is {value!r}, the tower has {own}; {advice}")
    if "max_num_patches" in settings and hasattr(config, "image_size"):
        raise ConfigError(
            f"max_num_patches is a budget of NaFlex towers; this one reads squares of {config.image_size} px: use"
            f" image_size, or read it as encoder_kind='siglip2_naflex'"
        )


def change_transform(transform: ImageTransform, kind: str, config: Any, settings: dict[str, Any]) -> ImageTransform:
    """An image transform at its tower's size, with these settings changed.

    Raises:
        ConfigError: settings that the tower cannot have.
    """
    if isinstance(transform, FusedTransform):
        towers = config.towers
        members = [_at_size(one, member) for one, (_, member) in zip(transform.members, towers, strict=True)]
        known_settings(settings)
        return FusedTransform.of(one_view(members, settings), tuple(config.grid))
    check_settings(settings, config)
    mode = settings.get("mode", transform.mode)
    if (mode == "naflex") != (kind == NAFLEX):
        raise ConfigError(
            f"image mode {mode!r} does not fit a {kind} tower; a SigLIP tower is read the other way with encoder_kind"
            f" ({NAFLEX} or {SQUARES})"
        )
    changes = dict(settings)
    if mode != "crop":
        changes.setdefault("resize_shortest", None)
    return replace(_at_size(transform, config), **changes)


def _at_size(transform: ImageTransform, config: Any) -> ImageTransform:
    """The transform with the tower's image size; a crop keeps its proportion."""
    size, old = getattr(config, "image_size", None), transform.image_size
    if size is None or size == old or old is None:
        return transform
    shortest = transform.resize_shortest
    if shortest is not None:
        shortest = max(size, round(size * shortest / old))
    return replace(transform, image_size=size, resize_shortest=shortest)


def recorded(transform: ImageTransform, config: Any) -> dict[str, Any]:
    """An image transform as settings of its encoder's `transform`, at the tower's image size."""
    own = _at_size(transform, config)
    names = [field.name for field in fields(ImageTransform) if field.name not in ("image_size", "patch_size")]
    return {name: getattr(own, name) for name in names}


def _check_context(config: VLMConfig, transform: ImageTransform) -> None:
    """Refuse images that alone fill the decoder's context."""
    most = getattr(config.text_config, "max_position_embeddings", None)
    grid = transform.grid(0, 0) if transform.mode != "naflex" else (1, transform.max_patches)
    tokens = projecting.num_tokens(config.projector_config, grid)
    if most is not None and tokens + 3 > most:  # BOS, newline, EOS
        raise ConfigError(
            f"an image would be {tokens:,} tokens, and the decoder has {most:,} positions for image and text; choose a"
            f" smaller image_size or max_num_patches, or a projector that gives fewer tokens"
        )


# --- weights ----------------------------------------------------------------------------------------------------------


def _rebuilt(model: VLM, config: VLMConfig, seed: int) -> VLM:
    """The model of another configuration with the weights of this one, and those of a projector that is another."""
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent or getattr(model, "hf_device_map", None):
        raise ConfigError(
            "the geometry of a model with offloaded or placed parts cannot be changed; open it on one device"
        )
    made = empty(config)
    source = _source(model, made, seed)
    check_fit(source, expected_shapes(made))
    with torch.no_grad():
        for name in source.shapes:
            put(made, name, source.read(name))
    made.tie_weights()
    made.to(model.device)  # type: ignore[arg-type]  # constants; weights are there already
    made.generation_config = model.generation_config
    made.tower_head = model.tower_head
    _say(model.config, config)
    return made.eval()


def _source(model: VLM, made: VLM, seed: int) -> Source:
    """The tensors of the new model, by name: from the old one, but for the changed ones."""
    old, new = model.config, made.config
    state = {name: model.state_dict()[name] for name in expected_shapes(model)}
    tower = {name.removeprefix(TOWER): tensor for name, tensor in state.items() if name.startswith(TOWER)}
    if new.vision_config is not old.vision_config:
        wanted = expected_shapes(made.model.vision_tower)
        module = part("vlm.encoders", new.encoder)
        fitted = as_tower(_of(tower), module, new.vision_config, wanted, resize_positions=True)
        tower = {name: fitted.read(name) for name in fitted.shapes}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(TOWER)}
    state |= {TOWER + name: tensor for name, tensor in tower.items()}
    if new.projector_config is not old.projector_config and new.projector_config != old.projector_config:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTOR)}
        like = next(iter(state.values()))
        drawn = new_projector(new, seed)
        state |= {PROJECTOR + name: tensor.to(like) for name, tensor in drawn.items()}
    return _of(state)


def new_projector(config: VLMConfig, seed: int) -> dict[str, Tensor]:
    """Initial weights of a configuration's projector, from its own random stream."""
    weights: dict[str, Tensor] = {}
    width, decoder = feature_width(config.vision_config), config.text_config.hidden_size

    def draw() -> None:
        weights.update(projecting.build(config.projector_config, width, decoder).state_dict())

    seeded(seed, "projector", draw)
    return weights


def seeded(seed: int, name: str, action: Callable[[], object]) -> None:
    """Run with a random stream of its own, made of seed and name, and leave the caller's stream as it was."""
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng():
        torch.manual_seed(stream)
        action()


def _of(tensors: Mapping[str, Tensor]) -> Source:
    read: Callable[[str], Tensor] = lambda name: tensors[name].detach()  # noqa: E731
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Source("the model", shapes, dict.fromkeys(shapes, "F32"), read)


def _say(old: VLMConfig, new: VLMConfig) -> None:
    """What has changed, for people."""
    before, after = _sizes(old.vision_config), _sizes(new.vision_config)
    if before != after and None not in before + after:
        shown = (" and ".join(map(str, sizes)) for sizes in (before, after))
        logger.info("image size %s -> %s px: position tables are resampled, all other weights stay", *shown)
    if old.projector_config != new.projector_config:
        logger.warning(
            "projector %s -> %s: its weights are new, and the model does not see until they are trained",
            *(old.projector_config, new.projector_config),
        )
