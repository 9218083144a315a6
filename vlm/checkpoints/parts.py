"""Weights of a single part from a published checkpoint: a vision tower, a Gemma decoder."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.checkpoints import big_vision
from vlm.checkpoints.names import DECODER, TOWER
from vlm.checkpoints.source import Source, expected_shapes, fill
from vlm.checkpoints.weights import directory_source
from vlm.encoders.contract import Spec
from vlm.errors import CheckpointError
from vlm.model.parts import encoder_spec, kind_of

NEW_ROW_STD = 0.02
"""New vocabulary rows are N(0, 0.02): better than the average embedding (PaliGemma, section 5.3)."""
DECODER_PREFIXES = (DECODER, "model.", "")
"""Of live names: a whole model's, then those of a Gemma alone."""
NOT_DECODER = r"(lm_head\.|.*rotary_emb\.)"


def load_tower(
    tower: nn.Module, path: str | Path, *, resize_positions: bool = False, allow_nonfinite: bool = False
) -> None:
    """Fill a tower from a checkpoint of its kind (Hugging Face directory or hub id: with or without a text tower, or a
    whole model in any layout of names that `vlm.load` reads), or from a big_vision `.npz`. What the encoder's file
    leaves out is not read, nor are blocks above the feature layers.

    A patch convolution becomes the equal linear layer where the tower has one, and the other way round.

    Args:
        resize_positions: resample the position table to the tower's size as the encoder's file says; otherwise another
            size is an error.

    Raises:
        CheckpointError: tensors are missing, unexpected, mis-shaped, quantised or not finite.
    """
    spec = encoder_spec(kind_of(tower))
    config: Any = tower.config
    wanted = expected_shapes(tower)
    if Path(path).suffix == ".npz":
        with big_vision.open_npz(path) as arrays:
            tower_alone = r"img/(?!MAPHead_0/|head/)"
            source = big_vision.source(arrays, str(path), two_towers=False, wanted=tower_alone)
            source = as_tower(source, spec, config, wanted, (TOWER,), resize_positions=resize_positions)
            fill(tower, source, allow_nonfinite=allow_nonfinite)
        return
    weights = directory_source(path, spec.weights_file)
    prefixes = (TOWER, *spec.prefixes)
    source = as_tower(weights, spec, config, wanted, prefixes, resize_positions=resize_positions)
    fill(tower, source, allow_nonfinite=allow_nonfinite)


def as_tower(
    source: Source,
    spec: Spec,
    config: Any,
    wanted: Mapping[str, tuple[int, ...]],
    prefixes: tuple[str, ...] = ("",),
    *,
    resize_positions: bool,
) -> Source:
    """The tensors of a tower under the names and in the shapes of a configuration.

    Args:
        spec: what the encoder's file says.
        config: the configuration that they are for.
        wanted: name -> shape of its tensors.
        prefixes: what may stand before the tower's names in the source.
        resize_positions: as for `load_tower`.

    Raises:
        CheckpointError: no name starts with any prefix.
    """
    if members := spec.members(config):
        return _as_members(source, members, wanted, prefixes, resize_positions)
    source = part_of(source, prefixes, spec.not_read(config), spec.rename)
    own = {spec.rename(name): name for name in wanted}
    source = _renamed(source, {own.get(name, name): name for name in source.shapes})
    from_squares, from_naflex = _kernels(source, wanted)
    for name in from_squares:
        # A convolution over whole patches is a linear layer on (y, x, channel) patches.
        source = _changed(source, name, wanted[name], lambda kernel: kernel.permute(0, 2, 3, 1).flatten(1))
    for name in from_naflex:
        source = _changed(source, name, wanted[name], partial(_as_kernel, shape=wanted[name]))
    resample = (spec.adopt_positions if from_naflex else None) or spec.resample
    for positions in spec.positions if resize_positions else ():
        if positions in wanted and source.shapes.get(positions, ())[-1:] == wanted[positions][-1:]:
            source = _changed(source, positions, wanted[positions], lambda table: resample(table, config))
    return source


def _kernels(source: Source, wanted: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """Patch embeddings that are convolutions and should be linear layers, and those that should be the reverse."""
    flat, kernels = [], []
    for name, shape in source.shapes.items():
        target = wanted.get(name, ())
        if len(shape) == 4 and target == (shape[0], math.prod(shape[1:])):
            flat.append(name)
        elif len(target) == 4 and shape == (target[0], math.prod(target[1:])):
            kernels.append(name)
    return flat, kernels


def _as_kernel(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float[E, P*P*C], a linear layer on (y, x, channel) patches, as the convolution float[E, C, P, P]."""
    _, channels, rows, columns = shape
    return matrix.unflatten(1, (rows, columns, channels)).permute(0, 3, 1, 2).contiguous()


def _as_members(
    source: Source,
    members: list[tuple[str, Any]],
    wanted: Mapping[str, tuple[int, ...]],
    prefixes: tuple[str, ...],
    resize: bool,
) -> Source:
    """The members of a fused tower, each by itself."""
    source = part_of(source, prefixes, r"(?!)")
    pieces: dict[str, tuple[Source, str]] = {}
    for number, (kind, member) in enumerate(members):
        prefix = f"members.{number}."
        own = {name.removeprefix(prefix): shape for name, shape in wanted.items() if name.startswith(prefix)}
        piece = as_tower(source, encoder_spec(kind), member, own, (prefix,), resize_positions=resize)
        pieces |= {prefix + name: (piece, name) for name in piece.shapes}
    known = tuple(f"members.{number}." for number in range(len(members)))
    pieces |= {name: (source, name) for name in source.shapes if not name.startswith(known)}  # refused as unexpected
    return Source(
        source.origin,
        {name: piece.shapes[own] for name, (piece, own) in pieces.items()},
        {name: piece.dtypes[own] for name, (piece, own) in pieces.items()},
        lambda name: pieces[name][0].read(pieces[name][1]),
    )


def load_decoder(decoder: nn.Module, path: str | Path, old_rows: int, *, allow_nonfinite: bool = False) -> None:
    """Fill a Gemma decoder; vocabulary rows beyond the checkpoint's are drawn from N(0, 0.02).

    Args:
        old_rows: vocabulary size of the checkpoint.

    Raises:
        CheckpointError: tensors are missing, unexpected, mis-shaped, quantised or not finite.
    """
    source = part_of(directory_source(path), DECODER_PREFIXES, NOT_DECODER)
    name = "embed_tokens.weight"
    wanted = expected_shapes(decoder)[name]
    shape = source.shapes.get(name, ())
    if shape[:1] == (old_rows,) and old_rows < wanted[0]:
        rows = torch.randn(wanted[0] - old_rows, wanted[1]) * NEW_ROW_STD
        source = _changed(source, name, wanted, lambda table: torch.cat([table, rows.to(table.dtype)]))
    fill(decoder, source, allow_nonfinite=allow_nonfinite)


def part_of(
    source: Source, prefixes: tuple[str, ...], drop: str, rename: Callable[[str], str] = lambda name: name
) -> Source:
    """The tensors whose names start with one of the prefixes, with the prefix removed (the first that fits any name is
    used).

    Args:
        prefixes: tried in order; `""` takes every tensor.
        drop: regular expression of names (after the prefix and `rename`) to leave out.
        rename: to the spelling that `drop` means.

    Raises:
        CheckpointError: no name starts with any of them.
    """
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in source.shapes)), None)
    if prefix is None:
        raise CheckpointError(
            f"{source.origin}: no tensor starts with {' or '.join(map(repr, prefixes))}; found e.g."
            f" {sorted(source.shapes)[:3]}"
        )
    names = {
        rename(name.removeprefix(prefix)): name
        for name in source.shapes
        if name.startswith(prefix) and not re.match(drop, rename(name.removeprefix(prefix)))
    }
    return _renamed(source, names)


def _renamed(source: Source, names: Mapping[str, str]) -> Source:
    """The tensors `names[new]` of a source by their new names."""
    return Source(
        source.origin,
        {new: source.shapes[name] for new, name in names.items()},
        {new: source.dtypes[name] for new, name in names.items()},
        lambda new: source.read(names[new]),
    )


def _changed(source: Source, name: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Source:
    """The source with one tensor computed from the stored one."""
    return replace(
        source,
        shapes={**source.shapes, name: shape},
        read=lambda wanted: change(source.read(wanted)) if wanted == name else source.read(wanted),
    )
