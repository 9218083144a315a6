"""Weights of a single part from a published checkpoint: a SigLIP tower, a Gemma decoder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Siglip2VisionModel
from transformers.utils import cached_file

from vlm.errors import CheckpointError

NEW_ROW_STD = 0.02
"""New vocabulary rows are N(0, 0.02): better than the average embedding (PaliGemma, section 5.3)."""


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a directory or hub repository, by its index when it is sharded.

    Raises:
        CheckpointError: none is found, a shard is missing, or the index names a file outside the directory.
    """
    if Path(path).is_dir():
        folder = Path(path)
        index = folder / "model.safetensors.index.json"
        names = _shards(index) if index.is_file() else ["model.safetensors"]
        files = [folder / name for name in names]
    else:
        single = cached_file(str(path), "model.safetensors", _raise_exceptions_for_missing_entries=False)
        if single is not None:
            return [Path(single)]
        index_file = cached_file(str(path), "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        if index_file is None:
            raise CheckpointError(f"{path}: no model.safetensors and no index; only safetensors checkpoints are read")
        files = [Path(str(cached_file(str(path), name))) for name in _shards(Path(index_file))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; only safetensors checkpoints are read")
    return files


def _shards(index: Path) -> list[str]:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name; refused")
    return names


def read_tensors(path: str | Path, prefixes: tuple[str, ...], drop: str | None = None) -> dict[str, Tensor]:
    """Tensors whose names start with one of the prefixes, with the prefix removed (the first that matches anything is
    used).

    Args:
        prefixes: tried in order; `""` takes every tensor.
        drop: regular expression of names (after the prefix) to leave out.
    """
    files = weight_files(path)
    names: dict[str, Path] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            names.update(dict.fromkeys(opened.keys(), file))
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in names)), None)
    if prefix is None:
        raise CheckpointError(
            f"{path}: no tensor starts with {' or '.join(map(repr, prefixes))}; found e.g. {sorted(names)[:3]}"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():
                short = name.removeprefix(prefix)
                if name.startswith(prefix) and not (drop and re.match(drop, short)):
                    tensors[short] = opened.get_tensor(name)
    return tensors


def load_tower(tower: nn.Module, path: str | Path) -> None:
    """Fill a SigLIP tower from a full SigLIP checkpoint or from a vision tower alone; the pooling head is left out.

    Raises:
        CheckpointError: tensors are missing, unexpected or mis-shaped.
    """
    drop = r"(head\.|text_model\.|logit_|embeddings\.position_ids)"
    tensors = read_tensors(path, ("vision_model.", "model.vision_model.", ""), drop)
    patch = "embeddings.patch_embedding.weight"
    if isinstance(tower, Siglip2VisionModel) and tensors[patch].ndim == 4:
        # A convolution over whole patches is a linear layer on (y, x, channel) patches.
        tensors[patch] = tensors[patch].permute(0, 2, 3, 1).flatten(1)
    fill(tower, tensors, path)


def load_decoder(decoder: nn.Module, path: str | Path, old_rows: int) -> None:
    """Fill a Gemma decoder; vocabulary rows beyond the checkpoint's are drawn from N(0, 0.02).

    Args:
        old_rows: vocabulary size of the checkpoint.

    Raises:
        CheckpointError: tensors are missing, unexpected or mis-shaped.
    """
    tensors = read_tensors(
        path, ("language_model.model.", "model.language_model.", "model.", ""), r"lm_head\.|.*rotary_emb\."
    )
    name = "embed_tokens.weight"
    table = tensors.get(name)
    wanted = decoder.get_input_embeddings().weight.shape  # type: ignore[operator]
    if table is not None and table.shape[0] == old_rows and old_rows < wanted[0]:
        rows = torch.randn(wanted[0] - old_rows, wanted[1]) * NEW_ROW_STD
        tensors[name] = torch.cat([table, rows.to(table.dtype)])
    fill(decoder, tensors, path)


def fill(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Strict load: every tensor of the module from the checkpoint, nothing left over.

    Raises:
        CheckpointError: with the lists.
    """
    own = module.state_dict()
    problems = {
        "missing": sorted(set(own) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(own)),
        "mis-shaped": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(set(own) & set(tensors))
            if own[name].shape != tensors[name].shape
        ],
    }
    if any(problems.values()):
        shown = "; ".join(f"{what}: {', '.join(names[:6])}" for what, names in problems.items() if names)
        raise CheckpointError(f"{path}: does not fit a {type(module).__name__} of this configuration: {shown}")
    module.load_state_dict(tensors)
