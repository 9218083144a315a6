"""Which checkpoint to take: what each use asks for, and what fits into a given memory.

`uses.yaml` holds, for each use, the checkpoints worth taking in the order of preference with a sentence each. The
numbers in those sentences are fields that are filled from `models.yaml`, so they cannot say anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vlm import settings
from vlm.catalogue.released import Checkpoint, find, load
from vlm.errors import ConfigError, nearest

FILE = Path(__file__).parent / "uses.yaml"
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
"""Bytes of a weight."""
WORKING = 750 * 10**6
"""Bytes taken for activations of one image and the accelerator's own needs: an allowance, not a measurement."""


@dataclass(frozen=True, kw_only=True)
class _Pick:
    id: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Use:
    """A use: what it asks for, in a sentence, and what is worth taking for it."""

    asks: str
    picks: tuple[_Pick, ...]


@dataclass(frozen=True, kw_only=True)
class _Uses:
    uses: dict[str, Use]


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A checkpoint and why it is worth taking."""

    checkpoint: Checkpoint
    why: str


def memory_bytes(checkpoint: Checkpoint, dtype: str = "bfloat16") -> int:
    """Memory to run a checkpoint on one image: weights of all parts, the decoder's cache in two bytes for all image
    tokens and the whole text, and `WORKING`. Training takes several times as much.

    Raises:
        ConfigError: an unknown dtype.
    """
    if dtype not in BYTES:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(dtype, BYTES)}; known: {', '.join(BYTES)}")
    weights = checkpoint.parameters["total"] * BYTES[dtype]
    return int(weights) + _cache_bytes(checkpoint) + WORKING


def _cache_bytes(checkpoint: Checkpoint) -> int:
    if checkpoint.decoder is None:
        return 0
    shape = load().decoders[checkpoint.decoder]
    return 2 * shape.depth * shape.kv_heads * shape.head_dim * 2 * (checkpoint.tokens + checkpoint.context)


@cache
def uses() -> Mapping[str, Use]:
    """Every use by its name."""
    return settings.load(_Uses, FILE).uses


def picks(use: str) -> list[Pick]:
    """What is worth taking for a use, the best first, whatever memory it takes.

    Raises:
        ConfigError: an unknown use.
    """
    if use not in uses():
        raise ConfigError(f"unknown use {use!r}{nearest(use, uses())}; known: {', '.join(uses())}")
    made = []
    for pick in uses()[use].picks:
        (checkpoint,) = find([pick.id])
        made.append(Pick(checkpoint=checkpoint, why=pick.why.format_map(_facts(checkpoint))))
    return made


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    """What a sentence may name: figures as printed in the papers, parameters in millions, tokens."""
    figures = {name: f"{value:.1f}" for name, value in checkpoint.published.items()}
    parts = {f"{name}_m": f"{count / 1e6:,.0f} M" for name, count in checkpoint.parameters.items()}
    return {**figures, **parts, "tokens": str(checkpoint.tokens)}
