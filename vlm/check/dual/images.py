"""Images on their way in: the family's way to a square, its range, and pixels that are really those of the picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm.check.dual_subject import SIZES, DualSubject
from vlm.check.report import Finding
from vlm.check.subject import Check, picture
from vlm.images.transforms import RESAMPLING

MODES = {"siglip": ("squash",), "siglip2": ("squash", "naflex"), "clip": ("crop",)}
"""How the towers of a family were shown images; other families say it in each checkpoint."""
HALF = {"siglip": 0.5, "siglip2": 0.5}
"""Mean and deviation of the families that always have one number."""
STEPS = 2.0
"""Largest difference in 8-bit steps: two libraries resize, and one of them rounds in between."""


def transform(subject: DualSubject) -> Finding:
    """Pixels of three pictures against the same made here with Pillow and torch, and the settings against the family's;
    the image tower reads them."""
    own, family = subject.processor.transform, subject.processor.rule.family
    inputs = subject.pixels()
    try:
        subject.image(inputs)
    except (ValueError, RuntimeError) as error:  # transformers' and torch's, of another size
        return Finding(problem=f"the image tower does not read them: {' '.join(str(error).split())[:200]}")
    problem = _unlike_the_family(own, family)
    wanted = [_reference(own, picture(row, size)) for row, size in enumerate(SIZES)]
    errors = []
    for row, pixels in enumerate(wanted):
        got = inputs["pixel_values"][row].cpu()[: len(pixels)]
        same = got.shape == pixels.shape
        errors.append(float((_steps(got, own) - _steps(pixels, own)).abs().max()) if same else math.inf)
    detail = f"largest difference of a pixel in 8-bit steps; {own.describe()}, {own.resample}"
    return Finding(measured=float(torch.tensor(errors).max()), limit=STEPS, detail=detail, problem=problem)


def _unlike_the_family(own: Any, family: str) -> str:
    known = MODES.get(family, (own.mode,))
    if own.mode not in known:
        return f"images are brought to size by {own.mode!r}; {family} was trained with {' or '.join(known)}"
    half = HALF.get(family)
    if half is not None and {*own.mean, *own.std} != {half}:
        return f"mean {own.mean} and std {own.std}; {family} was trained with {half} in all places, values in [-1, 1]"
    return ""


def _reference(own: Any, image: Image.Image) -> Tensor:
    """float32[3, S, S], or float32[P, p * p * 3] of the real patches (NaFlex)."""
    if own.any_aspect:
        rows, columns = own.grid(image.height, image.width)
        side = own.patch_size
        values = _normalised(own, _resized(own, image, (rows * side, columns * side), rounded=False))
        patches = values.reshape(3, rows, side, columns, side).permute(1, 3, 2, 4, 0)
        return patches.reshape(rows * columns, -1)
    size = own.image_size
    if own.squashes:
        return _normalised(own, _resized(own, image, (size, size)))
    if not own.crops:
        padded: Tensor = own([image]).pixel_values[0]  # no family was shown images on a square of one colour
        return padded
    short = own.resize_shortest or size
    high, wide = (short * side // min(image.size) for side in (image.height, image.width))
    top, left = (high - size) // 2, (wide - size) // 2
    return _normalised(own, _resized(own, image, (high, wide)))[:, top : top + size, left : left + size]


def _resized(own: Any, image: Image.Image, size: tuple[int, int], *, rounded: bool = True) -> Tensor:
    """float32[3, H, W] in [0, 255]."""
    if own.antialias and rounded:
        made = image.resize((size[1], size[0]), RESAMPLING[own.resample])
        return _values(made)
    values = _values(image)[None]
    return torch.nn.functional.interpolate(values, size, mode=own.resample, antialias=own.antialias)[0]


def _values(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def _normalised(own: Any, values: Tensor) -> Tensor:
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (own.mean, own.std))
    return (values / 255 - mean) / std


def _steps(values: Tensor, own: Any) -> Tensor:
    """Normalised values back in 8-bit steps, without their mean."""
    std = torch.tensor(own.std)
    return 255 * (values * std[:, None, None] if values.ndim == 3 else values * std.repeat(values.shape[1] // 3))


CHECKS = (
    Check("image-transform", "pixels are those of the picture, as the image tower was shown them", transform, 100),
)
