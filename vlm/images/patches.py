"""Images as tensors: resizing in float, and the patches of a grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_float(image: Tensor, size: tuple[int, int], mode: str, *, antialias: bool = True) -> Tensor:
    """Resize with half-pixel centres, one axis at a time.

    Each axis is resized as the last one, because torch's antialiased resize on the CPU repeats the first row whenever
    the width is 1 in the output and the height changes. The filters are separable, so two calls give the same numbers.

    Args:
        image: float[..., C, H, W] with at most one leading dimension.
        size: (height, width).
        mode: `bilinear` or `bicubic`.
        antialias: widen the filter when an axis shrinks.

    Returns:
        float[..., C, height, width].
    """
    batched = image if image.ndim == 4 else image[None]
    for target in size:  # height, then width: the axes change places each time
        batched = batched.transpose(-1, -2)
        if batched.shape[-1] != target:
            shape = (batched.shape[-2], target)
            batched = F.interpolate(batched, size=shape, mode=mode, align_corners=False, antialias=antialias)
    return batched if image.ndim == 4 else batched[0]


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut an image into rows of patches: row-major patches, inside a patch (y, x, channel), as in big_vision and
    transformers.

    Args:
        image: float[C, H, W], H and W multiples of `patch_size`.

    Returns:
        float[H/P * W/P, P*P*C].
    """
    channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    blocks = image.reshape(channels, rows, patch_size, columns, patch_size)
    return blocks.permute(1, 3, 2, 4, 0).reshape(rows * columns, patch_size**2 * channels)


def patch_coordinates(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where each patch of a grid lies, in the order in which `patchify` cuts them.

    Returns:
        (int64[rows * columns], int64[rows * columns]): row and column of each patch, big_vision's `yidx` and `xidx`.
    """
    return torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
