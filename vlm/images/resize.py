"""TensorFlow's bilinear resize, operation for operation in float32.

big_vision resizes with `tf.image.resize` and cuts the result to 8 bit. On flat areas a sum is 254.99999 or 255.0
depending on the order of additions, and cutting makes that a whole step; torch adds in another order. Reference:
TensorFlow `core/kernels/image/scale_and_translate_op.cc` (antialias), `resize_bilinear_op.cc` (half-pixel centres).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def resize_bilinear(image: NDArray[np.uint8], size: tuple[int, int], *, antialias: bool) -> Floats:
    """Resize an image.

    Args:
        image: uint8[H, W, C].
        size: (height, width).
        antialias: widen the filter when an axis shrinks.

    Returns:
        float32[height, width, C], not rounded.
    """
    values = image.astype(np.float32)
    if image.shape[:2] == size:
        return values
    if antialias:
        for length in size:  # rows, then columns
            values = _weighted(values, length).swapaxes(0, 1)
        return values
    for length in reversed(size):  # columns, then rows
        values = _between_two(values.swapaxes(0, 1), length)
    return values


def _weighted(values: Floats, length: int) -> Floats:
    """The first axis as sums over a triangle, added in the order of the source."""
    weights, sources = _triangle(values.shape[0], length)
    result = np.zeros((length, *values.shape[1:]), np.float32)
    for weight, source in zip(weights, sources, strict=True):
        result += weight[:, None, None] * values[source]
    return result


def _triangle(length: int, new: int) -> tuple[Floats, NDArray[np.int64]]:
    """(float32[T, new], int64[T, new]): weight and source index of the T inputs of each output; spare weights are 0."""
    one, half = np.float32(1), np.float32(0.5)
    step = one / (np.float32(new) / np.float32(length))
    width = max(step, one)
    centre = (np.arange(new, dtype=np.float32) + half) * step
    first = np.maximum(np.ceil(centre - width - half), 0).astype(np.int64)
    last = np.minimum(np.floor(centre + width - half), length - 1).astype(np.int64)
    sources = first + np.arange(int((last - first).max()) + 1)[:, None]
    distance = np.abs((sources.astype(np.float32) + half - centre) * (one / width))
    weights = np.where(sources <= last, np.maximum(one - distance, np.float32(0)), np.float32(0))
    total = np.zeros(new, np.float32)
    for weight in weights:
        total += weight
    return weights * (one / total), np.minimum(sources, length - 1)


def _between_two(values: Floats, length: int) -> Floats:
    """The first axis by linear interpolation between the two nearest."""
    step = np.float32(values.shape[0]) / np.float32(length)
    place = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    floor = np.floor(place)
    part = (place - floor)[:, None, None]
    low = np.maximum(floor.astype(np.int64), 0)
    high = np.minimum(np.ceil(place).astype(np.int64), values.shape[0] - 1)
    return values[low] + (values[high] - values[low]) * part
