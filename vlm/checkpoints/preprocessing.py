"""The processor of a published checkpoint: its tokenizer, and its image numbers as an `ImageTransform`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vlm import tokenizer as tokenizers
from vlm.checkpoints.configs import FOREIGN
from vlm.checkpoints.files import check_regular, read_json
from vlm.errors import CheckpointError, ConfigError
from vlm.tokenizer import Tokenizer
from vlm.transforms import RESAMPLING, ImageTransform

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILTERS = {int(code): name for name, code in RESAMPLING.items()}


def image_settings(folder: Path) -> dict[str, Any] | None:
    """transformers' image processor settings of a directory: `processor_config.json` of version 5, or
    `preprocessor_config.json`; None when there is neither."""
    combined = folder / "processor_config.json"
    if combined.exists():
        values = read_json(combined).get("image_processor")
        if isinstance(values, dict):
            return values
    single = folder / "preprocessor_config.json"
    return read_json(single) if single.exists() else None


def paligemma_transform(folder: Path, vision_config: Any) -> ImageTransform:
    """The image transform of a PaliGemma directory, checked against its tower.

    Raises:
        CheckpointError: there are no settings, they say something that this library does not do, or they belong to
            another tower.
    """
    values = image_settings(folder)
    if values is None:
        raise CheckpointError(f"{folder}: no preprocessor_config.json and no processor_config.json; copy it too")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if values.get(key, True) is not True:
            raise CheckpointError(f"{folder}: image settings have {key} {values[key]!r}, only true is supported")
    side = vision_config.image_size
    size = values.get("size", {})
    if not isinstance(size, dict) or (size.get("height"), size.get("width")) != (side, side):
        raise CheckpointError(
            f"{folder}: images are resized to {size}, the tower reads {side}x{side}; one of the two is wrong"
        )
    tokens = (side // vision_config.patch_size) ** 2
    if values.get("image_seq_length", tokens) != tokens:
        raise CheckpointError(
            f"{folder}: image_seq_length is {values['image_seq_length']}, the tower gives {tokens} tokens per image"
        )
    try:
        return ImageTransform(
            mode="squash",
            image_size=side,
            patch_size=vision_config.patch_size,
            resample=_filter(values.get("resample", 3), folder),
            mean=values.get("image_mean", (0.5, 0.5, 0.5)),
            std=values.get("image_std", (0.5, 0.5, 0.5)),
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: image settings: {error}") from error


def _filter(code: Any, folder: Path) -> str:
    if not isinstance(code, int) or code not in FILTERS:
        raise CheckpointError(f"{folder}: resample is {code!r}, known: {FILTERS}")
    return FILTERS[code]


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a directory: `tokenizer.json`, or a sentencepiece `tokenizer.model` with PaliGemma's tokens
    added.

    Raises:
        CheckpointError: there is none, or it cannot be opened.
    """
    if not (folder / "tokenizer.json").exists():
        if (folder / "tokenizer.model").exists():
            return from_sentencepiece(folder / "tokenizer.model")
        raise CheckpointError(f"{folder}: no tokenizer.json and no tokenizer.model; copy the tokenizer's files too")
    for name in TOKENIZER_FILES:  # transformers would wait for a pipe, or read whatever size there is
        if name == TOKENIZER_FILES[0] or (folder / name).exists() or (folder / name).is_symlink():
            read_json(folder / name)
    try:
        # A tokenizer's own code is never run: trust_remote_code stays off, and chat templates are not rendered here.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer("a"), tokenizer.all_special_ids  # settings of a wrong type show only in use
        return tokenizer
    except FOREIGN as error:
        raise CheckpointError(
            f"{folder}: no tokenizer that can be opened: {' '.join(str(error).split())[:300]}"
        ) from error


def from_sentencepiece(file: str | Path) -> Tokenizer:
    """A sentencepiece model as a tokenizer with PaliGemma's `<loc>`, `<seg>` and `<image>` tokens.

    Raises:
        CheckpointError: missing, or not a sentencepiece model of Gemma's kind.
    """
    check_regular(Path(file))
    try:
        tokenizer = tokenizers.from_sentencepiece(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    tokenizers.add_image_tokens(tokenizer)
    return tokenizer
