"""Pixels: any file to RGB, the recorded transform, resizing, NaFlex grids."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "CODES": "load",
    "any_aspect": "transforms",
    "RESAMPLING": "transforms",
    "resize_float": "patches",
    "FilePart": "load",
    "SUFFIXES": "load",
    "ImageInput": "load",
    "DEFAULT_LIMITS": "load",
    "unpack": "fused",
    "open_transform": "fused",
    "one_view": "fused",
    "cells_shown": "fused",
    "FusedTransform": "fused",
    "load_image": "load",
    "image_size": "load",
    "is_image": "load",
    "ImageLimits": "load",
    "ImageTransform": "transforms",
    "Pixels": "transforms",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.images.fused import FusedTransform as FusedTransform
    from vlm.images.fused import cells_shown as cells_shown
    from vlm.images.fused import one_view as one_view
    from vlm.images.fused import open_transform as open_transform
    from vlm.images.fused import unpack as unpack
    from vlm.images.load import CODES as CODES
    from vlm.images.load import DEFAULT_LIMITS as DEFAULT_LIMITS
    from vlm.images.load import SUFFIXES as SUFFIXES
    from vlm.images.load import FilePart as FilePart
    from vlm.images.load import ImageInput as ImageInput
    from vlm.images.load import ImageLimits as ImageLimits
    from vlm.images.load import image_size as image_size
    from vlm.images.load import is_image as is_image
    from vlm.images.load import load_image as load_image
    from vlm.images.patches import resize_float as resize_float
    from vlm.images.transforms import RESAMPLING as RESAMPLING
    from vlm.images.transforms import ImageTransform as ImageTransform
    from vlm.images.transforms import Pixels as Pixels
    from vlm.images.transforms import any_aspect as any_aspect

__getattr__, __dir__ = door(__name__, _HOMES)
