"""What a projector says of itself: the `Spec` of its file, and what the files share.

A projector is an nn.Module with `forward(features, mask, grid) -> (tokens, mask)`, `num_tokens(grid) -> int`,
`init_weights()` and `flops(grid) -> int`: 2 per multiply-add of the matrix products for one image.

`forward` gets float[M, P, E], bool[M, P] (None: every row is a patch) and int64[M, 2], the patches of an image in row
order, and gives float[M, Q, D] and bool[M, Q] (None: every row is a token). Rows that are no patches change nothing,
and neither do the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError

Grid = tuple[int, int]
"""(rows, columns) of an image's patches."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A projector, declared by its file as `SPEC`.

    Attributes:
        config: a frozen dataclass of the projector's own settings.
        build: `build(config, encoder_width, decoder_width) -> nn.Module`.
        num_tokens: `num_tokens(config, grid) -> int`: image tokens of a (rows, columns) patch grid, at least 1; a
            longer axis never gives fewer.
        in_paligemma: PaliGemma's format holds it.
    """

    config: type[Any]
    build: Callable[[Any, int, int], nn.Module]
    num_tokens: Callable[[Any, Grid], int]
    in_paligemma: bool = False


def at_least(kind: str, name: str, value: object, lowest: int, advice: str = "") -> None:
    """Refuse a setting that is no integer, or too small.

    Raises:
        ConfigError: names the projector and the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ConfigError(
            f"projector {kind}: {name} is {value!r}, expected an integer of at least {lowest}{advice and f'; {advice}'}"
        )


def on_grids(
    change: Callable[[Tensor], Tensor], features: Tensor, mask: Tensor | None, grid: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Change the patch grid of every image, those of one shape together; padding rows are left out first.

    Args:
        change: float[m, rows, columns, E] -> float[m, new rows, new columns, W], each image by itself.
        features, mask, grid: what a projector's forward gets.

    Returns:
        (float[M, Q, W], bool[M, Q]): the new grids in row order, zeros after the shorter ones. The mask is None when
        none came in and all are of one length.
    """
    groups: dict[Grid, list[int]] = {}
    for image, (rows, columns) in enumerate(grid.tolist()):
        groups.setdefault((rows, columns), []).append(image)
    changed = []
    for (rows, columns), images in groups.items():
        patches = features[images] if mask is None else features[images][mask[images]]
        changed.append(change(patches.reshape(len(images), rows, columns, -1)).flatten(1, 2))
    lengths = [tokens.shape[1] for tokens in changed]
    padded = [nn.functional.pad(tokens, (0, 0, 0, max(lengths) - tokens.shape[1])) for tokens in changed]
    order = torch.tensor([image for images in groups.values() for image in images], device=features.device).argsort()
    tokens = torch.cat(padded)[order]
    if mask is None and len(set(lengths)) == 1:
        return tokens, None
    counts = [length for length, images in zip(lengths, groups.values(), strict=True) for _ in images]
    ends = torch.tensor(counts, device=features.device)[order]
    return tokens, torch.arange(max(lengths), device=features.device) < ends[:, None]
