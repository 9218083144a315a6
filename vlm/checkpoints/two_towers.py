"""Whether a checkpoint is an image tower with its text tower (SigLIP, CLIP), before anything of it is opened."""

from __future__ import annotations

from pathlib import Path

from vlm.checkpoints import big_vision
from vlm.checkpoints.files import read_json
from vlm.checkpoints.places import locate
from vlm.model.parts import encoder_spec, text_towers

OPEN_CLIP = "open_clip"


def has_two_towers(path: str | Path, *, revision: str | None = None) -> bool:
    """True for a checkpoint that `vlm.siglip.load` opens; False for a model that writes text, a tower alone, and
    whatever else.

    Args:
        path: a directory, a hub id (which is downloaded), or a big_vision `.npz`.

    Raises:
        CheckpointError: there is nothing of that name.
    """
    if Path(path).suffix == ".npz":
        with big_vision.open_npz(path) as arrays:
            return any(name.startswith("txt/") for name in arrays)
    folder = locate(path, revision=revision)
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "text_config" not in values:
        return (folder / encoder_spec(OPEN_CLIP).config_file).is_file()
    return values.get("model_type") in {tower.model_type for tower in text_towers().values()}
