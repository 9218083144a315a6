"""Weights of a single part from a published checkpoint: a SigLIP tower, a Gemma decoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Siglip2VisionModel

from vlm.checkpoints import big_vision
from vlm.checkpoints.big_vision_names import rules
from vlm.checkpoints.files import Weights, locate
from vlm.checkpoints.loader import Source, check_fit, expected_shapes, finite
from vlm.checkpoints.names import TOWER
from vlm.encoders.siglip import resample_position_table
from vlm.errors import CheckpointError

NEW_ROW_STD = 0.02
"""New vocabulary rows are N(0, 0.02): better than the average embedding (PaliGemma, section 5.3)."""
TOWER_PREFIXES = ("vision_tower.vision_model.", "vision_model.", "model.vision_model.", "")
DECODER_PREFIXES = ("language_model.model.", "model.language_model.", "model.", "")
NOT_TOWER = r"(head\.|text_model\.|logit_|embeddings\.position_ids)"
NOT_DECODER = r"(lm_head\.|.*rotary_emb\.)"
PATCH, POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"


def load_tower(
    tower: nn.Module, path: str | Path, *, resize_positions: bool = False, allow_nonfinite: bool = False
) -> None:
    """Fill a SigLIP tower from a full SigLIP checkpoint, from a vision tower alone (Hugging Face directory, hub id), or
    from a big_vision `.npz`; the pooling head is left out.

    A patch convolution becomes the equal linear layer where the tower is NaFlex.

    Args:
        resize_positions: resample the position table to the tower's size (`resample_position_table`); otherwise another
            size is an error.

    Raises:
        CheckpointError: tensors are missing, unexpected, mis-shaped, quantised or not finite.
    """
    if Path(path).suffix == ".npz":
        with big_vision.open_npz(path) as arrays:
            shapes, dtypes = big_vision.headers(arrays, str(path))
            kept = {
                n: s for n, s in shapes.items() if n.startswith("img/") and not re.match(r"img/(MAPHead_0|head)/", n)
            }
            found = rules(kept, two_towers=False, origin=str(path))
            source = big_vision.array_source(arrays, kept, dtypes, found, str(path))
            _fill_tower(tower, part_of(source, (TOWER,), NOT_TOWER), resize_positions, allow_nonfinite)
        return
    source = part_of(directory_source(path), TOWER_PREFIXES, NOT_TOWER)
    _fill_tower(tower, source, resize_positions, allow_nonfinite)


def _fill_tower(tower: nn.Module, source: Source, resize_positions: bool, allow_nonfinite: bool) -> None:
    shape = source.shapes.get(PATCH, ())
    if isinstance(tower, Siglip2VisionModel) and len(shape) == 4:
        # A convolution over whole patches is a linear layer on (y, x, channel) patches.
        flat = (shape[0], shape[1] * shape[2] * shape[3])
        source = _changed(source, PATCH, flat, lambda kernel: kernel.permute(0, 2, 3, 1).flatten(1).contiguous())
    wanted = expected_shapes(tower)[POSITIONS]
    if resize_positions and POSITIONS in source.shapes and source.shapes[POSITIONS][1:] == wanted[1:]:
        source = _changed(source, POSITIONS, wanted, lambda table: resample_position_table(table, wanted[0]))
    fill(tower, source, allow_nonfinite=allow_nonfinite)


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


def directory_source(path: str | Path) -> Source:
    """All tensors of a Hugging Face directory or hub repository, by the names in its files."""
    weights = Weights(locate(path))
    return Source(
        str(path),
        {name: info.shape for name, info in weights.tensors.items()},
        {name: info.dtype for name, info in weights.tensors.items()},
        weights.read,
    )


def part_of(source: Source, prefixes: tuple[str, ...], drop: str) -> Source:
    """The tensors whose names start with one of the prefixes, with the prefix removed (the first that fits any name is
    used).

    Args:
        prefixes: tried in order; `""` takes every tensor.
        drop: regular expression of names (after the prefix) to leave out.

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
        name.removeprefix(prefix): name
        for name in source.shapes
        if name.startswith(prefix) and not re.match(drop, name.removeprefix(prefix))
    }
    return Source(
        source.origin,
        {short: source.shapes[name] for short, name in names.items()},
        {short: source.dtypes[name] for short, name in names.items()},
        lambda short: source.read(names[short]),
    )


def _changed(source: Source, name: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Source:
    """The source with one tensor computed from the stored one."""
    return replace(
        source,
        shapes={**source.shapes, name: shape},
        read=lambda wanted: change(source.read(wanted)) if wanted == name else source.read(wanted),
    )


def fill(module: nn.Module, source: Source, *, allow_nonfinite: bool = False) -> None:
    """Strict load: every tensor of the module from the source, nothing left over, in the module's dtype.

    Raises:
        CheckpointError: with the lists.
    """
    own: Mapping[str, Tensor] = module.state_dict()
    check_fit(source, expected_shapes(module))
    with torch.no_grad():
        for name in source.shapes:
            own[name].copy_(finite(source.read(name), name, source.origin, allow_nonfinite))
