"""Pixels: any file to RGB, the recorded transform, resizing, NaFlex grids."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "load_image": "load",
    "image_size": "load",
    "is_image": "load",
    "ImageLimits": "load",
    "ImageTransform": "transforms",
    "Pixels": "transforms",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.images.load import ImageLimits as ImageLimits
    from vlm.images.load import image_size as image_size
    from vlm.images.load import is_image as is_image
    from vlm.images.load import load_image as load_image
    from vlm.images.transforms import ImageTransform as ImageTransform
    from vlm.images.transforms import Pixels as Pixels

__getattr__, __dir__ = door(__name__, _HOMES)
