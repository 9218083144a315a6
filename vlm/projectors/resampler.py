"""Learned queries that read the patches by cross-attention: a fixed number of tokens for any image.

Papers: the Perceiver Resampler of Flamingo (arXiv 2204.14198); Qwen-VL (arXiv 2308.12966) for the patches' places. Each
block is attention from the queries to the patches and a perceptron, norms first, no biases (Flamingo); padding rows are
hidden from the attention.

Places: the tower's features know theirs, and averaging attention would lose them, so, as in Qwen-VL, a fixed
sine-cosine embedding of each patch's row and column is added to the keys (not to the values). Rows and columns are
counted in sixteenths of the image, whatever its grid, where Qwen-VL resizes its table of 16 x 16: a query that looks at
the upper left corner finds it in images of any size and aspect ratio.

Departures: queries do not see one another (Flamingo appends them to the keys); GELU; the last layer is zero, so that
training starts from the decoder's own distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vlm.errors import ConfigError
from vlm.projectors.contract import Grid, Spec, at_least

PLACES = 16
"""Length of an image's side in the unit of the sine-cosine embedding."""
EXPANSION = 4
"""Width of the perceptron over that of the block."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the resampler.

    Attributes:
        queries: image tokens of every image.
        depth: blocks of attention and perceptron.
        heads: attention heads; must divide the tower's width.
    """

    queries: int = 64
    depth: int = 2
    heads: int = 8

    def __post_init__(self) -> None:
        for name in ("queries", "depth", "heads"):
            at_least("resampler", name, getattr(self, name), 1)


def num_tokens(config: Config, grid: Grid) -> int:
    """One token per query."""
    return config.queries


def place_embedding(index: Tensor, grid: Tensor, width: int) -> Tensor:
    """Sine-cosine embedding of patches' places.

    Args:
        index: int64[M, P], number of each patch in row order.
        grid: int64[M, 2].

    Returns:
        float32[M, P, width]: sine and cosine of the row, then of the column, width / 4 frequencies from 1 down to
        about 1/10,000.
    """
    rows, columns = grid[:, :1], grid[:, 1:]
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=index.device, dtype=torch.float32) / quarter)
    parts = []
    for place, side in ((index // columns, rows), (index % columns, columns)):
        angles = ((place + 0.5) / side * PLACES)[..., None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=-1)


class Block(nn.Module):
    """Attention from queries to patches, then a perceptron; both residual, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, EXPANSION * width, bias=False)
        self.down = nn.Linear(EXPANSION * width, width, bias=False)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        """float[M, Q, W], float[M, P, W] twice, bool[M, 1, 1, P] or None -> float[M, Q, W]."""
        query, key, value = (
            layer(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, given in ((self.query, self.query_norm(queries)), (self.key, keys), (self.value, values))
        )
        read = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        queries = queries + self.out(read.transpose(1, 2).flatten(2))
        return queries + self.down(nn.functional.gelu(self.up(self.mlp_norm(queries))))


class Projector(nn.Module):
    """float[M, P, E] -> float[M, queries, D].

    Raises:
        ConfigError: the tower's width is no multiple of the heads, or of 4.
    """

    def __init__(self, config: Config, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        if encoder_width % config.heads or encoder_width % 4:
            fitting = [count for count in range(1, 33) if encoder_width % count == 0]
            advice = f"choose heads from {', '.join(map(str, fitting))}"
            if encoder_width % 4:
                advice = "the places of the patches need a multiple of 4; use another projector"
            raise ConfigError(
                f"projector resampler: {config.heads} heads do not fit a tower of width {encoder_width}; {advice}"
            )
        self.config = config
        self.queries = nn.Parameter(torch.empty(config.queries, encoder_width))
        self.norm = nn.LayerNorm(encoder_width)
        self.blocks = nn.ModuleList(Block(encoder_width, config.heads) for _ in range(config.depth))
        self.out_norm = nn.LayerNorm(encoder_width)
        self.linear = nn.Linear(encoder_width, decoder_width)
        self.init_weights()

    def init_weights(self) -> None:
        """Queries N(0, 1), matrices N(0, 1 / fan in), norms 1 and 0, the last layer zero."""
        init.normal_(self.queries)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                init.normal_(layer.weight, std=layer.in_features**-0.5)
            elif isinstance(layer, nn.LayerNorm):
                init.ones_(layer.weight)
                init.zeros_(layer.bias)
        init.zeros_(self.linear.weight)
        init.zeros_(self.linear.bias)

    def num_tokens(self, grid: Grid) -> int:
        """Image tokens of a (rows, columns) patch grid: always the number of queries."""
        return num_tokens(self.config, grid)

    def flops(self, grid: Grid) -> int:
        """Floating-point operations for one image."""
        queries, width = self.queries.shape
        patches = grid[0] * grid[1]
        per_query = 2 * (2 + 2 * EXPANSION) * width**2
        block = queries * per_query + patches * 4 * width**2 + 4 * queries * patches * width
        return len(self.blocks) * block + 2 * queries * self.linear.in_features * self.linear.out_features

    def forward(self, features: Tensor, mask: Tensor | None, grid: Tensor) -> tuple[Tensor, None]:
        """float[M, P, E], bool[M, P] or None, int64[M, 2] -> (float[M, queries, D], None: every row is a token)."""
        images, patches, width = features.shape
        visible = None
        if mask is None:
            index = torch.arange(patches, device=features.device).expand(images, -1)
        else:
            # Hidden from the attention, a NaN in padding would still reach the sum: it is multiplied by zero.
            features = features.masked_fill(~mask[..., None], 0)
            index = (mask.cumsum(1) - 1).clamp(min=0)
            visible = mask[:, None, None]
        values = self.norm(features)
        keys = values + place_embedding(index, grid, width).to(values.dtype)
        queries = self.queries.expand(images, -1, -1)
        for block in self.blocks:
            queries = block(queries, keys, values, visible)
        return self.linear(self.out_norm(queries)), None


SPEC = Spec(config=Config, build=Projector, num_tokens=num_tokens)
