"""A geometry before its weights: what an image size, a patch budget, a feature layer or a projector make of a model's
configuration and image transform."""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints.checks import NOTES
from vlm.checkpoints.image_settings import change_transform
from vlm.encoders.contract import Spec
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform
from vlm.model import decoder, projecting
from vlm.model.config import VLMConfig
from vlm.model.parts import encoder_spec, known_encoders, towers

logger = logging.getLogger(__name__)
SETTINGS = ("image_size", "image", "layer", "projector", "encoder_kind")
"""What can be changed, by the names that `vlm.new` and a run's YAML have for it."""


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
    width = encoder_spec(after.kind).width(after.config)
    old = encoder_spec(config.encoder).width(config.vision_config)
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
        config = config if image_sizes(kind, resized) == image_sizes(kind, config) else resized
    if layer is not None:
        config = _with_layer(kind, config, layer)
    if config is not tower.config:
        config._attn_implementation = tower.config._attn_implementation
    return Tower(kind, config, change_transform(transform, kind, config, image or {}, encoder_spec))


def _with_layer(kind: str, config: Any, layer: int | list[int]) -> Any:
    """The configuration with another choice of feature layers.

    Raises:
        ConfigError: blocks or a norm that this model has given up.
    """
    chosen = [(one, numbers) for own, one in towers(kind, config) if (numbers := encoder_spec(own).chosen_layers(one))]
    if not chosen:
        return encoder_spec(kind).choose_layers(kind, config, layer)
    one, numbers = chosen[0]
    blocks = ", ".join(map(str, numbers))
    raise ConfigError(
        f"layer={layer}: this model's features are the outputs of block {blocks} of {one.num_hidden_layers}"
        f"{'' if one.feature_norm else ', without the final norm'}; what it does not use is no part of it, so the"
        f" choice cannot be changed: build the model anew from its tower's checkpoint"
    )


def set_image_size(config: Any, kind: str, image_size: int | list[int] | None) -> None:
    """Give a tower's configuration another image size, and warn of pixels that it would never see.

    Args:
        image_size: in pixels; None leaves it. For a fused tower, one for each member.

    Raises:
        ConfigError: a tower of any aspect ratio, a fused tower without a size for each member, or no size.
    """
    spec = encoder_spec(kind)
    if spec.with_members is not None:
        _set_member_sizes(spec, config, image_size)
        return
    if spec.any_aspect:
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


def _set_member_sizes(spec: Spec, config: Any, image_size: int | list[int] | None) -> None:
    members = spec.members(config)
    if image_size is None:
        for _, member in members:
            say_unseen(member)
        return
    sizes = image_size if isinstance(image_size, list) else [image_size]
    if len(sizes) != len(members):
        now = ", ".join(f"{kind} {member.image_size}" for kind, member in members)
        raise ConfigError(
            f"image_size={image_size}: each member of a fused tower has its own ({now}); give {len(members)} sizes, one"
            f" for each, or build it from the members: A@{sizes[0]}+B@{sizes[0]}"
        )
    for (kind, member), size in zip(members, sizes, strict=True):
        set_image_size(member, kind, size)
    assert spec.with_members is not None
    made = spec.with_members(config, members)
    config.members, config.grid = made.members, made.grid


def image_sizes(kind: str, config: Any) -> list[int | None]:
    """Of each tower; None where there is none, as for NaFlex."""
    return [encoder_spec(own).image_size(one) for own, one in towers(kind, config)]


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
    spec, weights = known_encoders().get(kind), encoder_spec(source).weights
    if spec is None or spec.adopt is None or kind == source or spec.weights != weights:
        raise ConfigError(
            f"{name} is a {source!r} tower and cannot be read as {kind!r}; only siglip -> siglip2_naflex is possible,"
            f" and back"
        )
    values: Any = full.to_dict()
    if values.get("feature_layers"):
        raise ConfigError(
            f"{name} gives other layers than the last, which a {kind} tower cannot; leave the kind as it is"
        )
    settings = {key: value for key, value in values.items() if key not in (*NOTES, "model_type")}
    return spec.config(**spec.adopt(settings, image_size if isinstance(image_size, int) else None))


def _transform_as(transform: ImageTransform, kind: str, config: Any) -> ImageTransform:
    """Normalisation and background stay, the geometry is the other kind's. A NaFlex tower gets as many patches as its
    squares had."""
    kept: dict[str, Any] = {"mean": transform.mean, "std": transform.std, "background": transform.background}
    spec = encoder_spec(kind)
    if spec.any_aspect:
        kept["max_num_patches"] = transform.max_patches
    made: ImageTransform = spec.transform(config, **kept)
    return made


def _check_context(config: VLMConfig, transform: ImageTransform) -> None:
    """Refuse images that alone fill the decoder's context."""
    most = decoder.facts(config.text_config).context
    tokens = projecting.num_tokens(config.projector_config, transform.widest_grids()[0])
    if most is not None and tokens + 3 > most:  # BOS, newline, EOS
        raise ConfigError(
            f"an image would be {tokens:,} tokens, and the decoder has {most:,} positions for image and text; choose a"
            f" smaller image_size or max_num_patches, or a projector that gives fewer tokens"
        )
