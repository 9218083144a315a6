"""No projector: the tower's features enter the decoder as they are.

For a tower of the decoder's own width, and as the control that a projector has to beat. Paper: Frozen (arXiv
2106.13884), whose tower learned to write embeddings for a decoder that stayed fixed. Without weights nothing is silent
at first: an untrained model sees the image from the first step on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.projectors.contract import Grid, Spec


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the identity: none."""


def num_tokens(config: Config, grid: Grid) -> int:
    """One token per patch."""
    return grid[0] * grid[1]


class Projector(nn.Module):
    """float[M, P, E] -> the same.

    Raises:
        ConfigError: tower and decoder have different widths.
    """

    def __init__(self, config: Config, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        if encoder_width != decoder_width:
            raise ConfigError(
                f"projector identity: the tower's features are {encoder_width} wide, the decoder's embeddings"
                f" {decoder_width}; they must be equal, or use the projector 'linear'"
            )
        self.config = config

    def init_weights(self) -> None:
        """Nothing to draw."""

    def num_tokens(self, grid: Grid) -> int:
        """Image tokens of a (rows, columns) patch grid."""
        return num_tokens(self.config, grid)

    def flops(self, grid: Grid) -> int:
        """Floating-point operations for one image."""
        return 0

    def forward(self, features: Tensor, mask: Tensor | None, grid: Tensor) -> tuple[Tensor, Tensor | None]:
        """float[M, P, E], bool[M, P] or None, int64[M, 2] -> (the features, the mask)."""
        return features, mask


SPEC = Spec(config=Config, build=Projector, num_tokens=num_tokens)
