"""One linear layer with bias on each patch, zero-initialised: PaliGemma's projector.

Paper: PaliGemma, sections 3.1 and 5.5 (arXiv 2407.07726): an MLP was no better. Parameter names are those of
transformers' PaliGemma (`multi_modal_projector.linear`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import initialization as init

from vlm.projectors.contract import Grid, Spec


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the linear projector: none."""


def num_tokens(config: Config, grid: Grid) -> int:
    """One token per patch."""
    return grid[0] * grid[1]


class Projector(nn.Module):
    """float[M, P, E] -> float[M, P, D]."""

    def __init__(self, config: Config, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(encoder_width, decoder_width, bias=True)
        self.init_weights()

    def init_weights(self) -> None:
        """Zero, so that training starts from the decoder's own distribution."""
        init.zeros_(self.linear.weight)
        init.zeros_(self.linear.bias)

    def num_tokens(self, grid: Grid) -> int:
        """Image tokens of a (rows, columns) patch grid."""
        return num_tokens(self.config, grid)

    def flops(self, grid: Grid) -> int:
        """Floating-point operations for one image."""
        return 2 * self.num_tokens(grid) * self.linear.in_features * self.linear.out_features

    def forward(self, features: Tensor, mask: Tensor | None, grid: Tensor) -> tuple[Tensor, Tensor | None]:
        """float[M, P, E], bool[M, P] or None, int64[M, 2] -> (float[M, P, D], the mask)."""
        return self.linear(features), mask


SPEC = Spec(config=Config, build=Projector, num_tokens=num_tokens, in_paligemma=True)
