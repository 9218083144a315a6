"""Projectors, one file each; the file name is the projector's kind.

A file defines

    Config      a frozen dataclass of the projector's own settings
    num_tokens  `num_tokens(config, grid) -> int`: image tokens of a (rows, columns) patch grid, at least 1; a longer
                axis never gives fewer
    Projector   `Projector(config, encoder_width, decoder_width)`, an nn.Module with
                `forward(features, mask, grid) -> (tokens, mask)`, `num_tokens(grid) -> int`, `init_weights()` and
                `flops(grid) -> int`: 2 per multiply-add of the matrix products for one image

`forward` gets float[M, P, E], bool[M, P] (None: every row is a patch) and int64[M, 2], the patches of an image in row
order, and gives float[M, Q, D] and bool[M, Q] (None: every row is a token). Rows that are no patches change nothing,
and neither do the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError, nearest
from vlm.registry import part

Grid = tuple[int, int]
"""(rows, columns) of an image's patches."""


def build(settings: dict[str, Any], encoder_width: int, decoder_width: int) -> nn.Module:
    """Make a projector from `{"kind": ..., **settings}`.

    Raises:
        ConfigError: unknown kind or setting, or widths that the projector cannot join.
    """
    module, config = _read(settings)
    projector: nn.Module = module.Projector(config, encoder_width, decoder_width)
    return projector


def counter(settings: dict[str, Any]) -> Callable[[Grid], int]:
    """A function that counts the image tokens of a patch grid, without making the projector.

    Raises:
        ConfigError: unknown kind or setting.
    """
    module, config = _read(settings)
    return partial(module.num_tokens, config)


def num_tokens(settings: dict[str, Any], grid: Grid) -> int:
    """Image tokens that the projector of these settings gives for a (rows, columns) patch grid.

    Raises:
        ConfigError: unknown kind or setting.
    """
    return counter(settings)(grid)


def full_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the defaults written out, so that two can be compared.

    Raises:
        ConfigError: unknown kind or setting.
    """
    _, config = _read(settings)
    return {"kind": settings["kind"], **asdict(config)}


def init_weights(projector: nn.Module) -> None:
    """Give a projector the initial weights that its file defines."""
    reset: Callable[[], None] = projector.init_weights  # type: ignore[assignment]
    reset()


def _read(settings: dict[str, Any]) -> tuple[Any, Any]:
    """(the projector's module, its Config)."""
    if not isinstance(settings, dict):
        raise ConfigError(f"projector settings are {settings!r}, expected such as {{'kind': 'pool', 'factor': 2}}")
    settings = dict(settings)
    kind = str(settings.pop("kind", None))
    module = part("vlm.projectors", kind)
    known = [item.name for item in fields(module.Config)]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"projector {kind!r} has no setting {key!r}{nearest(key, known)}; it has {', '.join(known) or 'none'}"
            )
    return module, module.Config(**settings)


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
