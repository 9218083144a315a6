"""Settings of an image transform: which a tower can have, and the transform at its tower's size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vlm.encoders.contract import Spec
from vlm.errors import ConfigError, nearest
from vlm.images.fused import FusedTransform, one_view
from vlm.images.transforms import ImageTransform, any_aspect

OWN_TRANSFORM = "vlm_image_transform"
"""In a configuration file: the image transform as this library has it, with what other formats cannot say."""


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


def check_settings(settings: dict[str, Any], spec: Spec, config: Any) -> None:
    """Refuse image settings that are the tower's, or that it does not have.

    Raises:
        ConfigError: with what to set instead.
    """
    size = spec.image_size(config)
    owned = {"image_size": size, "patch_size": config.patch_size}
    for key, value in known_settings(settings).items():
        own = owned.get(key)
        if own is not None and own != value:
            advice = f"use image_size={value}, which resamples the tower" if key == "image_size" else "leave it out"
            raise ConfigError(f"image setting {key} is {value!r}, the tower has {own}; {advice}")
    if "max_num_patches" in settings and size is not None:
        raise ConfigError(
            f"max_num_patches is a budget of NaFlex towers; this one reads squares of {size} px: use"
            f" image_size, or read it as encoder_kind='siglip2_naflex'"
        )


def change_transform(
    transform: ImageTransform, kind: str, config: Any, settings: dict[str, Any], spec_of: Callable[[str], Spec]
) -> ImageTransform:
    """An image transform at its tower's size, with these settings changed.

    Args:
        kind, config: of the tower.
        spec_of: what a kind of tower is, `vlm.model.parts.encoder_spec`.

    Raises:
        ConfigError: settings that the tower cannot have.
    """
    spec = spec_of(kind)
    if isinstance(transform, FusedTransform):
        sizes = [spec_of(own).image_size(member) for own, member in spec.members(config)]
        members = [one.at_size(size) for one, size in zip(transform.members, sizes, strict=True)]
        known_settings(settings)
        return FusedTransform.of(one_view(members, settings), tuple(config.grid))
    check_settings(settings, spec, config)
    mode = settings.get("mode", transform.mode)
    if any_aspect(mode) != spec.any_aspect:
        raise ConfigError(
            f"image mode {mode!r} does not fit a {kind} tower; a SigLIP tower is read the other way with encoder_kind"
            f" (siglip2_naflex or siglip)"
        )
    return transform.at_size(spec.image_size(config)).changed(settings)


def recorded(transform: ImageTransform, image_size: int | None) -> dict[str, Any]:
    """An image transform as settings of its encoder's `transform`, at the tower's image size."""
    own = transform.at_size(image_size)
    names = [field.name for field in fields(ImageTransform) if field.name not in ("image_size", "patch_size")]
    return {name: getattr(own, name) for name in names}
