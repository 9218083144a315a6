"""How a model directory is opened for work: on which device, in which number format, and how it reads its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
