"""The processor of a published checkpoint: its tokenizer, and its image numbers as an `ImageTransform`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers as tokenizers_library
import transformers
from transformers import AutoTokenizer
from transformers.utils import PROCESSOR_NAME

from vlm.checkpoints.checks import FOREIGN
from vlm.checkpoints.files import check_regular, read_json
from vlm.errors import CheckpointError, ConfigError
from vlm.images.fused import open_transform
from vlm.images.transforms import RESAMPLING, ImageTransform
from vlm.text import tokenizer as tokenizers
from vlm.text.tokenizer import Tokenizer

IMAGE_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILTERS = {int(code): name for name, code in RESAMPLING.items()}


def image_settings(folder: Path) -> dict[str, Any] | None:
    """transformers' image processor settings of a directory: `processor_config.json` of version 5, or
    `preprocessor_config.json`; None when there is neither."""
    combined = folder / PROCESSOR_NAME
    if combined.exists():
        values = read_json(combined).get("image_processor")
        if isinstance(values, dict):
            return values
    single = folder / "preprocessor_config.json"
    return read_json(single) if single.exists() else None


def checked_image_settings(folder: Path, *, crop: bool = False) -> dict[str, Any] | None:
    """`image_settings`, if they describe what this library does: resize, divide by 255, normalise.

    Args:
        crop: the reader can cut out the middle of the resized image too (CLIP, DINOv2).

    Raises:
        CheckpointError: another step, or one left out.
    """
    values = image_settings(folder)
    if values is None:
        return None
    for key, wanted in IMAGE_STEPS.items():
        if values.get(key, wanted) not in (wanted, None) and not (crop and key == "do_center_crop"):
            raise CheckpointError(f"{folder}: image settings have {key} {values[key]!r}, only {wanted} is supported")
    factor = values.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not abs(factor - 1 / 255) < 1e-9:
        raise CheckpointError(f"{folder}: image settings have rescale_factor {factor!r}, only 1/255 is supported")
    if "resample" in values:
        resample_name(values["resample"], folder)
    return values


def own_transform(folder: Path) -> ImageTransform:
    """The image transform of a directory that `vlm.save` wrote.

    Raises:
        CheckpointError: there is none, or it is not usable.
    """
    file = folder / PROCESSOR_NAME
    settings = read_json(file).get("image_transform")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: no image_transform; give the directory that vlm.save wrote")
    try:
        return open_transform(settings)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def paligemma_transform(folder: Path, vision_config: Any) -> ImageTransform:
    """The image transform of a PaliGemma directory, checked against its tower.

    Raises:
        CheckpointError: there are no settings, they say something that this library does not do, or they belong to
            another tower.
    """
    values = checked_image_settings(folder)
    if values is None:
        raise CheckpointError(f"{folder}: no preprocessor_config.json and no processor_config.json; copy it too")
    kind = str(values.get("image_processor_type", "SiglipImageProcessor"))
    if not kind.startswith("SiglipImageProcessor"):
        raise CheckpointError(f"{folder}: image_processor_type is {kind!r}, PaliGemma has 'SiglipImageProcessor'")
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
            resample=resample_name(values.get("resample", 3), folder),
            mean=values.get("image_mean", (0.5, 0.5, 0.5)),
            std=values.get("image_std", (0.5, 0.5, 0.5)),
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: image settings: {error}") from error


def resample_name(code: Any, folder: Path) -> str:
    """The name of a filter that a file gives by Pillow's number.

    Raises:
        CheckpointError: an unknown number.
    """
    if isinstance(code, bool) or not isinstance(code, int) or code not in FILTERS:
        raise CheckpointError(f"{folder}: image settings have resample {code!r}, known: {FILTERS}")
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
            values = read_json(folder / name)
            if name == "tokenizer_config.json":
                _check_tokenizer_config(values, folder / name)
    _parse(folder / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer("a"), tokenizer.all_special_ids  # settings of a wrong type show only in use
        return tokenizer
    except FOREIGN as error:
        raise CheckpointError(
            f"{folder}: no tokenizer that can be opened: {' '.join(str(error).split())[:300]}"
        ) from error


def _check_tokenizer_config(values: dict[str, Any], file: Path) -> None:
    known = hasattr(transformers, str(values.get("tokenizer_class", "GemmaTokenizer")))
    if "auto_map" in values and not known:
        raise CheckpointError(
            f"{file}: the tokenizer is code inside the checkpoint (auto_map), and such code is never run; write"
            f' "tokenizer_class": "PreTrainedTokenizerFast" in its place if tokenizer.json is complete'
        )
    template = values.get("chat_template")
    if not isinstance(template, str | list | None):
        raise CheckpointError(f"{file}: chat_template is {type(template).__name__}, expected a string; delete it")


def _parse(file: Path) -> None:
    """Read a `tokenizer.json` with the library itself first: what it refuses is a plain `Exception`, which cannot be
    told from others further up."""
    try:
        tokenizers_library.Tokenizer.from_file(str(file))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise CheckpointError(
            f"{file}: cannot be read ({' '.join(str(error).split())[:200]}); it is damaged, or was written by a newer"
            f" version of the tokenizers library: copy it again, or upgrade"
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
