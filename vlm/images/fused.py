"""The image transform of a fused tower: one image to the pixels of several members, packed in one tensor.

Every member resizes and normalises the original image by itself, with its own size, filter, mean and deviation, so its
pixels are those that it would see alone. One geometry holds for all (`squash`, `crop` with one proportion, or
`letterbox`): cell (i, j) of each member's patch grid shows the same part of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError, nearest
from vlm.images.transforms import ImageTransform, Pixels

SHARED = ("mode", "background", "resample", "antialias", "rounding")
"""Settings that can be changed for all members at once."""


@dataclass(frozen=True, kw_only=True)
class FusedTransform(ImageTransform):
    """How images become the packed pixels of a fused tower.

    The inherited numbers are those of the member with the largest image; what is saved is `members` and `common_grid`.

    Attributes:
        members: the transform of each member, in order.
        common_grid: (rows, columns) of the fused features. A member with another grid of its own is resampled to it.
    """

    members: tuple[ImageTransform, ...] = ()
    common_grid: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.members) < 2:
            raise ConfigError(f"a fused image transform needs two members or more, got {len(self.members)}")
        if len(self.common_grid) != 2 or not all(isinstance(n, int) and n > 0 for n in self.common_grid):
            raise ConfigError(f"common_grid is {self.common_grid!r}, expected [rows, columns]")
        if any(member.any_aspect for member in self.members):
            raise ConfigError("a fused image transform has square members only, one of these is naflex")
        if not same_view(self.members):
            views = ", ".join(f"{member.mode} {member.resize_shortest or ''}".strip() for member in self.members)
            raise ConfigError(f"the members of a fused tower would see different parts of an image: {views}")

    @classmethod
    def of(cls, members: Sequence[ImageTransform], common_grid: tuple[int, int]) -> FusedTransform:
        """From the members' own transforms.

        Raises:
            ConfigError: fewer than two, a NaFlex member, or members that see different parts of an image.
        """
        if not members:
            raise ConfigError("a fused image transform needs two members or more, got none")
        largest = max(members, key=lambda member: member.image_size or 0)
        values = {field.name: getattr(largest, field.name) for field in fields(ImageTransform)}
        return cls(**values, members=tuple(members), common_grid=tuple(common_grid))  # type: ignore[arg-type]

    def __call__(self, images: Sequence[Image.Image]) -> Pixels:
        """float32[M, sum of 3*H*W over the members], see `unpack`."""
        packed = [member(images).pixel_values.flatten(1) for member in self.members]
        return Pixels(torch.cat(packed, dim=1), None, None, [self.common_grid] * len(images))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The common grid, whatever the image."""
        return self.common_grid

    def effective_resolution(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of the member with the largest image."""
        side = self._side // self.patch_size * self.patch_size
        return side, side

    def describe(self) -> str:
        """One line for people; a member whose features are resampled is named."""
        rows, columns = self.common_grid
        parts = []
        for member in self.members:
            own = member.grid(0, 0)
            changed = "" if own == self.common_grid else f", grid {own[0]}x{own[1]} resampled to {rows}x{columns}"
            parts.append(f"({member.describe()}{changed})")
        return f"fused, {rows * columns} cells of {rows}x{columns}: {' + '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the members and the common grid."""
        return {"members": [member.to_dict() for member in self.members], "common_grid": list(self.common_grid)}


def open_transform(values: dict[str, Any]) -> ImageTransform:
    """The transform that `to_dict` wrote, fused or not.

    Raises:
        ConfigError: an unknown or missing key.
    """
    if "members" not in values:
        return ImageTransform.from_dict(values)
    known = ("members", "common_grid")
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {key!r} in a fused image_transform{nearest(key, known)}; known: {', '.join(known)}"
            )
    members, grid = values["members"], values.get("common_grid")
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise ConfigError("members of a fused image_transform must be a list of transforms")
    if not isinstance(grid, list):
        raise ConfigError(f"common_grid is {grid!r}, expected [rows, columns]")
    return FusedTransform.of([ImageTransform.from_dict(member) for member in members], tuple(grid))


def same_view(members: Sequence[ImageTransform]) -> bool:
    """Whether all members show the same part of every image: one mode and, for a crop, one proportion (to a pixel)."""
    if len({(member.mode, member.background if member.mode == "letterbox" else None) for member in members}) > 1:
        return False
    kept = [(member.image_size or 1) / (member.resize_shortest or member.image_size or 1) for member in members]
    finest = max(member.resize_shortest or member.image_size or 1 for member in members)
    return max(kept) - min(kept) <= 1 / finest


def one_view(members: Sequence[ImageTransform], settings: dict[str, Any]) -> list[ImageTransform]:
    """The members' transforms with one geometry: the one asked for, the one that they all have, or else `squash`, which
    shows all of them the whole image.

    Args:
        settings: changes for all members, of `SHARED` only.

    Raises:
        ConfigError: a setting that each member has for itself.
    """
    for key in settings:
        if key not in SHARED:
            raise ConfigError(
                f"image setting {key} belongs to each member of a fused tower; for all of them, only"
                f" {', '.join(SHARED)} can be set"
            )
    changed = dict(settings)
    if "mode" not in changed and not same_view(members):
        changed["mode"] = "squash"
    if "mode" in changed:
        changed["resize_shortest"] = None
    return [replace(member, **changed) for member in members]


def unpack(pixel_values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Packed pixels float[M, N] to float[M, 3, size, size] for each member.

    Raises:
        ConfigError: another shape than the members'.
    """
    lengths = [3 * size * size for size in sizes]
    if pixel_values.ndim != 2 or pixel_values.shape[1] != sum(lengths):
        raise ConfigError(
            f"a fused tower of {' + '.join(map(str, sizes))} px reads float[M, {sum(lengths)}], got"
            f" {tuple(pixel_values.shape)}; set the processor's image_transform to the tower's"
        )
    parts = pixel_values.split(lengths, dim=1)
    return [part.unflatten(1, (3, size, size)) for part, size in zip(parts, sizes, strict=True)]


def cells_shown(member: ImageTransform) -> float:
    """The part of the image's side that a member's grid covers: 1, or less where the last pixels make no patch."""
    rows = member.grid(0, 0)[0]
    return math.prod((rows, member.patch_size)) / (member.image_size or 1)
