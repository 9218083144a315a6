"""`vlm.new`: assemble a model from a vision tower, a projector and a decoder, each from a configuration or a
checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from vlm.build.assembled import assemble
from vlm.build.towers import choose, config_file, located
from vlm.checkpoints.checks import NOTES, check_numbers, guarded
from vlm.checkpoints.configs import own_config, paligemma_config
from vlm.checkpoints.places import locate
from vlm.checkpoints.preprocessing import open_tokenizer
from vlm.errors import ConfigError
from vlm.model import decoder as decoders
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM
from vlm.model.processor import Processor
from vlm.text.tokenizer import Tokenizer, from_sentencepiece


def new(
    encoder: str | Path | PreTrainedConfig | dict[str, Any] | list[Any],
    projector: str | dict[str, Any] = "linear",
    decoder: str | Path | PreTrainedConfig | dict[str, Any] = "",
    tokenizer: Any = None,
    *,
    encoder_kind: str | None = None,
    image_size: int | None = None,
    image: dict[str, Any] | None = None,
    layer: int | list[int] = -1,
    fuse: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[VLM, Processor]:
    """Assemble a model.

    Args:
        encoder: a SigLIP, SigLIP 2, CLIP, DINOv2 or DINOv3 checkpoint (directory or hub id: both towers, the vision
            tower alone, or a PaliGemma; or a big_vision `.npz`), or a vision configuration for new weights.
        projector: a projector kind (a file of `vlm/projectors`), or `{"kind": ..., **settings}`.
        decoder: a Gemma, Gemma 2 or Gemma 3 text checkpoint, a model whose decoder it is (PaliGemma or a directory of
            this library), or a text configuration for new weights.
        tokenizer: a tokenizer or where to find one (a sentencepiece `.model` too); by default the decoder checkpoint's.
            `<loc>`, `<seg>` and `<image>` tokens are added when missing.
        encoder_kind: an encoder of your own, `mylab.towers:MyTower` (call `vlm.encoders.use` with it first), or a
            SigLIP checkpoint read as another kind: `siglip2_naflex` runs a FixRes tower at any aspect ratio
            (the same function at its own grid: the patch convolution becomes the equal linear layer).
        image_size: side of the square images in pixels; by default the checkpoint's. Another size resamples the tower's
            position table as its encoder's file says. A NaFlex tower has a budget instead:
            `image={"max_num_patches": N}`.
        image: settings of the image transform to change, such as `{"max_num_patches": 64}` or `{"resample":
            "bicubic"}`.
        layer: of the tower, whose output is the features: -1 the last with the final norm, -2 the one before it without
            a norm, or a list, concatenated along the channels (`vlm.encoders.Spec.choose_layers`).
        fuse: of several towers whose grids differ: `{"grid": [rows, columns], "resample": "bilinear"}`.
        seed: of the new weights. Each part has its own stream, so swapping one part leaves the others' weights as they
            were.

    Returns:
        (model in float32 and eval mode, processor).

    Raises:
        ConfigError: parts that do not fit, or settings that are unknown.
        CheckpointError: a checkpoint that cannot be opened, or with missing, unexpected or mis-shaped tensors.
    """
    decoder = located(decoder)
    choice = choose(encoder, encoder_kind=encoder_kind, image_size=image_size, image=image, layer=layer, fuse=fuse)
    text_config = _text(decoder)
    tokenizer = _tokenizer(tokenizer, decoder)
    stored = decoder if isinstance(decoder, Path) else None
    return assemble(choice, projector, text_config, tokenizer, decoder=stored, seed=seed)


def stored_rows(decoder: str | Path | PreTrainedConfig | dict[str, Any]) -> int:
    """Vocabulary rows that a decoder brings along."""
    return int(_text(located(decoder)).vocab_size)


def _text(decoder: Any) -> PreTrainedConfig:
    if isinstance(decoder, Path):
        return _stored_text(decoder)
    if isinstance(decoder, PreTrainedConfig | dict):
        return copy.deepcopy(decoders.read_config(decoder))
    raise ConfigError("decoder is missing: give a Gemma checkpoint or a text configuration")


def _stored_text(folder: Path) -> PreTrainedConfig:
    """The configuration of a Gemma checkpoint, or of the decoder in a model of this library or in a PaliGemma (whose
    Gemma 2 has no sliding window)."""
    values, where = config_file(folder), f"{folder}/config.json"
    whole = {"paligemma": paligemma_config, VLMConfig.model_type: own_config}.get(str(values.get("model_type")))
    if whole is not None:
        return whole(values, where).text_config
    values = values.get("text_config", values)
    check_numbers(values, f"{where}: text_config")
    settings = {key: value for key, value in values.items() if key not in NOTES}
    config: PreTrainedConfig = guarded(lambda: decoders.read_config(settings), where)
    return config


def _tokenizer(tokenizer: Any, decoder: Any) -> Tokenizer:
    if tokenizer is None:
        if not isinstance(decoder, Path):
            raise ConfigError("tokenizer is missing: a decoder configuration has none; pass tokenizer=")
        tokenizer = decoder
    if not isinstance(tokenizer, str | Path):
        return copy.deepcopy(tokenizer)
    return from_sentencepiece(tokenizer) if Path(tokenizer).is_file() else open_tokenizer(locate(tokenizer))
