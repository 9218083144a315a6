"""The model of a checkpoint inside a training stage, `OUT/STAGE/checkpoints/step-N`.

Such a checkpoint holds only what trains. The rest is in the model that the stage began with: `model` of the stage
before, or the run's `start`, in the geometry of the stage (`vlm.checkpoints.geometry`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from vlm.checkpoints import manifest
from vlm.checkpoints.files import SINGLE
from vlm.checkpoints.geometry_plan import SETTINGS
from vlm.checkpoints.source import finite
from vlm.checkpoints.weights import Weights
from vlm.errors import CheckpointError


def is_checkpoint(path: str | Path) -> bool:
    """Whether this is the directory of a checkpoint inside a stage."""
    folder = Path(path)
    return (folder / "state.json").is_file() and (folder / SINGLE).is_file() and not (folder / "config.json").exists()


def began_with(path: str | Path, verify: manifest.Verify) -> tuple[Path, dict[str, Any]]:
    """The directory of the model that a checkpoint's stage began with, and the geometry that the stage gave it.

    Args:
        verify: how much to compare with the checkpoint's manifest.

    Raises:
        CheckpointError: it does not lie in its run, or the run has lost the model that the stage began with.
    """
    folder = Path(path).absolute()
    manifest.check(folder, verify)
    return _began_with(folder, folder.parent.parent.name, folder.parent.parent.parent)


def fill(model: nn.Module, path: str | Path, start: Path, allow_nonfinite: bool) -> None:
    """Give a model the tensors of a checkpoint, those that the stage trains.

    Args:
        model: what the stage began with, opened from `start`, in the geometry of the stage.

    Raises:
        CheckpointError: the tensors are not the model's, or not finite.
    """
    folder = Path(path).absolute()
    own = {**dict(model.named_parameters()), **model.state_dict()}
    weights = Weights(folder)
    odd = [name for name, info in weights.tensors.items() if name not in own or tuple(own[name].shape) != info.shape]
    if odd or not weights.tensors:
        raise CheckpointError(
            f"{folder}: its tensors are not those of {start}: {', '.join(odd[:5]) or 'there are none'}; both belong to"
            f" one run and must stay together"
        )
    with torch.no_grad():
        for name in weights.tensors:
            own[name].copy_(finite(weights.read(name), name, str(path), allow_nonfinite))


def _began_with(folder: Path, stage: str, run: Path) -> tuple[Path, dict[str, Any]]:
    """The directory of the model that a stage began with, and the geometry that the stage gave it."""
    values = _configuration(folder, run / "config.yaml")
    stages = values["stages"]
    names = [one.get("name") for one in stages]
    if stage not in names:
        raise CheckpointError(
            f"{folder}: {run / 'config.yaml'} has no stage {stage!r}, only {', '.join(map(str, names))}; a checkpoint"
            f" inside a stage is opened where its run left it, OUT/STAGE/checkpoints/step-N"
        )
    index = names.index(stage)
    start = run / "start" if index == 0 else run / str(names[index - 1]) / "model"
    if not (start / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds only what trains; the rest is in the model that the stage began with, {start}, which is"
            f" not there: copy the whole run"
        )
    own = stages[index]
    return start, {"seed": values.get("seed", 0), **{key: own[key] for key in SETTINGS if own.get(key)}}


def _configuration(folder: Path, file: Path) -> dict[str, Any]:
    """A run's own record of how it was configured, with a list of stages in it."""
    try:
        values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        stages = values["stages"]
        if isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages):
            return values
        problem = "no list of stages"
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        problem = " ".join(str(error).split())[:200]
    raise CheckpointError(
        f"{folder}: is a checkpoint inside a training stage, and the configuration of its run cannot be read: {file}:"
        f" {problem}; open it where its run left it, OUT/STAGE/checkpoints/step-N"
    )
