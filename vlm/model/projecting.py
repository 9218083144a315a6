"""From the settings of a projector, `{"kind": ..., **settings}`, to the projector, its token count and its defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from torch import nn

from vlm.errors import ConfigError, nearest
from vlm.projectors.contract import Grid, Spec
from vlm.registry import part


def named(kind: str) -> Spec:
    """What the file of a projector says of it.

    Raises:
        ConfigError: there is no such projector; the message lists the known ones.
    """
    found: Spec = part("vlm.projectors", kind).SPEC
    return found


def build(settings: dict[str, Any], encoder_width: int, decoder_width: int) -> nn.Module:
    """Make a projector from `{"kind": ..., **settings}`.

    Raises:
        ConfigError: unknown kind or setting, or widths that the projector cannot join.
    """
    spec, config = _read(settings)
    return spec.build(config, encoder_width, decoder_width)


def counter(settings: dict[str, Any]) -> Callable[[Grid], int]:
    """A function that counts the image tokens of a patch grid, without making the projector.

    Raises:
        ConfigError: unknown kind or setting.
    """
    spec, config = _read(settings)
    return partial(spec.num_tokens, config)


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


def _read(settings: dict[str, Any]) -> tuple[Spec, Any]:
    """(what the projector's file says, its settings)."""
    if not isinstance(settings, dict):
        raise ConfigError(f"projector settings are {settings!r}, expected such as {{'kind': 'pool', 'factor': 2}}")
    settings = dict(settings)
    kind = str(settings.pop("kind", None))
    spec = named(kind)
    known = [item.name for item in fields(spec.config)]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"projector {kind!r} has no setting {key!r}{nearest(key, known)}; it has {', '.join(known) or 'none'}"
            )
    return spec, spec.config(**settings)
