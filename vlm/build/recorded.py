"""What a tower's checkpoint records of how its images are prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.build.choice import Member
from vlm.checkpoints.image_settings import change_transform, check_settings, recorded
from vlm.checkpoints.recorded import recorded_transform, written_transform
from vlm.images.transforms import ImageTransform
from vlm.model.parts import encoder_spec


def image_transform(member: Member, settings: dict[str, Any]) -> ImageTransform:
    """The image transform of a tower: what its checkpoint records, with these settings changed.

    Raises:
        ConfigError: settings that the tower cannot have.
    """
    kind, config = member.kind, member.config
    if member.transform is not None:
        return change_transform(member.transform, kind, config, settings, encoder_spec)
    spec = encoder_spec(kind)
    check_settings(settings, spec, config)
    transform: ImageTransform = spec.transform(config, **{**recorded_settings(member, settings), **settings})
    return transform


def recorded_settings(member: Member, settings: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint records and the settings leave open."""
    spec = encoder_spec(member.kind)
    size = spec.image_size(member.config)
    if member.transform is not None:
        return recorded(member.transform, size)
    own = written_transform(member.source, spec)
    if own is not None and own.any_aspect == spec.any_aspect:
        return recorded(own, size)
    if not isinstance(member.source, Path) or spec.recognise is not None:
        return {}  # new weights, or a configuration that holds the transform
    found = recorded_transform(member.source, size)
    if spec.any_aspect:
        # NaFlex resizes in float with its own filter; a FixRes checkpoint's resize does not apply.
        return {key: value for key, value in found.items() if key not in ("resample", "rounding", *_SQUARE)}
    if "mode" in settings:
        return {key: value for key, value in found.items() if key not in _SQUARE}
    return found


_SQUARE = ("mode", "resize_shortest")
"""How an image becomes a square."""
