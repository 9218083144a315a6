"""The trained vision tower alone, as a SigLIP vision checkpoint: for transformers, and as `encoder` of a new model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vlm.checkpoints.layout import architecture, common_image_values, dtype_name, image_values, write_json
from vlm.checkpoints.names import TOWER
from vlm.checkpoints.shards import write_shards
from vlm.errors import ConfigError
from vlm.model import VLM
from vlm.processor import Processor
from vlm.transforms import ImageTransform

ARCHITECTURES = {"siglip": "SiglipVisionModel", "siglip2_naflex": "Siglip2VisionModel"}
"""transformers' class by encoder kind."""
PREFIX = "vision_model."
"""As in the published SigLIP checkpoints; transformers 5 reads it, and 4 reads nothing else."""


def check(model: VLM, processor: Processor) -> None:
    """Refuse a tower that is not SigLIP.

    Raises:
        ConfigError: names the towers that can be written.
    """
    if model.config.encoder not in ARCHITECTURES:
        raise ConfigError(
            f"the vision tower is {model.config.encoder!r}; only {' and '.join(ARCHITECTURES)} towers have a SigLIP"
            f" checkpoint format. Keep the vlm directory, which holds the tower too"
        )
    if getattr(model.config.vision_config, "feature_layers", None):
        raise ConfigError(
            "the vision tower ends at its feature layers and has no final norm that a SigLIP checkpoint needs. Keep the"
            " vlm directory, which holds the tower too"
        )


def write(
    folder: Path, model: VLM, processor: Processor, dtype: torch.dtype, max_shard_size: str | int
) -> dict[str, Tensor]:
    """Write all files of the directory but the model card.

    Returns:
        name in the files -> the model's tensor.
    """
    write_json(folder / "config.json", config_values(model, dtype))
    write_json(folder / "preprocessor_config.json", preprocessor_values(processor.image_transform))
    state = model.state_dict()
    tensors = {PREFIX + name.removeprefix(TOWER): state[name] for name in state if name.startswith(TOWER)}
    write_shards(folder, tensors, dtype, max_shard_size)
    return tensors


def config_values(model: VLM, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` of the tower with every field written."""
    return {
        **architecture(model.config.vision_config),
        "architectures": [ARCHITECTURES[model.config.encoder]],
        "dtype": dtype_name(dtype),
        "transformers_version": transformers.__version__,
    }


def preprocessor_values(transform: ImageTransform) -> dict[str, Any]:
    """Settings of transformers' SiglipImageProcessor, or of Siglip2ImageProcessor for NaFlex."""
    if transform.mode != "naflex":
        values = image_values(transform)
        del values["image_seq_length"]  # PaliGemma's own
        return values
    return {
        **common_image_values(transform),
        "image_processor_type": "Siglip2ImageProcessor",
        "max_num_patches": transform.max_num_patches,
        "patch_size": transform.patch_size,
    }
