"""`Matched`: a tower and its projector as they are compared, after the match."""

from __future__ import annotations

from dataclasses import dataclass

from vlm.compare.config import Arm
from vlm.images.transforms import ImageTransform


@dataclass(frozen=True)
class Matched:
    """An arm after matching."""

    arm: Arm
    """With the settings that the match needs."""
    kind: str
    """Of the encoder."""
    transform: ImageTransform
    tokens: float
    """Per image after the projector: mean over the sizes that were given."""
    note: str
    """What was done, and what could not be matched."""
    exact: bool
