"""`vlm.new`: assemble a model from a vision tower, a projector and a decoder, each from a configuration or a
checkpoint."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import cached_file

from vlm.checkpoints.parts import load_decoder, load_tower
from vlm.config import VLMConfig, decoder_config, kinds, part
from vlm.errors import ConfigError
from vlm.model import DECODERS, VLM
from vlm.processor import Processor
from vlm.projectors import init_weights
from vlm.tokenizer import Tokenizer, add_image_tokens, image_token_id
from vlm.transforms import RESAMPLING, ImageTransform

TOWER_KINDS = {
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip2": "siglip2_naflex",
    "siglip2_vision_model": "siglip2_naflex",
}
"""Encoder kind by the `model_type` of a checkpoint. SigLIP 2 FixRes repositories carry `siglip`."""

VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, as in PaliGemma's Hugging Face checkpoints."""


def new(
    encoder: str | Path | PreTrainedConfig,
    projector: str | dict[str, Any] = "linear",
    decoder: str | Path | PreTrainedConfig | dict[str, Any] = "",
    tokenizer: Any = None,
    *,
    encoder_kind: str | None = None,
    image: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[VLM, Processor]:
    """Assemble a model.

    Args:
        encoder: a SigLIP or SigLIP 2 checkpoint (directory or hub id; full model or vision tower alone), or a vision
            configuration for new weights.
        projector: a projector kind (`linear`, `mlp`), or `{"kind": ..., **settings}`.
        decoder: a Gemma, Gemma 2 or Gemma 3 text checkpoint, or a text configuration for new weights.
        tokenizer: a tokenizer or where to find one; by default the decoder checkpoint's. `<image>`, `<loc>` and `<seg>`
            tokens are added when missing.
        encoder_kind: read a SigLIP checkpoint as another kind: `siglip2_naflex` runs a FixRes tower at any aspect ratio
            (the same function at its own grid: the patch convolution becomes the equal linear layer).
        image: settings of the image transform to change, such as `{"max_num_patches": 64}` or `{"resample":
            "bicubic"}`.
        seed: of the new weights. Each part has its own stream, so swapping one part leaves the others' weights as they
            were.

    Returns:
        (model in float32 and eval mode, processor).

    Raises:
        ConfigError: parts that do not fit, or settings that are unknown.
        CheckpointError: a checkpoint with missing, unexpected or mis-shaped tensors.
    """
    kind, vision_config = _vision(encoder, encoder_kind)
    text_config = _text(decoder)
    tokenizer = _tokenizer(tokenizer, decoder)
    old_rows = text_config.vocab_size
    add_image_tokens(tokenizer)
    # A vocabulary larger than the tokenizer (padding, unused rows) is kept as it is.
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > old_rows:
        text_config.vocab_size = -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
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
    _fill(inner.vision_tower, encoder, lambda: part("vlm.encoders", kind).Encoder._from_config(vision_config), seed)
    _seeded(seed, "projector", lambda: init_weights(inner.multi_modal_projector))
    if isinstance(decoder, str | Path):
        _seeded(seed, "vocabulary", lambda: load_decoder(inner.language_model, decoder, old_rows))
    else:
        _load_fresh(
            inner.language_model, "decoder", lambda: DECODERS[text_config.model_type]._from_config(text_config), seed
        )
    model.tie_weights()
    processor = Processor(tokenizer, _transform(kind, vision_config, encoder, image or {}))
    return model.eval(), processor


def _vision(encoder: str | Path | PreTrainedConfig, kind: str | None) -> tuple[str, PreTrainedConfig]:
    if isinstance(encoder, PreTrainedConfig):
        matching = [name for name in kinds("vlm.encoders") if isinstance(encoder, part("vlm.encoders", name).Config)]
        if not matching:
            raise ConfigError(f"no encoder takes a {type(encoder).__name__}; known: {', '.join(kinds('vlm.encoders'))}")
        config = copy.deepcopy(encoder)
        config.vision_use_head = False  # the pooling head would never get a gradient
        return kind or matching[0], config
    values = read_json(encoder, "config.json")
    source = TOWER_KINDS.get(str(values.get("model_type")))
    if source is None:
        raise ConfigError(
            f"{encoder}: model_type is {values.get('model_type')!r}, expected a SigLIP checkpoint:"
            f" {', '.join(TOWER_KINDS)}"
        )
    vision = dict(values.get("vision_config", values))
    for key in ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version"):
        vision.pop(key, None)
    vision["vision_use_head"] = False
    if kind not in (None, source):
        vision = _naflex_from_fixed(vision, source, str(kind), encoder)
    return kind or source, part("vlm.encoders", kind or source).Config(**vision)


def _naflex_from_fixed(vision: dict[str, Any], source: str, kind: str, encoder: str | Path) -> dict[str, Any]:
    if (source, kind) != ("siglip", "siglip2_naflex"):
        raise ConfigError(
            f"{encoder} is a {source!r} tower and cannot be read as {kind!r}; only siglip -> siglip2_naflex is possible"
        )
    full = part("vlm.encoders", "siglip").Config(**vision)
    vision = {key: value for key, value in vision.items() if key != "image_size"}
    return {**vision, "patch_size": full.patch_size, "num_patches": (full.image_size // full.patch_size) ** 2}


def _text(decoder: str | Path | PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    if isinstance(decoder, PreTrainedConfig | dict):
        return copy.deepcopy(decoder_config(decoder))
    if not str(decoder):
        raise ConfigError("decoder is missing: give a Gemma checkpoint or a text configuration")
    values = read_json(decoder, "config.json")
    values = values.get("text_config", values)
    return decoder_config(
        {
            key: value
            for key, value in values.items()
            if key not in ("architectures", "dtype", "torch_dtype", "transformers_version")
        }
    )


def _tokenizer(tokenizer: Any, decoder: Any) -> Tokenizer:
    if tokenizer is None:
        if not isinstance(decoder, str | Path):
            raise ConfigError("tokenizer is missing: a decoder configuration has none; pass tokenizer=")
        tokenizer = decoder
    if isinstance(tokenizer, str | Path):
        return AutoTokenizer.from_pretrained(str(tokenizer))
    return copy.deepcopy(tokenizer)


def _transform(kind: str, config: PreTrainedConfig, encoder: Any, settings: dict[str, Any]) -> ImageTransform:
    recorded = {} if isinstance(encoder, PreTrainedConfig) else recorded_transform(encoder)
    if kind == "siglip2_naflex":
        # NaFlex resizes in float with its own filter; a FixRes checkpoint's filter does not apply.
        recorded.pop("resample", None)
    transform: ImageTransform = part("vlm.encoders", kind).transform(config, **{**recorded, **settings})
    return transform


def recorded_transform(path: str | Path) -> dict[str, Any]:
    """Normalisation and filter from a Hugging Face `preprocessor_config.json` (empty when there is none)."""
    values = read_json(path, "preprocessor_config.json", required=False)
    names = {int(code): name for name, code in RESAMPLING.items()}
    result: dict[str, Any] = {}
    if "resample" in values:
        result["resample"] = names.get(int(values["resample"]))
    for key, name in (("image_mean", "mean"), ("image_std", "std")):
        if key in values:
            result[name] = tuple(values[key])
    if "max_num_patches" in values:
        result["max_num_patches"] = values["max_num_patches"]
    return result


def read_json(path: str | Path, name: str, *, required: bool = True) -> dict[str, Any]:
    """A JSON file of a checkpoint directory or hub repository.

    Raises:
        ConfigError: it is missing (and required).
    """
    if Path(path).is_dir():
        found: Any = Path(path) / name
        found = found if found.is_file() else None
    elif Path(path).is_absolute() or str(path).count("/") != 1:
        found = None
    else:
        found = cached_file(
            str(path), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    if found is None:
        if required:
            raise ConfigError(
                f"{path}: no {name}; give a checkpoint directory or a hub id such as google/siglip-base-patch16-224"
            )
        return {}
    values: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8"))
    return values


def _fill(tower: nn.Module, encoder: Any, fresh: Callable[[], nn.Module], seed: int) -> None:
    if isinstance(encoder, PreTrainedConfig):
        _load_fresh(tower, "encoder", fresh, seed)
    else:
        load_tower(tower, encoder)


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
