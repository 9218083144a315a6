"""Settings of an image transform: which a tower can have, and the transform at its tower's size."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from vlm.errors import ConfigError, nearest
from vlm.images.fused import FusedTransform, one_view
from vlm.images.transforms import ImageTransform

OWN_TRANSFORM = "vlm_image_transform"
"""In a configuration file: the image transform as this library has it, with what other formats cannot say."""
NAFLEX, SQUARES = "siglip2_naflex", "siglip"
"""The two ways of reading SigLIP's weights."""


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
