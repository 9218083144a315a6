"""What a checkpoint records of how its images are prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.checkpoints.checks import guarded
from vlm.checkpoints.files import read_json
from vlm.checkpoints.image_settings import OWN_TRANSFORM
from vlm.checkpoints.preprocessing import checked_image_settings, resample_name
from vlm.encoders.contract import Spec
from vlm.errors import CheckpointError
from vlm.images.fused import open_transform
from vlm.images.transforms import ImageTransform


def written_transform(source: Any, spec: Spec) -> ImageTransform | None:
    """The image transform of a tower that `vlm export --to tower` wrote: all that other formats cannot say."""
    names = (spec.config_file, "preprocessor_config.json")
    for file in [source / name for name in names] if isinstance(source, Path) and source.is_dir() else ():
        values = read_json(file).get(OWN_TRANSFORM) if file.is_file() else None
        if values is not None:
            return guarded(lambda: open_transform(values), f"{file}: {OWN_TRANSFORM}")  # noqa: B023
    return None


def recorded_transform(path: Path, image_size: int | None = None) -> dict[str, Any]:
    """Normalisation, filter and way to a square that a tower's checkpoint records (empty when it records none). A
    big_vision `.npz` means big_vision's own resize, which rounds down.

    Args:
        image_size: the tower's; a recorded centre crop keeps its proportion at another size.
    """
    if path.suffix == ".npz":
        return {"resample": "bilinear", "rounding": "down"}
    values = checked_image_settings(path, crop=True) or {}
    result: dict[str, Any] = {}
    if "resample" in values:
        result["resample"] = resample_name(values["resample"], path)
    for key, name in (("image_mean", "mean"), ("image_std", "std")):
        if key in values:
            result[name] = values[key]
    if "max_num_patches" in values:
        result["max_num_patches"] = values["max_num_patches"]
    return {**result, **(_recorded_square(values, image_size) if image_size else {})}


def _recorded_square(values: dict[str, Any], image_size: int) -> dict[str, Any]:
    size, crop = values.get("size"), values.get("crop_size")
    side = crop.get("height") if isinstance(crop, dict) else crop
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    if values.get("do_center_crop") and isinstance(side, int) and isinstance(shortest, int) and side > 0:
        return {"mode": "crop", "resize_shortest": max(image_size, round(image_size * shortest / side))}
    if isinstance(size, dict) and "height" in size and not values.get("do_center_crop"):
        return {"mode": "squash"}
    return {}


def check_size(path: Path, image_size: int | None) -> None:
    """Refuse recorded settings that are of another tower: squares of another size.

    Raises:
        CheckpointError: says both sizes.
    """
    values = (checked_image_settings(path, crop=True) if path.is_dir() else None) or {}
    size = values.get("size")
    if image_size is None or not isinstance(size, dict) or "height" not in size:
        return
    if (size.get("height"), size.get("width")) != (image_size, image_size):
        raise CheckpointError(
            f"{path}: images are resized to {size.get('height')}x{size.get('width')} px, the tower reads {image_size}:"
            f" one of config.json and preprocessor_config.json is another checkpoint's; copy both again"
        )
