"""What transformers opens of a written directory, and the attention code that both sides run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PaliGemmaForConditionalGeneration,
    Siglip2VisionModel,
    SiglipVisionModel,
)

from vlm.checkpoints.files import read_json
from vlm.errors import CheckpointError

BACKENDS = ("sdpa", "eager")
TOWERS = (
    *(SiglipVisionModel, Siglip2VisionModel, CLIPVisionModel, CLIPVisionModelWithProjection),
    *(Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel),
)
READERS: dict[str, Any] = {kind.__name__: kind for kind in (PaliGemmaForConditionalGeneration, *TOWERS)}
"""transformers' classes by the name that config.json gives."""


def backends(config: Any) -> dict[str, str]:
    """The attention code both sides run on: the model's own, or eager for kernels that do not exist in float32."""
    own = {name: getattr(config, name)._attn_implementation for name in ("vision_config", "text_config")}
    return {name: kind if kind in BACKENDS else "eager" for name, kind in own.items()}


def tower_backend(tower: Any) -> str:
    """The attention code a tower and its written twin run on, as `backends`."""
    own = str(tower.config._attn_implementation)
    return own if own in BACKENDS else "eager"


def opened(folder: Path, attention: Any = None, *, empty: bool = False) -> Any:
    """The written model opened by transformers' class in float32, every tensor accounted for.

    Args:
        attention: backend, or backends by part, as transformers takes them.
        empty: on the meta device: names and shapes are compared, no weight is read.

    Raises:
        CheckpointError: it cannot be opened, or tensors are missing, unexpected or mis-shaped.
    """
    name = read_json(folder / "config.json")["architectures"][0]
    kind = READERS.get(name)
    if kind is None:
        raise CheckpointError(
            f"{folder}: no way is known here to open a {name} of transformers; known: {', '.join(READERS)}"
        )
    if isinstance(attention, dict) and kind is not PaliGemmaForConditionalGeneration:
        attention = attention["vision_config"]
    settings: dict[str, Any] = {"device_map": "meta"} if empty else {"attn_implementation": attention}
    try:
        model, info = kind.from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed below with the others
            **settings,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {kind.__name__} cannot open what was written: {error}") from error
    problems = {key: sorted(str(name) for name in names) for key, names in info.items() if names}
    if problems:
        found = "; ".join(f"{key.replace('_', ' ')}: {', '.join(names[:5])}" for key, names in problems.items())
        raise CheckpointError(f"{folder}: {kind.__name__} does not find every tensor in its place: {found}")
    return model
