"""Learned position tables at another image size."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.images.patches import resize_float


def resample_square(
    table: Tensor, rows: int, mode: str, *, align_corners: bool = False, smooth: bool = False
) -> Tensor:
    """A square table for a square grid of `rows` x `rows` patches, resized in float32.

    Args:
        table: float[n, E], row order, n a square number.
        mode: `bilinear` or `bicubic`.
        align_corners: corner to corner; else half-pixel centres.
        smooth: widen the filter where the table shrinks.

    Returns:
        float[rows * rows, E] in the dtype of `table`; the table itself when the number does not change.
    """
    old = math.isqrt(len(table))
    if old == rows:
        return table
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, rows), mode=mode, align_corners=align_corners, antialias=smooth)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def resample_after(table: Tensor, prefix: int, rows: int, *, smooth: bool = False) -> Tensor:
    """The same (bicubic) for float[prefix + n, E], whose first rows are those of class or register tokens and stay."""
    patches = table[prefix:]
    resampled = resample_square(patches, rows, "bicubic", smooth=smooth)
    return table if resampled is patches else torch.cat([table[:prefix], resampled])


def resize_position_grid(table: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings of a rows x columns patch grid (bilinear, antialiased, half-pixel centres), as NaFlex has
    them.

    Args:
        table: float[A, A, E], the learned square grid.

    Returns:
        float[rows * columns, E], row order, in the dtype of `table`.
    """
    # Antialiased resize has no half-precision kernel on the CPU, and the original computes it in float32.
    image = table.permute(2, 0, 1).float()
    resized = resize_float(image, (rows, columns), "bilinear")
    return resized.permute(1, 2, 0).reshape(rows * columns, -1).to(table.dtype)
