"""A dual tower as a directory of transformers' layout, which `vlm.siglip.load` and the Auto classes open alike."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GemmaTokenizer, Siglip2Tokenizer

from vlm.checkpoints import manifest
from vlm.checkpoints.image_settings import OWN_TRANSFORM
from vlm.checkpoints.preprocessing import FILTERS
from vlm.checkpoints.shards import parse_size, write_shards
from vlm.errors import ConfigError
from vlm.files import disk_errors, publishing, rust_disk_errors, write_json
from vlm.images.transforms import ImageTransform
from vlm.model.dual import FAMILY, DualTower
from vlm.siglip import open_clip
from vlm.siglip.processor import DualProcessor

log = logging.getLogger(__name__)
OWN_SUFFIXES = (".json", ".safetensors", ".model", ".jinja")
"""What such a directory is made of; these go when a model is saved over it, others stay."""
LOWERING = {"siglip2": Siglip2Tokenizer}
"""Family -> transformers' class for its vocabulary that lower-cases, where a plain Gemma tokenizer does not."""
SAMPLES = ("A Photo of 2 cats, one RED!", "Zürich, ÉCOLE 猫", "", "a long text " * 100)


def save(model: DualTower, processor: DualProcessor, folder: str | Path, *, max_shard_size: str | int = "5GB") -> Path:
    """Write both towers and their processor. `load` opens them bit for bit; transformers' `AutoModel`, `AutoTokenizer`
    and `AutoProcessor` open them too.

    The tokenizer is written so that it agrees with the rule of its family: padding on the right to the position table,
    no BOS, EOS, no mask; SigLIP 2's lower-cases by itself. What is at `folder` is replaced in one step; files that are
    no part of a model stay.

    Args:
        max_shard_size: of a safetensors file, such as `5GB`.

    Returns:
        the directory.

    Raises:
        ConfigError: not a `DualTower` and a `DualProcessor`.
        CheckpointError: weights that are not finite.
        DiskError: the disk refuses; what is at `folder` is untouched.
    """
    if not isinstance(model, DualTower) or not isinstance(processor, DualProcessor):
        given = f"{type(model).__name__} and {type(processor).__name__}"
        raise ConfigError(f"save takes the DualTower and the DualProcessor of vlm.siglip.load, got {given}")
    parse_size(max_shard_size)
    place = Path(folder)
    with disk_errors(place), publishing(place, keep=lambda name: Path(name).suffix not in OWN_SUFFIXES) as staging:
        write(model, processor, staging, max_shard_size=max_shard_size)
    return place


def write(model: DualTower, processor: DualProcessor, folder: Path, *, max_shard_size: str | int = "5GB") -> None:
    """Write all files into an empty directory, the manifest last. Raises as `save`."""
    with rust_disk_errors():
        if isinstance(model, open_clip.OpenClipTower):
            open_clip.write(model, processor, folder)
            manifest.write(folder)
            return
        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model.model).__name__]
        config.dtype = model.dtype
        setattr(config, FAMILY, model.family)
        config.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", image_settings(processor.transform))
        if processor.tokenizer is not None:
            _write_tokenizer(processor, folder)
        write_shards(folder, model.model.state_dict(), None, max_shard_size)
        manifest.write(folder)


def image_settings(transform: ImageTransform) -> dict[str, Any]:
    """A transform as transformers' image processors have it, and, beside it, as it is here."""
    codes = {name: code for code, name in FILTERS.items()}
    common = {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "resample": codes[transform.resample],
        OWN_TRANSFORM: transform.to_dict(),
    }
    if transform.any_aspect:
        sizes: dict[str, Any] = {"patch_size": transform.patch_size, "max_num_patches": transform.max_num_patches}
        return {**common, "image_processor_type": "Siglip2ImageProcessor", **sizes}
    side = transform.image_size
    if transform.crops:
        sizes = {"size": {"shortest_edge": transform.resize_shortest or side}, "do_center_crop": True}
        sizes["crop_size"] = {"height": side, "width": side}
        return {**common, "image_processor_type": "CLIPImageProcessor", **sizes}
    return {**common, "image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}


def _write_tokenizer(processor: DualProcessor, folder: Path) -> None:
    """The tokenizer with the settings that its family's rule means, and a warning where transformers would still read
    texts in another way."""
    given, rule = processor.tokenizer, processor.rule
    given.save_pretrained(folder)
    kind = LOWERING.get(rule.family, type(given)) if isinstance(given, GemmaTokenizer) else type(given)
    agreeing = kind.from_pretrained(
        str(folder),
        local_files_only=True,
        padding_side=rule.side,
        model_input_names=["input_ids"],
        model_max_length=processor.context,
        eos_token=given.convert_ids_to_tokens(processor.specials.eos),
        pad_token=given.convert_ids_to_tokens(processor.specials.pad),
    )
    if hasattr(agreeing, "add_eos_token") and hasattr(agreeing, "add_bos_token"):
        agreeing.add_bos_token, agreeing.add_eos_token = rule.bos is not None, True
    agreeing.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    theirs = again(list(SAMPLES), padding="max_length", truncation=True)["input_ids"]
    ours = processor.texts(SAMPLES).input_ids.tolist()
    if theirs != ours:
        odd = next(text for text, one, other in zip(SAMPLES, ours, theirs, strict=True) if one != other)
        log.warning(
            "%s: transformers' AutoTokenizer will read texts in another way than %s does, such as %r; vlm reads them by"
            " the rule",
            folder,
            rule.title,
            odd[:40],
        )
