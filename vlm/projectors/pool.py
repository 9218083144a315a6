"""Averages over the patch grid, then one linear layer.

Paper: DeCo (arXiv 2405.20985): adaptive average pooling to a fixed grid beat learned resamplers at the
same number of tokens. Gemma 3 averages blocks of 4 x 4 patches (arXiv 2503.19786), the setting `factor`
here. A part empty block at the end of an axis is the average of the patches that are there. The linear layer is zero at
first, so that training starts from the decoder's own distribution (a departure from both).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import initialization as init

from vlm.errors import ConfigError
from vlm.projectors.contract import Grid, Spec, at_least, on_grids

DEFAULT_FACTOR = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the pooling: either a target grid or a factor; a factor of 2 when nothing is given.

    Attributes:
        rows, columns: most rows and columns of tokens. An axis with fewer patches keeps them: nothing is repeated.
        factor: side of the block of patches that is averaged.
    """

    rows: int | None = None
    columns: int | None = None
    factor: int | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("rows", "columns", "factor")}
        given = {name: value for name, value in given.items() if value is not None}
        if sorted(given) not in ([], ["factor"], ["columns", "rows"]):
            raise ConfigError(
                f"projector pool: got {', '.join(f'{name}={value}' for name, value in given.items())}; give rows and"
                f" columns, or factor alone"
            )
        for name, value in given.items():
            at_least("pool", name, value, 1)


def token_grid(config: Config, grid: Grid) -> Grid:
    """(rows, columns) of the tokens that a patch grid gives."""
    if config.rows is not None and config.columns is not None:
        return min(config.rows, grid[0]), min(config.columns, grid[1])
    factor = config.factor or DEFAULT_FACTOR
    return -(-grid[0] // factor), -(-grid[1] // factor)


def num_tokens(config: Config, grid: Grid) -> int:
    """One token per average."""
    rows, columns = token_grid(config, grid)
    return rows * columns


class Projector(nn.Module):
    """float[M, P, E] -> float[M, Q, D] through float[M, Q, E]."""

    def __init__(self, config: Config, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(encoder_width, decoder_width)
        self.init_weights()

    def init_weights(self) -> None:
        """Zero, so that training starts from the decoder's own distribution."""
        init.zeros_(self.linear.weight)
        init.zeros_(self.linear.bias)

    def num_tokens(self, grid: Grid) -> int:
        """Image tokens of a (rows, columns) patch grid."""
        return num_tokens(self.config, grid)

    def flops(self, grid: Grid) -> int:
        """Floating-point operations for one image (averages are not counted)."""
        return 2 * self.num_tokens(grid) * self.linear.in_features * self.linear.out_features

    def forward(self, features: Tensor, mask: Tensor | None, grid: Tensor) -> tuple[Tensor, Tensor | None]:
        """float[M, P, E], bool[M, P] or None, int64[M, 2] -> (float[M, Q, D], bool[M, Q] or None)."""
        tokens, kept = on_grids(self._average, features, mask, grid)
        return self.linear(tokens), kept

    def _average(self, patches: Tensor) -> Tensor:
        """float[m, R, C, E] -> float[m, r, c, E]."""
        image = patches.permute(0, 3, 1, 2)
        if self.config.rows is not None:
            target = token_grid(self.config, (patches.shape[1], patches.shape[2]))
            pooled = nn.functional.adaptive_avg_pool2d(image, target)
        else:
            pooled = nn.functional.avg_pool2d(image, self.config.factor or DEFAULT_FACTOR, ceil_mode=True)
        return pooled.permute(0, 2, 3, 1)


SPEC = Spec(config=Config, build=Projector, num_tokens=num_tokens)
