"""Space to depth, then one linear layer: factor x factor neighbouring patches become one token.

Papers: InternVL 1.5 (arXiv 2404.16821) and Idefics3 (arXiv 2408.12637). The channels of a
token are (row in the block, column in the block, feature), as in Idefics3 and SmolVLM. Both, and NVLM (arXiv
2409.11402), only have grids that the factor divides. An axis that it does not divide is padded with zeros at its end,
as in VILA's projector (arXiv 2412.04468, reference code `DownSampleBlock.flat_square`): to the linear layer a patch
that is not there is nothing, where a copy of the edge would count the edge twice. The linear layer is zero at first, so
that training starts from the decoder's own distribution (a departure from all of them).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import initialization as init

from vlm.projectors.contract import Grid, Spec, at_least, on_grids


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the pixel shuffle.

    Attributes:
        factor: side of the block of patches that becomes one token.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        at_least("pixel_shuffle", "factor", self.factor, 1)


def num_tokens(config: Config, grid: Grid) -> int:
    """One token per block; the last block of an axis may be part empty."""
    rows, columns = (-(-side // config.factor) for side in grid)
    return rows * columns


class Projector(nn.Module):
    """float[M, P, E] -> float[M, Q, D] through float[M, Q, factor * factor * E]."""

    def __init__(self, config: Config, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(encoder_width * config.factor**2, decoder_width)
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
        """float[M, P, E], bool[M, P] or None, int64[M, 2] -> (float[M, Q, D], bool[M, Q] or None)."""
        tokens, kept = on_grids(self._blocks, features, mask, grid)
        return self.linear(tokens), kept

    def _blocks(self, patches: Tensor) -> Tensor:
        """float[m, R, C, E] -> float[m, R / factor, C / factor, factor * factor * E], both rounded up."""
        factor = self.config.factor
        images, rows, columns, width = patches.shape
        patches = nn.functional.pad(patches, (0, 0, 0, -columns % factor, 0, -rows % factor))
        blocks = patches.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # [m, r, factor, c, factor, E]
        return blocks.transpose(2, 3).flatten(3)


SPEC = Spec(config=Config, build=Projector, num_tokens=num_tokens)
