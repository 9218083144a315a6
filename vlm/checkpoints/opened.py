"""A model directory, opened for work: on which device, in which number format, and how it reads its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import ranks

if TYPE_CHECKING:
    from vlm.model.forward import VLM
    from vlm.model.processor import Processor


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a model is opened."""

    device: str | None = None
    """None: a GPU if there is one (of several processes each takes its own), else the CPU."""
    dtype: str | None = None
    """None: the checkpoint's."""
    geometry: Mapping[str, Any] | None = None
    """How the model reads its images, if not as it is: `{"image_size": 448}`, or what else
    `vlm.checkpoints.geometry.with_geometry` takes."""


def open_model(path: str | Path, opening: Opening = Opening()) -> tuple[VLM, Processor]:
    """Model and processor of a directory or hub id.

    Raises:
        ConfigError: a geometry that the model cannot have. CheckpointError, GenerationError: as `vlm.load`.
    """
    import torch

    from vlm.checkpoints.directory import load

    device = opening.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{ranks.local_rank() % torch.cuda.device_count()}"
    return in_geometry(load(path, dtype=opening.dtype, device=device), opening.geometry)


def in_geometry(pair: tuple[VLM, Processor], geometry: Mapping[str, Any] | None) -> tuple[VLM, Processor]:
    """The pair, reading its images in another way; the pair itself where none is asked for."""
    from vlm.checkpoints.geometry import with_geometry

    return with_geometry(*pair, **geometry) if geometry else pair
