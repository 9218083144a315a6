"""What a demo is made with: how much of everything, the training recipe, and the note of it in its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm import files
from vlm.demo import dataset
from vlm.errors import ConfigError

RECIPE = Path(__file__).with_name("recipe.yaml")


@dataclass(frozen=True)
class Size:
    """How much of everything; the defaults are the demo's, smaller ones make a quick test."""

    train_scenes: int = dataset.TRAIN_SCENES
    test_scenes: int = dataset.TEST_SCENES
    overrides: tuple[str, ...] = ()
    """Changes to the training recipe, such as `stages.0.steps=10`."""
    pretrain_steps: int | None = None
    """Of each start checkpoint; None: as many as it takes."""


def read_recipe() -> dict[str, Any]:
    """The training configuration without its paths."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    return recipe


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Remember what this directory is for, or refuse to mix two demos in it."""
    file = out / "settings.json"
    before = dataset.left_over(file)
    if before is None:
        if file.exists():  # whatever settings it was made with; training and data know theirs
            for answers in (out / "demo.json", *out.glob("predictions/*.jsonl"), *out.glob("*/said.jsonl")):
                answers.unlink(missing_ok=True)
        files.write_json(file, settings)
    elif before != settings:
        raise ConfigError(f"{out} holds a demo with other settings ({file}); give another --out, or remove it")
