"""A model directory that stands alone: config.json, safetensors, tokenizer, processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vlm.checkpoints.parts import weight_files
from vlm.config import VLMConfig
from vlm.errors import CheckpointError, ConfigError, nearest
from vlm.generation import check_dtype
from vlm.model import VLM
from vlm.processor import Processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    force_fp16: bool = False,
) -> tuple[VLM, Processor]:
    """Open a model directory or hub id.

    Args:
        dtype: `float32`, `bfloat16`, `float16` or a torch dtype; None keeps the checkpoint's.
        device: where the model goes; None stays on the CPU.
        attn_implementation: `sdpa` or `eager` for tower and decoder; None chooses (eager for decoders with an attention
            soft-cap). force_fp16: open in float16 although Gemma overflows there.

    Returns:
        (model in eval mode, processor).

    Raises:
        CheckpointError: tensors are missing, unexpected or mis-shaped, a file is missing or broken, or model and
            processor do not belong together.
        GenerationError: float16 without `force_fp16`.
        ConfigError: an unknown dtype, or an attention backend that would drop the decoder's soft-cap.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json in this directory; give the directory that vlm.save wrote")
    if not Path(path).exists() and str(path).count("/") != 1:
        raise CheckpointError(f"{path}: no such directory, and not a hub id (owner/name)")
    processor = Processor.from_pretrained(path)
    model = _open(path, _dtype(dtype))
    check_pair(str(path), model, processor)
    check_dtype(model.config, model.dtype, force=force_fp16)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), processor


def _open(path: str | Path, dtype: Any) -> VLM:
    """The model of a directory or hub id, every tensor accounted for."""
    try:
        kind = VLMConfig.get_config_dict(str(path))[0].get("model_type")
        if kind != VLMConfig.model_type:
            raise CheckpointError(f"{path}: config.json has model_type {kind!r}, expected {VLMConfig.model_type!r}")
        if Path(path).is_dir():
            weight_files(path)
        # Mis-shaped tensors are let through here, to be listed with the missing and unexpected ones.
        opened: Any = VLM.from_pretrained(
            str(path), dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    model, info = opened
    check_report(str(path), info)
    return model


def save(model: VLM, processor: Processor, path: str | Path, *, max_shard_size: str = "5GB") -> Path:
    """Write a model directory that `load` and transformers' Auto classes open bit for bit."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    check_pair(str(path), model, processor)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    return folder


def check_report(path: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that did not fill the model exactly.

    Raises:
        CheckpointError: with the lists of missing, unexpected and mis-shaped tensors.
    """
    problems = []
    for key, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "mis-shaped"),
    ):
        names = sorted(str(name) for name in info.get(key) or [])
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            problems.append(f"{len(names)} {what}: {shown}")
    if problems:
        raise CheckpointError(f"{path}: the weights do not fit config.json: {'; '.join(problems)}")


def check_pair(path: str, model: VLM, processor: Processor) -> None:
    """Model and processor must agree on the placeholder, the vocabulary and the image size.

    Raises:
        CheckpointError: names the number that differs.
    """
    config, tokenizer = model.config, processor.tokenizer
    if processor.image_token_id != config.image_token_id:
        raise CheckpointError(
            f"{path}: <image> is id {processor.image_token_id} in the tokenizer, image_token_id"
            f" {config.image_token_id} in config.json; use the"
            " tokenizer that belongs to the model"
        )
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.text_config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has id {highest}, the embedding only {config.text_config.vocab_size} rows; use"
            f" the tokenizer that belongs to the model"
        )
    vision, transform = config.vision_config, processor.image_transform
    for name in ("patch_size", "image_size"):
        wanted, got = getattr(vision, name, None), getattr(transform, name)
        if wanted is not None and got is not None and wanted != got:
            raise CheckpointError(
                f"{path}: the tower has {name} {wanted}, the processor's image_transform {got}; they must be equal"
            )
    if (transform.mode == "naflex") != (config.encoder == "siglip2_naflex"):
        raise CheckpointError(f"{path}: image mode {transform.mode!r} does not fit encoder {config.encoder!r}")


def _dtype(dtype: str | torch.dtype | None) -> Any:
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    return DTYPES[dtype]
