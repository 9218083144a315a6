"""Shared by the encoders' tests: a small tower of every kind, its inputs, and a skip by name where its library is
missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from coretools import shake
from torch import Tensor

from vlm.errors import ConfigError
from vlm.images.fused import FusedTransform, unpack
from vlm.images.transforms import ImageTransform
from vlm.model.parts import encoder_spec
from vlm.registry import kinds

ENCODERS = kinds("vlm.encoders")
FIXED = [kind for kind in ENCODERS if not encoder_spec(kind).any_aspect]
"""Kinds whose images are squares."""
each_encoder = pytest.mark.parametrize("kind", ENCODERS)
each_fixed = pytest.mark.parametrize("kind", FIXED)


def needs(kind: str) -> Any:
    """The encoder's file; the test is skipped, with the reason, where its library cannot be imported."""
    module = encoder_spec(kind)
    try:
        module.library()
    except ConfigError as error:
        pytest.skip(f"{kind}: {error}")
    return module


def tower_of(kind: str, config: Any) -> torch.nn.Module:
    """A tower with loud weights, in eval mode."""
    tower = encoder_spec(kind).encoder._from_config(config).eval()
    shake(tower)
    return tower


def build(kind: str) -> tuple[Any, torch.nn.Module, ImageTransform]:
    module = needs(kind)
    config = module.tiny()
    transform = module.transform(config)
    if transform.any_aspect:
        transform = replace(transform, max_num_patches=12)
    return config, tower_of(kind, config), transform


def inputs(transform: ImageTransform, images: list) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    pixels = transform(images)
    tensors = {name: value for name, value in pixels._asdict().items() if isinstance(value, Tensor)}
    return tensors, pixels.grids


def brighter(values: Tensor, transform: ImageTransform, cell: tuple[int, int], columns: int) -> Tensor:
    """The pixels of one image with one cell of its grid brightened, in whatever form the transform gives them."""
    values, (row, column) = values.clone(), cell
    if values.ndim == 3:
        values[0, row * columns + column] += 3
    elif isinstance(transform, FusedTransform):
        parts = unpack(values, [member.image_size or 0 for member in transform.members])
        for member, part_values in zip(transform.members, parts, strict=True):
            _brighten(part_values, member.patch_size, row, column)  # a view of the copy
    else:
        _brighten(values, transform.patch_size, row, column)
    return values


def _brighten(values: Tensor, side: int, row: int, column: int) -> None:
    values[0, :, row * side : (row + 1) * side, column * side : (column + 1) * side] += 3
