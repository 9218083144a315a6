"""A multi-layer perceptron on each patch: LLaVA 1.5's projector.

Paper: LLaVA 1.5, section 3.3 (arXiv 2310.03744): two layers with GELU. The first layers keep torch's default
initialisation, the last one is zero, so that, as with the linear projector, training starts from the decoder's own
distribution (a departure from LLaVA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from transformers import initialization as init

from vlm.errors import ConfigError, nearest
from vlm.projectors.contract import Grid, Spec, at_least

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the MLP projector.

    Attributes:
        depth: number of linear layers, at least 2 (one layer is the kind `linear`).
        activation: between the layers: `gelu`, `gelu_tanh`, `relu` or `silu`.
    """

    depth: int = 2
    activation: str = "gelu"

    def __post_init__(self) -> None:
        at_least("mlp", "depth", self.depth, 2, "for one layer use 'linear'")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"projector mlp: activation is {self.activation!r}{nearest(str(self.activation), ACTIVATIONS)}; known:"
                f" {', '.join(ACTIVATIONS)}"
            )


def num_tokens(config: Config, grid: Grid) -> int:
    """One token per patch."""
    return grid[0] * grid[1]


class Projector(nn.Module):
    """float[M, P, E] -> float[M, P, D], the activation between the layers."""

    def __init__(self, config: Config, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.config = config
        widths = [encoder_width] + [decoder_width] * config.depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.init_weights()

    def init_weights(self) -> None:
        """Uniform in +-1/sqrt(fan in) for the first layers (torch's default for nn.Linear), zero for the last."""
        *first, last = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer in first:
            bound = layer.in_features**-0.5
            init.uniform_(layer.weight, -bound, bound)
            init.uniform_(layer.bias, -bound, bound)
        init.zeros_(last.weight)
        init.zeros_(last.bias)

    def num_tokens(self, grid: Grid) -> int:
        """Image tokens of a (rows, columns) patch grid."""
        return num_tokens(self.config, grid)

    def flops(self, grid: Grid) -> int:
        """Floating-point operations for one image."""
        return 2 * self.num_tokens(grid) * sum(p.numel() for p in self.parameters() if p.ndim == 2)

    def forward(self, features: Tensor, mask: Tensor | None, grid: Tensor) -> tuple[Tensor, Tensor | None]:
        """float[M, P, E], bool[M, P] or None, int64[M, 2] -> (float[M, P, D], the mask)."""
        activation = ACTIVATIONS[self.config.activation]
        for index, layer in enumerate(self.layers):
            features = layer(features if index == 0 else activation(features))
        return features, mask


SPEC = Spec(config=Config, build=Projector, num_tokens=num_tokens)
