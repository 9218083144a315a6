"""What the files of a Hub directory say: image processors' settings, names of dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm.files import write_text
from vlm.images.transforms import RESAMPLING, ImageTransform


def image_values(transform: ImageTransform) -> dict[str, Any]:
    """Settings of transformers' SiglipImageProcessor."""
    assert transform.image_size is not None
    return {
        **common_image_values(transform),
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": transform.max_patches,
        "size": {"height": transform.image_size, "width": transform.image_size},
    }


def common_image_values(transform: ImageTransform) -> dict[str, Any]:
    """What SiglipImageProcessor and Siglip2ImageProcessor have in common."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "resample": int(RESAMPLING[transform.resample]),
        "rescale_factor": 1 / 255,
    }


def write_json(file: Path, values: dict[str, Any]) -> None:
    """A JSON file with sorted keys."""
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def preprocessor_values(transform: ImageTransform) -> dict[str, Any]:
    """Settings of transformers' SiglipImageProcessor, which squashes; of CLIPImageProcessor, which crops the middle; or
    of Siglip2ImageProcessor for NaFlex."""
    if transform.any_aspect:
        return {
            **common_image_values(transform),
            "image_processor_type": "Siglip2ImageProcessor",
            "max_num_patches": transform.max_num_patches,
            "patch_size": transform.patch_size,
        }
    if transform.crops:
        side = transform.image_size
        return {
            **common_image_values(transform),
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "size": {"shortest_edge": transform.resize_shortest or side},
        }
    values = image_values(transform)
    del values["image_seq_length"]  # PaliGemma's own
    return values
