"""Vision towers, one file each; the file name is the encoder's kind.

A file defines

    Config      the tower's transformers configuration class
    Encoder     the tower: `Encoder(config)`, `forward(...) -> EncoderOutput`, patch tokens only, row order, final norm
    applied transform   `transform(config, **settings) -> ImageTransform`: the image transform that the tower was
    trained with tiny        `tiny() -> Config`: a configuration small enough for tests

and nothing else is needed: `VLMConfig(encoder="my_file")` finds it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EncoderOutput(NamedTuple):
    """Patch features of M images.

    Attributes:
        features: float[M, P, E], row order, no class or register tokens.
        mask: bool[M, P], False on padding rows; None when every row is a patch.
        grid: int64[M, 2], (rows, columns) of each image.
    """

    features: Tensor
    mask: Tensor | None
    grid: Tensor
