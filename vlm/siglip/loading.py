"""SigLIP and SigLIP 2 with both towers, out of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoTokenizer, SiglipTokenizer
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints import big_vision, manifest
from vlm.checkpoints.big_vision_configs import text_config, vision_config
from vlm.checkpoints.checks import FOREIGN, check_numbers, guarded
from vlm.checkpoints.files import read_json
from vlm.checkpoints.places import locate
from vlm.checkpoints.preprocessing import open_tokenizer
from vlm.checkpoints.recorded import check_size, recorded_transform, written_transform
from vlm.checkpoints.source import Source
from vlm.checkpoints.weights import Weights
from vlm.errors import CheckpointError, ConfigError
from vlm.images.transforms import ImageTransform
from vlm.model.dual import FAMILY, DualTower
from vlm.model.parts import encoder_spec, model_types, text_towers
from vlm.siglip import open_clip
from vlm.siglip.filling import fill
from vlm.siglip.processor import DualProcessor
from vlm.siglip.rules import RULES
from vlm.siglip.tokens import check_vocabulary, contradictions, has_token
from vlm.text.piece_model import read_piece_model
from vlm.text.tokenizer import from_sentencepiece

log = logging.getLogger(__name__)
EITHER = "siglip"
"""What the class of SigLIP's configuration means: v1, or FixRes of SigLIP 2, which only a vocabulary tells apart."""
FILTERS = {"siglip2": "bilinear"}
"""Family -> the filter of a directory that names none, where it is not its tower's default (bicubic for SigLIP)."""
VOCABULARIES = {32_000: "siglip", 250_000: "siglip", 256_000: "siglip2"}
"""Family by the vocabulary of the released text towers: c4_en, mC4, Gemma."""


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
        dtype: of its weights, by name or torch's own; None keeps the checkpoint's, and so does `auto`, but on a CPU,
            where it is float32. Scale and bias stay in float32.
        tokenizer: a transformers tokenizer, a folder that has one, or a sentencepiece `.model`; None: the checkpoint's
            own. A checkpoint without one reads images only.
        revision: of a hub id.
        allow_nonfinite: open weights that hold NaN or infinity.

    Returns:
        (model in eval mode, processor).

    Raises:
        CheckpointError: files or tensors that are missing, unexpected, mis-shaped or not finite, or a tokenizer that is
            not the text tower's. Settings of a tokenizer that contradict its family's rule are told in a warning.
    """
    to_compute = dtype == "auto"
    dtype = None if to_compute else dtype
    if Path(path).suffix == ".npz":
        folder = Path(path)
        with big_vision.open_npz(path) as arrays:
            model = from_big_vision(arrays, origin=str(path), allow_nonfinite=allow_nonfinite, dtype=dtype)
    else:
        folder = locate(path, revision=revision)
        manifest.check(folder)
        if open_clip.recognise(folder):
            model, reader = open_clip.load(
                folder, origin=str(path), dtype=dtype, tokenizer=tokenizer, allow_nonfinite=allow_nonfinite
            )
            return _placed(model, device, to_compute), reader
        config = _config(read_json(folder / "config.json"), str(folder / "config.json"))
        model = _filled(config, Weights(folder).source(str(path)), allow_nonfinite, dtype)
    own = _tokenizer(folder if tokenizer is None else tokenizer)
    model.family = _family(model, own)
    rows = model.config.text_config.vocab_size
    processor = DualProcessor(_transform(folder, model), own, RULES[model.family], model.context, rows)
    if own is not None:
        _check_tokenizer(processor, str(path))
        _check_end(model, processor, str(path))
    return _placed(model, device, to_compute), processor


def _placed(model: DualTower, device: torch.device | str | None, to_compute: bool) -> DualTower:
    """On its device; `to_compute` as a processor is quick at it: most have no 16-bit matrix products (one linear layer
    of So400m's size was 8 times slower in them)."""
    placed: DualTower = model.to(torch.device(device or "cpu"))
    return placed.float() if to_compute and placed.device.type == "cpu" else placed


def _check_tokenizer(processor: DualProcessor, origin: str) -> None:
    rule, rows = processor.rule, processor.vocabulary or 0
    check_vocabulary(processor.tokenizer, rows, rows in VOCABULARIES, origin)
    found = contradictions(processor.tokenizer, rule, processor.context, rows)
    if found:
        log.warning(
            "%s: the tokenizer's files contradict how %s reads texts (%s); used here is what follows each colon: %s",
            origin,
            rule.title,
            rule.tokens,
            "; ".join(found),
        )


def _check_end(model: DualTower, processor: DualProcessor, origin: str) -> None:
    """Refuse a tokenizer whose end token is not the one that CLIP's text tower looks for: it would read the first
    position of every text, without a word.

    Raises:
        CheckpointError: names both.
    """
    if processor.rule.attention != "causal":
        return
    wanted, end = model.config.text_config.eos_token_id, processor.specials.eos
    if wanted == 2:  # written before the number was right; such a tower looks for the highest id
        wanted = len(processor.tokenizer) - 1
    if end != wanted:
        raise CheckpointError(
            f"{origin}: the tokenizer's end token is {end}, the text tower reads the position of id {wanted}"
            f" (text_config.eos_token_id); take the tokenizer that belongs to the weights"
        )


def _transform(folder: Path, model: DualTower) -> ImageTransform:
    spec, config = encoder_spec(model.kind), model.config.vision_config
    own = written_transform(folder, spec)
    if own is not None:
        return own
    check_size(folder, spec.image_size(config))
    settings = recorded_transform(folder, spec.image_size(config))
    if spec.any_aspect:
        settings.pop("rounding", None)  # NaFlex never rounds
    if model.family in FILTERS:
        settings.setdefault("resample", FILTERS[model.family])
    transform: ImageTransform = guarded(lambda: spec.transform(config, **settings), f"{folder}: image settings")
    return transform


def _tokenizer(given: Any) -> Any:
    """A tokenizer as it is, or that of a folder or a sentencepiece file; None where the folder has none."""
    if not isinstance(given, str | Path):
        return given
    place = Path(given)
    if place.is_file() and place.suffix != ".npz":
        return _from_sentencepiece(place)
    if (place / "tokenizer.json").exists():
        return open_tokenizer(place)
    if not any((place / name).exists() for name in ("spiece.model", "tokenizer.model")):
        # transformers would make one up with a handful of tokens.
        return None
    settings = {"local_files_only": True}
    return _opened(lambda: AutoTokenizer.from_pretrained(str(place), trust_remote_code=False, **settings), place)


def _from_sentencepiece(file: Path) -> Any:
    """Gemma's is BPE, those of SigLIP (c4_en, mC4) are unigram models with a normaliser of their own."""
    try:
        bpe = read_piece_model(file).algorithm == "bpe"
        return from_sentencepiece(file) if bpe else _opened(lambda: SiglipTokenizer(str(file)), file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _opened(make: Callable[[], Any], place: Path) -> Any:
    try:
        return make()
    except FOREIGN as error:
        raise CheckpointError(
            f"{place}: the tokenizer cannot be opened ({' '.join(str(error).split())[:200]}); copy its files again"
        ) from error


def _family(model: DualTower, tokenizer: Any) -> str:
    """What the directory records, or else the vocabulary says: its size, how it spells the end of a text, or, where it
    is neither's, whether the padding is the end token (SigLIP) or a token of its own (SigLIP 2)."""
    if model.family != EITHER or FAMILY in model.config.to_dict():
        return model.family
    known = VOCABULARIES.get(model.config.text_config.vocab_size)
    if known is not None or tokenizer is None:
        return known or model.family
    for family in ("siglip2", "siglip"):  # Gemma's vocabulary has "</s>" too, as a tag
        if has_token(tokenizer, RULES[family].eos):
            return family
    return "siglip" if tokenizer.pad_token_id == tokenizer.eos_token_id else "siglip2"


def _config(values: Mapping[str, Any], where: str) -> PreTrainedConfig:
    classes: dict[str, Any] = {tower.model_type: tower.config for tower in text_towers().values()}
    kind = values.get("model_type")
    if kind not in classes:
        raise CheckpointError(
            f"{where}: model_type is {kind!r}, expected {' or '.join(map(repr, classes))} (both towers)"
        )
    if values.get(FAMILY) not in (None, *RULES):
        raise CheckpointError(
            f"{where}: {FAMILY} is {str(values[FAMILY])[:60]!r}, known: {', '.join(RULES)}; it says how texts are read"
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
    filled: DualTower = fill(model, source, dtype=dtype, allow_nonfinite=allow_nonfinite)
    return filled
