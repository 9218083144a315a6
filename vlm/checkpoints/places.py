"""Where a checkpoint lies: a directory, the model inside a training run, or what the Hub gives."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vlm.checkpoints.files import INDEX, SINGLE, read_json
from vlm.errors import CheckpointError, nearest

log = logging.getLogger(__name__)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
HUB_FILES = ("*.json", "*.safetensors", "*.model")
DEMO_SIGLIP = "demo-siglip"
"""The package's own SigLIP with both towers, which needs no download."""
SHIPPED = {DEMO_SIGLIP: Path(__file__).parents[1] / "demo" / "assets" / "dual"}
"""Name -> the folder in the package. A name is no hub id (it has no owner); a path of that name wins."""


def locate(path: str | Path, *, revision: str | None = None, patterns: Sequence[str] = HUB_FILES) -> Path:
    """The directory of a checkpoint: `path` itself, the `model` inside a training run or a stage of one, what the
    package ships under that name (`SHIPPED`), or the downloaded files of a hub id (`owner/name`, or as people paste it:
    see `hub_id`).

    Raises:
        CheckpointError: there is no such directory and it is no hub id, the Hub does not give it out, or it is a
            training run (or a stage) that has no model yet.
    """
    if Path(path).is_dir():
        return not_an_adapter(_of_run(Path(path)))
    if Path(path).exists():
        raise CheckpointError(f"{path}: is a file, expected a checkpoint directory or a hub id (owner/name)")
    if str(path) in SHIPPED:
        return SHIPPED[str(path)]
    name, pasted = hub_id(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{path}: no such directory, and not a hub id (owner/name){nearest(str(path), list(SHIPPED))}"
        )
    try:
        folder = Path(snapshot_download(name, revision=revision or pasted, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{path}: no such directory, and the Hub does not give it: {' '.join(str(error).split())[:300]}"
        ) from error
    return not_an_adapter(folder)


def hub_id(text: str | Path) -> tuple[str, str | None]:
    """`owner/name` and the revision out of what people paste: an address of the Hub's pages
    (`https://huggingface.co/owner/name/tree/main`), `hf-hub:owner/name`, `hf://owner/name`; anything else as it is."""
    pasted = str(text).strip()
    found = re.fullmatch(
        r"(?:(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf-hub:|hf:/{1,2})"
        r"(?:models/)?([\w.-]+/[\w.-]+)(?:@([^/?#]+)|/(?:tree|blob|resolve|raw)/([^/?#]+)[^?#]*)?/?(?:[?#].*)?",
        pasted,
    )
    return (found[1], found[2] or found[3]) if found else (pasted, None)


def _of_run(folder: Path) -> Path:
    """The model of a run's or a stage's directory; any other directory is itself."""
    if (folder / "config.json").exists():
        return folder
    if (folder / "model" / "config.json").exists():
        return folder / "model"
    found = [file for place in ("", "*/") for file in folder.glob(f"{place}checkpoints/step-*/state.json")]
    steps = sorted(found, key=lambda file: file.stat().st_mtime)
    if (folder / "config.yaml").is_file() or steps:
        others = [file.parent for file in sorted(folder.glob("*/model/config.json"), key=lambda f: f.stat().st_mtime)]
        newest = [*others, *(file.parent for file in steps)][-1:]
        advice = f"; the newest there is {newest[0]}" if newest else ""
        raise CheckpointError(
            f"{folder}: a training run without a finished model{advice}; name that, or go on training"
        )
    return folder


def not_an_adapter(folder: Path) -> Path:
    """The directory, unless it holds an adapter of the peft library (LoRA) in place of a model.

    Raises:
        CheckpointError: says what to do with it.
    """
    files = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not files:
        return folder
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        log.warning("%s: %s beside the model is not used; merge an adapter to use it", folder, files[0])
        return folder
    settings = read_json(folder / ADAPTER_FILES[0]) if files[0] == ADAPTER_FILES[0] else {}
    kind, base = settings.get("peft_type") or "LORA", settings.get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder}: is an adapter ({'LoRA' if kind == 'LORA' else kind}, {files[0]}), not a model: it belongs on"
        f" {base or 'the model that it was trained on'}. Merge it once: open that with vlm.load, then"
        f" merged = peft.PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload() and"
        f" vlm.save(merged, processor, DIR)"
    )
