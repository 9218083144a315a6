"""Opening models: this library's directories, PaliGemma in Hugging Face format, big_vision files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm import ranks
from vlm.checkpoints import big_vision, big_vision_model, configs, in_stage, manifest
from vlm.checkpoints.files import check_regular, read_json
from vlm.checkpoints.geometry import with_geometry
from vlm.checkpoints.loader import load_model
from vlm.checkpoints.names import HEAD
from vlm.checkpoints.opening import Opening
from vlm.checkpoints.pairs import check_pair
from vlm.checkpoints.placement import Placement
from vlm.checkpoints.places import locate
from vlm.checkpoints.preprocessing import from_sentencepiece
from vlm.checkpoints.readers import READERS
from vlm.checkpoints.tower_head import read_head
from vlm.checkpoints.weights import Weights
from vlm.errors import CheckpointError, ConfigError
from vlm.model import decoder
from vlm.model.attention_backends import check_name
from vlm.model.dtypes import check_dtype, named
from vlm.model.forward import VLM
from vlm.model.parts import model_types
from vlm.model.processor import Processor

logger = logging.getLogger(__name__)
EXPECTED_GENERATION_SETTINGS = {
    "_from_model_config",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "cache_implementation",
    "do_sample",
    "max_length",
    "suppress_tokens",
}
"""What published files hold, and what this library decides itself."""


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    attn_implementation: str | None = None,
    tokenizer: str | Path | None = None,
    force_fp16: bool = False,
    allow_nonfinite: bool = False,
    verify: manifest.Verify = "quick",
    revision: str | None = None,
) -> tuple[VLM, Processor]:
    """Open a model.

    Args:
        path: a directory that `vlm.save` wrote, a training run or a stage of one (its model), a checkpoint inside a
            stage, a PaliGemma 1 or 2 directory in Hugging Face format, a hub id of either, or a big_vision `.npz` of
            PaliGemma.
        dtype: `float32`, `bfloat16`, `float16` or a torch dtype; None keeps each tensor's own.
        device: where the whole model goes; None is the CPU.
        device_map: instead of `device`: `auto` (GPUs first, then memory, then disk), or part name -> device.
        max_memory: device -> bytes or `"10GB"`, for `device_map="auto"`.
        offload_folder: where parts on `disk` are written.
        attn_implementation: `sdpa` or `eager` for tower and decoder; None chooses (eager for decoders with an attention
            soft-cap).
        tokenizer: the sentencepiece `.model` that belongs to a `.npz`.
        force_fp16: open in float16 although Gemma overflows there.
        allow_nonfinite: open weights that hold NaN or infinity.
        verify: how much to compare with `manifest.json`: `quick`, `full` or `none`.
        revision: of a hub id.

    Returns:
        (model in eval mode, processor).

    Raises:
        CheckpointError: a file is missing or broken; tensors are missing, unexpected, mis-shaped, quantised or not
            finite; model and processor do not belong together.
        GenerationError: float16 without `force_fp16`.
        ConfigError: an unknown dtype, or an attention backend that there is not, or that would drop the decoder's
            soft-cap.
    """
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map are both given; use one")
    check_name(attn_implementation)
    if in_stage.is_checkpoint(path):
        settings: dict[str, Any] = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
        settings |= {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        settings |= {"force_fp16": force_fp16, "allow_nonfinite": allow_nonfinite, "verify": verify}
        return _open_in_stage(path, settings)
    placement = Placement(
        dtype=None if dtype is None else named(dtype),
        device=torch.device(device or "cpu"),
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    if Path(path).suffix == ".npz":
        model, processor = _open_big_vision(path, tokenizer, placement, allow_nonfinite)
    else:
        if tokenizer is not None:
            raise ConfigError(f"{path} has its own tokenizer; tokenizer= is for a big_vision .npz")
        model, processor = _open_folder(path, revision, verify, placement, allow_nonfinite)
    for decoders in {parameter.dtype for parameter in model.parts()["decoder"].parameters()}:
        check_dtype(model.config, decoders, force=force_fp16)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model, processor


def open_model(path: str | Path, opening: Opening | None = None) -> tuple[VLM, Processor]:
    """Model and processor of a directory or hub id, opened for work.

    Raises:
        ConfigError: a geometry that the model cannot have. CheckpointError, GenerationError: as `load`.
    """
    opening = opening or Opening()
    device = opening.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{ranks.local_rank() % torch.cuda.device_count()}"
    return in_geometry(load(path, dtype=opening.dtype, device=device), opening.geometry)


def in_geometry(pair: tuple[VLM, Processor], geometry: Mapping[str, Any] | None) -> tuple[VLM, Processor]:
    """The pair, reading its images in another way; the pair itself where none is asked for."""
    return with_geometry(*pair, **geometry) if geometry else pair


def _open_in_stage(path: str | Path, settings: dict[str, Any]) -> tuple[VLM, Processor]:
    """The model of a training stage as it was at one step: what the stage began with, in the stage's geometry, and the
    tensors of the checkpoint in the place of those that train.

    Args:
        settings: of `load`, for the model that the stage began with.
    """
    start, geometry = in_stage.began_with(path, settings["verify"])
    model, processor = with_geometry(*load(start, **settings), **geometry)
    in_stage.fill(model, path, start, settings["allow_nonfinite"])
    return model, processor


def _open_folder(
    path: str | Path, revision: str | None, verify: manifest.Verify, placement: Placement, allow_nonfinite: bool
) -> tuple[VLM, Processor]:
    folder = locate(path, revision=revision)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json in this directory; give the directory that vlm.save wrote")
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise CheckpointError(f"{folder}: config.json has model_type {kind!r}, expected {_expected(values)}")
    config, processor = READERS[kind](folder, values)
    source = Weights(folder).source(str(path))
    if values.get("tie_word_embeddings") is False and HEAD not in source.shapes:
        raise CheckpointError(
            f"{path}: config.json has tie_word_embeddings false, but there is no lm_head.weight: the output embedding"
            f" was not saved; if it is tied, write true"
        )
    configs.check_layers(config, source.shapes, str(path))
    check_pair(str(path), config, processor)
    # Last, because it cannot say what is wrong inside a file.
    model = load_model(
        VLM,
        config,
        source,
        placement,
        allow_nonfinite=allow_nonfinite,
        before_reading=lambda: manifest.check(folder, verify),
    )
    model.tower_head = read_head(folder)
    _note_generation_settings(folder)
    return model, processor


def _expected(values: Mapping[str, Any]) -> str:
    kind, known = values.get("model_type"), " or ".join(map(repr, READERS))
    if isinstance(kind, str) and kind in model_types():  # a damaged file may say a list here
        if "text_config" in values:
            uses = "vlm classify, vlm embed, vlm eval --tasks zeroshot,retrieval"
            return f"{known}; these are two towers, which write no text: {uses}; build a model on it: vlm new --encoder"
        return f"{known}; this is a vision tower, build a model on it: vlm new --encoder"
    if kind in decoder.checkpoint_types():
        return f"{known}; this is a decoder, build a model on it: vlm new --decoder"
    return known


def _open_big_vision(
    path: str | Path, tokenizer: str | Path | None, placement: Placement, allow_nonfinite: bool
) -> tuple[VLM, Processor]:
    check_regular(Path(path))
    if tokenizer is None:
        raise CheckpointError(
            f"{path}: a big_vision file holds no tokenizer; convert it once with `vlm import {path} --tokenizer"
            f" tokenizer.model --out DIR`, or give the sentencepiece model: tokenizer='tokenizer.model'"
        )
    with big_vision.open_npz(path) as arrays:
        return big_vision_model.paligemma(
            arrays,
            from_sentencepiece(tokenizer),
            origin=str(path),
            placement=placement,
            allow_nonfinite=allow_nonfinite,
        )


def _note_generation_settings(folder: Path) -> None:
    """A checkpoint's `generation_config.json` is not used: transformers would fill every setting that a caller leaves
    open from it, and a caption would depend on a file nobody reads."""
    if not (folder / "generation_config.json").exists():
        return
    ignored = sorted(set(read_json(folder / "generation_config.json")) - EXPECTED_GENERATION_SETTINGS)
    if ignored:
        logger.info("%s: generation_config.json sets %s; not used, give settings yourself", folder, ", ".join(ignored))
