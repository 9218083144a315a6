"""`vlm.new`: assemble a model from a vision tower, a projector and a decoder, each from a configuration or a
checkpoint."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints import big_vision, big_vision_configs
from vlm.checkpoints.configs import NOTES, check_numbers, guarded, own_config, paligemma_config
from vlm.checkpoints.files import locate, read_json
from vlm.checkpoints.parts import load_decoder, load_tower
from vlm.checkpoints.preprocessing import checked_image_settings, open_tokenizer, resample_name
from vlm.config import VLMConfig, decoder_config, kinds, part
from vlm.encoders import choose_layers, model_types, read_config
from vlm.errors import ConfigError, nearest
from vlm.model import DECODERS, VLM
from vlm.processor import Processor
from vlm.projectors import init_weights
from vlm.tokenizer import Tokenizer, add_image_tokens, from_sentencepiece, image_token_id
from vlm.transforms import ImageTransform

logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, as in PaliGemma's Hugging Face checkpoints."""


def new(
    encoder: str | Path | PreTrainedConfig,
    projector: str | dict[str, Any] = "linear",
    decoder: str | Path | PreTrainedConfig | dict[str, Any] = "",
    tokenizer: Any = None,
    *,
    encoder_kind: str | None = None,
    image_size: int | None = None,
    image: dict[str, Any] | None = None,
    layer: int | list[int] = -1,
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
            a norm, or a list, concatenated along the channels (`vlm.encoders.choose_layers`).
        seed: of the new weights. Each part has its own stream, so swapping one part leaves the others' weights as they
            were.

    Returns:
        (model in float32 and eval mode, processor).

    Raises:
        ConfigError: parts that do not fit, or settings that are unknown.
        CheckpointError: a checkpoint that cannot be opened, or with missing, unexpected or mis-shaped tensors.
    """
    encoder, decoder = _located(encoder), _located(decoder)
    kind, vision_config = _vision(encoder, encoder_kind, image_size)
    vision_config = choose_layers(kind, vision_config, layer)
    text_config = _text(decoder)
    tokenizer = _tokenizer(tokenizer, decoder)
    old_rows = text_config.vocab_size
    add_image_tokens(tokenizer)
    text_config.vocab_size = _rows_for(tokenizer, old_rows)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    transform = _transform(kind, vision_config, encoder, image or {})
    config = VLMConfig(
        encoder=kind,
        vision_config=vision_config,
        projector_config={"kind": projector} if isinstance(projector, str) else projector,
        text_config=text_config,
        image_token_id=image_token_id(tokenizer),
    )
    with torch.random.fork_rng():  # the weights drawn here are all replaced below, each part from its own stream
        model = VLM(config)
    inner = model.model
    if isinstance(encoder, Path):
        load_tower(inner.vision_tower, encoder, resize_positions=image_size is not None)
    else:
        tower = part("vlm.encoders", kind).Encoder
        _load_fresh(inner.vision_tower, "encoder", lambda: tower._from_config(vision_config), seed)
    _seeded(seed, "projector", lambda: init_weights(inner.multi_modal_projector))
    if isinstance(decoder, Path):
        _seeded(seed, "vocabulary", lambda: load_decoder(inner.language_model, decoder, old_rows))
    else:
        _load_fresh(
            inner.language_model, "decoder", lambda: DECODERS[text_config.model_type]._from_config(text_config), seed
        )
    model.tie_weights()
    return model.eval(), Processor(tokenizer, transform, config.projector_config)


def tower(
    encoder: str | Path | PreTrainedConfig,
    *,
    encoder_kind: str | None = None,
    image_size: int | None = None,
    image: dict[str, Any] | None = None,
) -> tuple[str, PreTrainedConfig, ImageTransform]:
    """What `new` would make of an encoder: its kind, its configuration and its image transform; weights are not read.

    Raises `ConfigError` and `CheckpointError` as `new` does.
    """
    encoder = _located(encoder)
    kind, config = _vision(encoder, encoder_kind, image_size)
    return kind, config, _transform(kind, config, encoder, image or {})


def stored_rows(decoder: str | Path | PreTrainedConfig | dict[str, Any]) -> int:
    """Vocabulary rows that a decoder brings along."""
    return int(_text(_located(decoder)).vocab_size)


def _rows_for(tokenizer: Tokenizer, rows: int) -> int:
    """The decoder's vocabulary: as it is where it holds every token (padding and unused rows stay), else larger."""
    needed = max(tokenizer.get_vocab().values()) + 1
    return rows if needed <= rows else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _located(source: Any) -> Any:
    """The folder or `.npz` file of a checkpoint; a configuration stays what it is."""
    if not isinstance(source, str | Path) or not str(source):
        return source
    return Path(source) if Path(source).suffix == ".npz" else locate(source)


def _vision(encoder: Any, kind: str | None, image_size: int | None) -> tuple[str, PreTrainedConfig]:
    if kind is not None and ":" in kind:
        part("vlm.encoders", kind)  # refused with the way to make it known
    source, config = _own_vision(encoder, kind)
    for name, value in getattr(part("vlm.encoders", source), "FIXED", {}).items():
        setattr(config, name, value)
    config.dtype = None
    name = type(encoder).__name__ if isinstance(encoder, PreTrainedConfig) else str(encoder)
    if kind not in (None, source):
        config = _naflex_from_fixed(config, source, str(kind), name)
    _set_image_size(config, kind or source, image_size)
    return kind or source, config


def _own_vision(encoder: Any, own: str | None) -> tuple[str, PreTrainedConfig]:
    """(encoder kind, a configuration of its own) as the encoder says it."""
    if isinstance(encoder, PreTrainedConfig):
        kind = model_types(own).get(encoder.model_type)
        if kind is None:
            raise ConfigError(f"no encoder takes a {type(encoder).__name__}; known: {', '.join(kinds('vlm.encoders'))}")
        if type(encoder) is part("vlm.encoders", kind).Config and not hasattr(
            part("vlm.encoders", kind), "read_config"
        ):
            return kind, copy.deepcopy(encoder)
        return kind, read_config(kind, {key: value for key, value in encoder.to_dict().items() if key not in NOTES})
    if encoder.suffix == ".npz":
        with big_vision.open_npz(encoder) as arrays:
            config = big_vision_configs.vision_config(big_vision.headers(arrays, str(encoder))[0], origin=str(encoder))
        return model_types()[config.model_type], config
    values = _config_file(encoder)
    if values.get("model_type") == "paligemma":
        return "siglip", paligemma_config(values, f"{encoder}/config.json").vision_config
    if values.get("model_type") == VLMConfig.model_type:
        raise ConfigError(
            f"{encoder}: is a whole model; write its tower first: vlm export {encoder} --to tower --out DIR"
        )
    known = model_types(own)
    source = known.get(str(values.get("model_type")))
    if source is None:
        raise ConfigError(
            f"{encoder}: model_type is {values.get('model_type')!r}, expected a SigLIP checkpoint or another vision"
            f" tower: {', '.join(known)}"
        )
    vision = values.get("vision_config", values)
    check_numbers(vision, f"{encoder}: vision_config")
    settings = {key: value for key, value in vision.items() if key not in (*NOTES, "model_type")}
    return source, guarded(lambda: read_config(source, settings), f"{encoder}: vision_config")


def _naflex_from_fixed(full: PreTrainedConfig, source: str, kind: str, name: str) -> PreTrainedConfig:
    if (source, kind) != ("siglip", "siglip2_naflex"):
        raise ConfigError(
            f"{name} is a {source!r} tower and cannot be read as {kind!r}; only siglip -> siglip2_naflex is possible"
        )
    values = {key: value for key, value in full.to_dict().items() if key not in (*NOTES, "model_type", "image_size")}
    positions = (full.image_size // full.patch_size) ** 2
    config: PreTrainedConfig = part("vlm.encoders", kind).Config(**{**values, "num_patches": positions})
    return config


def _set_image_size(config: PreTrainedConfig, kind: str, image_size: int | None) -> None:
    if not hasattr(config, "image_size"):
        if image_size is not None:
            raise ConfigError(
                f"image_size={image_size}: a {kind} tower takes images of any size; set its budget,"
                f' image={{"max_num_patches": {max(1, image_size // config.patch_size) ** 2}}}'
            )
        return
    patch = config.patch_size
    if image_size is not None:
        if not isinstance(image_size, int) or image_size < patch:
            raise ConfigError(f"image_size is {image_size!r}, expected a whole number from {patch}, a patch, upwards")
        config.image_size = image_size
    unseen = config.image_size % patch
    if unseen:
        lower = config.image_size - unseen
        logger.warning(
            "image_size %d is no multiple of the patch size %d: the last %d pixels of each side are never seen;"
            " %d or %d uses every pixel",
            config.image_size,
            patch,
            unseen,
            lower,
            lower + patch,
        )


def _text(decoder: Any) -> PreTrainedConfig:
    if isinstance(decoder, Path):
        config = _stored_text(decoder)
    elif isinstance(decoder, PreTrainedConfig | dict):
        config = copy.deepcopy(decoder_config(decoder))
    else:
        raise ConfigError("decoder is missing: give a Gemma checkpoint or a text configuration")
    config.dtype = None
    return config


def _stored_text(folder: Path) -> PreTrainedConfig:
    """The configuration of a Gemma checkpoint, or of the decoder in a model of this library or in a PaliGemma (whose
    Gemma 2 has no sliding window)."""
    values, where = _config_file(folder), f"{folder}/config.json"
    whole = {"paligemma": paligemma_config, VLMConfig.model_type: own_config}.get(str(values.get("model_type")))
    if whole is not None:
        return whole(values, where).text_config
    values = values.get("text_config", values)
    check_numbers(values, f"{where}: text_config")
    settings = {key: value for key, value in values.items() if key not in NOTES}
    config: PreTrainedConfig = guarded(lambda: decoder_config(settings), where)
    return config


def _config_file(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: no config.json; give a checkpoint directory or a hub id such as google/siglip-base-patch16-224"
        )
    return read_json(folder / "config.json")


def _tokenizer(tokenizer: Any, decoder: Any) -> Tokenizer:
    if tokenizer is None:
        if not isinstance(decoder, Path):
            raise ConfigError("tokenizer is missing: a decoder configuration has none; pass tokenizer=")
        tokenizer = decoder
    if not isinstance(tokenizer, str | Path):
        return copy.deepcopy(tokenizer)
    return from_sentencepiece(tokenizer) if Path(tokenizer).is_file() else open_tokenizer(locate(tokenizer))


def _transform(kind: str, config: PreTrainedConfig, encoder: Any, settings: dict[str, Any]) -> ImageTransform:
    known = [field.name for field in fields(ImageTransform)]
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"unknown image setting {key!r}{nearest(key, known)}; known: {', '.join(known)}")
        own = getattr(config, key, value) if key in ("image_size", "patch_size") else value
        if own != value:
            advice = f"use image_size={value}, which resamples the tower" if key == "image_size" else "leave it out"
            raise ConfigError(f"image setting {key} is {value!r}, the tower has {own}; {advice}")
    if "max_num_patches" in settings and hasattr(config, "image_size"):
        raise ConfigError(
            f"max_num_patches is a budget of NaFlex towers; this one reads squares of {config.image_size} px: use"
            f" image_size, or read it as encoder_kind='siglip2_naflex'"
        )
    recorded = recorded_transform(encoder, getattr(config, "image_size", None)) if isinstance(encoder, Path) else {}
    if not hasattr(config, "image_size"):
        # NaFlex resizes in float with its own filter; a FixRes checkpoint's resize does not apply.
        recorded = {key: value for key, value in recorded.items() if key not in ("resample", "rounding", *_SQUARE)}
    elif "mode" in settings:
        recorded = {key: value for key, value in recorded.items() if key not in _SQUARE}
    transform: ImageTransform = part("vlm.encoders", kind).transform(config, **{**recorded, **settings})
    return transform


_SQUARE = ("mode", "resize_shortest")
"""How an image becomes a square."""


def recorded_transform(path: Path, image_size: int | None = None) -> dict[str, Any]:
    """Normalisation, filter and way to a square that a tower's checkpoint records (empty when it records none). A
    big_vision `.npz` means big_vision's own resize, which rounds down.

    Args:
        image_size: the tower's; a recorded centre crop keeps its proportion at another size.
    """
    if path.suffix == ".npz":
        return {"resample": "bilinear", "rounding": "down"}
    values = checked_image_settings(path, crop=True) or {}
    result: dict[str, Any] = {}
    if "resample" in values:
        result["resample"] = resample_name(values["resample"], path)
    for key, name in (("image_mean", "mean"), ("image_std", "std")):
        if key in values:
            result[name] = values[key]
    if "max_num_patches" in values:
        result["max_num_patches"] = values["max_num_patches"]
    return {**result, **(_recorded_square(values, image_size) if image_size else {})}


def _recorded_square(values: dict[str, Any], image_size: int) -> dict[str, Any]:
    size, crop = values.get("size"), values.get("crop_size")
    side = crop.get("height") if isinstance(crop, dict) else crop
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    if values.get("do_center_crop") and isinstance(side, int) and isinstance(shortest, int) and side > 0:
        return {"mode": "crop", "resize_shortest": max(image_size, round(image_size * shortest / side))}
    if isinstance(size, dict) and "height" in size and not values.get("do_center_crop"):
        return {"mode": "squash"}
    return {}


def _load_fresh(module: nn.Module, name: str, build: Callable[[], nn.Module], seed: int) -> None:
    weights: dict[str, Tensor] = {}
    _seeded(seed, name, lambda: weights.update(build().state_dict()))
    module.load_state_dict(weights)


def _seeded(seed: int, name: str, action: Callable[[], object]) -> None:
    """Run with a random stream of its own and leave the caller's stream as it was."""
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng():
        torch.manual_seed(stream)
        action()
