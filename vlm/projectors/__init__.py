"""Projectors, one file each; the file name is the projector's kind.

A file defines

    Config      a frozen dataclass of the projector's own settings
    Projector   `Projector(config, encoder_width, decoder_width)`, an nn.Module with
                `forward(features, mask, grid) -> (tokens, mask)`, `num_tokens(grid) -> int` and `init_weights()`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn

from vlm.config import part
from vlm.errors import ConfigError, nearest


def build(settings: dict[str, Any], encoder_width: int, decoder_width: int) -> nn.Module:
    """Make a projector from `{"kind": ..., **settings}`.

    Raises:
        ConfigError: unknown kind or setting.
    """
    settings = dict(settings)
    kind = str(settings.pop("kind", None))
    module = part("vlm.projectors", kind)
    known = [item.name for item in fields(module.Config)]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"projector {kind!r} has no setting {key!r}{nearest(key, known)}; it has {', '.join(known) or 'none'}"
            )
    projector: nn.Module = module.Projector(module.Config(**settings), encoder_width, decoder_width)
    return projector


def init_weights(projector: nn.Module) -> None:
    """Give a projector the initial weights that its file defines."""
    reset: Callable[[], None] = projector.init_weights  # type: ignore[assignment]
    reset()
