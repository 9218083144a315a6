"""SigLIP and SigLIP 2 with both towers, out of checkpoints and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints import big_vision
from vlm.checkpoints.big_vision_configs import text_config, vision_config
from vlm.checkpoints.checks import FOREIGN, check_numbers, guarded
from vlm.checkpoints.files import read_json
from vlm.checkpoints.image_settings import OWN_TRANSFORM
from vlm.checkpoints.places import locate
from vlm.checkpoints.preprocessing import open_tokenizer
from vlm.checkpoints.recorded import recorded_transform, written_transform
from vlm.checkpoints.source import FLOATS, Source, place, put
from vlm.checkpoints.weights import Weights
from vlm.errors import CheckpointError
from vlm.files import write_json
from vlm.images.transforms import ImageTransform
from vlm.model.dtypes import named
from vlm.model.dual import FAMILY, DualTower
from vlm.model.parts import encoder_spec, model_types, text_towers
from vlm.siglip.processor import DualProcessor
from vlm.siglip.rules import RULES

log = logging.getLogger(__name__)
VOCABULARIES = {32_000: "siglip", 250_000: "siglip", 256_000: "siglip2"}
"""Family by the vocabulary of the released text towers: c4_en, mC4, Gemma."""
SCALARS = ("logit_scale", "logit_bias")


def load(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    allow_nonfinite: bool = False,
) -> tuple[DualTower, DualProcessor]:
    """Open a checkpoint with both towers: a Hugging Face directory or hub id, a big_vision `.npz`, or one of `save`.

    Args:
        device: where the model lies; None: the CPU.
        dtype: of its weights, by name or torch's own; None keeps the checkpoint's. Scale and bias stay in float32.
        tokenizer: a transformers tokenizer, or a folder that has one; None: the checkpoint's own. A checkpoint without
            one reads images only.
        revision: of a hub id.
        allow_nonfinite: open weights that hold NaN or infinity.

    Returns:
        (model in eval mode, processor).

    Raises:
        CheckpointError: files or tensors that are missing, unexpected, mis-shaped or not finite.
    """
    if Path(path).suffix == ".npz":
        folder = Path(path)
        with big_vision.open_npz(path) as arrays:
            model = from_big_vision(arrays, origin=str(path), allow_nonfinite=allow_nonfinite, dtype=dtype)
    else:
        folder = locate(path, revision=revision)
        config = _config(read_json(folder / "config.json"), str(folder / "config.json"))
        model = _filled(config, Weights(folder).source(str(path)), allow_nonfinite, dtype)
    cutter = _tokenizer(folder if tokenizer is None else tokenizer)
    model.family = _family(model, cutter)
    processor = DualProcessor(_transform(folder, model), cutter, RULES[model.family], model.context)
    return model.to(torch.device(device or "cpu")), processor


def save(model: DualTower, processor: DualProcessor, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
    """Write both towers and their processor as a directory of transformers' layout, which `load` opens as it was."""
    folder = Path(folder)
    model.config.__dict__[FAMILY] = model.family
    model.model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_json(folder / "preprocessor_config.json", _image_settings(processor.transform))
    if processor.tokenizer is not None:
        processor.tokenizer.save_pretrained(folder)


_CODES = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def _image_settings(transform: ImageTransform) -> dict[str, Any]:
    """A transform as transformers' image processors have it, and, beside it, as it is here."""
    common = {
        "do_convert_rgb": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "resample": _CODES[transform.resample],
        OWN_TRANSFORM: transform.to_dict(),
    }
    if transform.any_aspect:
        sizes = {"patch_size": transform.patch_size, "max_num_patches": transform.max_num_patches}
        return {**common, "image_processor_type": "Siglip2ImageProcessor", **sizes}
    side = transform.image_size
    return {**common, "image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}


def _transform(folder: Path, model: DualTower) -> ImageTransform:
    spec, config = encoder_spec(model.kind), model.config.vision_config
    own = written_transform(folder, spec)
    if own is not None:
        return own
    settings = recorded_transform(folder, spec.image_size(config))
    if spec.any_aspect:
        settings.pop("rounding", None)  # NaFlex never rounds
    transform: ImageTransform = guarded(lambda: spec.transform(config, **settings), f"{folder}: image settings")
    return transform


def _tokenizer(given: Any) -> Any:
    """A tokenizer as it is, or that of a folder; None where the folder has none."""
    if not isinstance(given, str | Path):
        return given
    folder = Path(given)
    if (folder / "tokenizer.json").exists():
        return open_tokenizer(folder)
    if not any((folder / name).exists() for name in ("spiece.model", "tokenizer.model")):
        # transformers would make one up with a handful of tokens.
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except FOREIGN as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be opened ({' '.join(str(error).split())[:200]}); copy its files again"
        ) from error


def _family(model: DualTower, tokenizer: Any) -> str:
    """What the directory records, or else the vocabulary says, or else the padding: EOS in SigLIP, its own token in
    SigLIP 2."""
    if model.family != "siglip" or FAMILY in model.config.to_dict():
        return model.family
    known = VOCABULARIES.get(model.config.text_config.vocab_size)
    if known is None and tokenizer is not None:
        known = "siglip" if tokenizer.pad_token_id == tokenizer.eos_token_id else "siglip2"
    return known or model.family


def _config(values: Mapping[str, Any], where: str) -> PreTrainedConfig:
    classes: dict[str, Any] = {tower.model_type: tower.config for tower in text_towers().values()}
    kind = values.get("model_type")
    if kind not in classes:
        raise CheckpointError(
            f"{where}: model_type is {kind!r}, expected {' or '.join(map(repr, classes))} (both towers)"
        )
    for key in ("text_config", "vision_config"):
        check_numbers(values.get(key, {}), f"{where}: {key}")
    config: PreTrainedConfig = guarded(lambda: classes[kind].from_dict(dict(values)), where)
    return config


def from_big_vision(
    arrays: Mapping[str, np.ndarray],
    *,
    origin: str = "big_vision parameters",
    allow_nonfinite: bool = False,
    dtype: str | torch.dtype | None = None,
) -> DualTower:
    """Both towers from big_vision's arrays (names without `params/`). A text tower without a head (the i18n
    checkpoint) gets the identity, which is the same function.

    Raises:
        CheckpointError: arrays that are missing, unexpected, mis-shaped or not finite.
    """
    shapes, _ = big_vision.headers(arrays, origin)
    vision, text = vision_config(shapes, origin=origin), text_config(shapes, origin)
    kind: Any = text_towers()[model_types()[vision.model_type]].config
    text = kind.sub_configs["text_config"](**{k: v for k, v in text.to_dict().items() if k in TEXT_KEYS})
    config = kind(vision_config=vision.to_dict(), text_config=text.to_dict())
    source = big_vision.source(arrays, origin, two_towers=True)
    return _filled(config, _with_text_head(source, text.hidden_size), allow_nonfinite, dtype)


TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "projection_size",
    "bos_token_id",
    "eos_token_id",
)


def _with_text_head(source: Source, width: int) -> Source:
    weight, bias = "text_model.head.weight", "text_model.head.bias"
    if weight in source.shapes:
        return source
    made = {weight: torch.eye(width), bias: torch.zeros(width)}
    return Source(
        source.origin,
        {**source.shapes, weight: (width, width), bias: (width,)},
        {**source.dtypes, weight: "F32", bias: "F32"},
        lambda name: made[name] if name in made else source.read(name),
    )


def _filled(config: Any, source: Source, allow_nonfinite: bool, dtype: str | torch.dtype | None) -> DualTower:
    with init_empty_weights(include_buffers=False):
        model = DualTower(config)
    place(model.model, source, dtype=_one_dtype(source, dtype), allow_nonfinite=allow_nonfinite)
    for name in SCALARS:
        if name in source.shapes:  # rounded to 16 bits, a temperature of 118 is off by a per cent or two
            put(model.model, name, source.read(name).float())
    return model.eval()


def _one_dtype(source: Source, dtype: str | torch.dtype | None) -> torch.dtype:
    """What was asked for, or what all the checkpoint's matrices have, or float32."""
    if dtype is not None:
        return named(dtype)
    found = {source.dtypes[name] for name, shape in source.shapes.items() if len(shape) > 1}
    return FLOATS[found.pop()] if len(found) == 1 else torch.float32
