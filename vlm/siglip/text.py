"""SigLIP and SigLIP 2 with both towers, out of checkpoints."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints import big_vision
from vlm.checkpoints.big_vision_configs import text_config, vision_config
from vlm.checkpoints.checks import check_numbers, guarded
from vlm.checkpoints.files import read_json
from vlm.checkpoints.places import locate
from vlm.checkpoints.source import Source, place
from vlm.checkpoints.weights import Weights
from vlm.errors import CheckpointError
from vlm.model.dual import SigLIP
from vlm.model.parts import model_types, text_towers

_PUNCTUATION = str.maketrans({"_": " "} | {mark: None for mark in string.punctuation if mark != "_"})


def canonicalize(text: str) -> str:
    """A name or a template as SigLIP's zero-shot evaluation gives it to the text tower: "Golden_Retriever." -> "golden
    retriever".

    An underscore is a blank, other ASCII punctuation is dropped, letters are lower-cased, blanks run together. Source:
    big_vision `evaluators/proj/image_text/prompt_engineering.py`. (SigLIP v1's tokenizer drops underscores too.)
    """
    return " ".join(text.translate(_PUNCTUATION).lower().split())


def load(path: str | Path, *, allow_nonfinite: bool = False, revision: str | None = None) -> SigLIP:
    """Open a SigLIP or SigLIP 2 checkpoint with both towers: a Hugging Face directory or hub id, or a big_vision
    `.npz`.

    Raises:
        CheckpointError: files or tensors that are missing, unexpected, mis-shaped or not finite.
    """
    if Path(path).suffix == ".npz":
        with big_vision.open_npz(path) as arrays:
            return from_big_vision(arrays, origin=str(path), allow_nonfinite=allow_nonfinite)
    folder = locate(path, revision=revision)
    config = _config(read_json(folder / "config.json"), str(folder / "config.json"))
    return _filled(config, Weights(folder).source(str(path)), allow_nonfinite)


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
    arrays: Mapping[str, np.ndarray], *, origin: str = "big_vision parameters", allow_nonfinite: bool = False
) -> SigLIP:
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
    return _filled(config, _with_text_head(source, text.hidden_size), allow_nonfinite)


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


def _filled(config: Any, source: Source, allow_nonfinite: bool) -> SigLIP:
    with init_empty_weights(include_buffers=False):
        model = SigLIP(config)
    place(model.model, source, dtype=torch.float32, allow_nonfinite=allow_nonfinite)
    return model.eval()
