"""`vlm demo --prepare DIR`: everything that a comparison of vision towers on the drawn world needs.

DIR/data          the demo's data, and labelled pictures of one thing each (`probe_train.jsonl`, `probe_test.jsonl`)
DIR/towers/KIND   towers of one size, all pretrained on the same pictures for the same number of steps
DIR/gemma         the decoder of the package
DIR/compare.yaml  for `vlm compare`
DIR/prepare.json  seed, steps and numbers of scenes; what was made for other ones is not mixed
"""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm import files
from vlm.demo import dataset, scenes
from vlm.demo.recipe import Size, read_recipe
from vlm.demo.start import ASSETS, NAFLEX, SHIPPED, of_kind
from vlm.errors import ConfigError, nearest
from vlm.registry import kinds

log = logging.getLogger("vlm")

ENCODERS = ("siglip", "siglip2_naflex", "clip", "dinov2")
STEPS = 450
"""Of each tower's pretraining; the package's SigLIP had 2,000, but a few towers should take minutes."""
RUN_STEPS = {"align": 40, "tune": 700}
"""Of each run of the comparison; about half of the demo's."""
SEEDS = [0, 1]
PROBE_TRAIN = 20
"""Pictures of each of the 40 classes."""
PROBE_TEST = 10


def prepare(
    folder: str | Path,
    encoders: Sequence[str] = ENCODERS,
    *,
    seed: int = 0,
    steps: int | None = None,
    size: Size | None = None,
) -> Path:
    """Write the directory, or go on with it; towers that are there already stay.

    Args:
        encoders: encoder kinds. `siglip2_naflex` is the SigLIP of `towers/siglip` read as NaFlex where that is among
            them, and a tower of its own otherwise.
        seed: of data and weights.
        steps: of each tower's pretraining; None: `STEPS`; 0: new weights.

    Returns:
        the comparison's file.

    Raises:
        ConfigError: no such encoder kind, or the directory was made with another seed, size or number of steps.
    """
    from vlm.demo import pretrain

    folder, size = Path(folder), size or Size()
    steps = STEPS if steps is None else steps
    _check(encoders)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, {"seed": seed, "pretrain_steps": steps, "scenes": [size.train_scenes, size.test_scenes]})
    log.info("drawing scenes")
    dataset.write(folder / "data", seed, size.train_scenes, size.test_scenes)
    write_labelled(folder / "data", seed)
    shutil.copytree(ASSETS / "gemma", folder / "gemma", dirs_exist_ok=True)
    started = time.monotonic()
    own = [kind for kind in encoders if not reads_siglip(kind, encoders)]
    pretrain.run_jobs(pretrain.tower_jobs(own, folder / "towers", folder / "gemma", seed, steps))
    log.info("towers: %s, %d steps each, %.0f s", ", ".join(own), steps, time.monotonic() - started)
    file = folder / "compare.yaml"
    note = NOTE.format(steps=steps, towers=", ".join(own))
    files.write_text(file, note + yaml.safe_dump(comparison(encoders), sort_keys=False))
    return file


NOTE = """\
# Which vision tower? Run with: vlm compare FILE --out DIR. Paths are relative to this file.
# The towers ({towers}) have one size and were pretrained on the same pictures for {steps} steps each.
"""


def _check(encoders: Sequence[str]) -> None:
    known = kinds("vlm.encoders")
    for kind in encoders:
        if kind not in known:
            raise ConfigError(f"unknown encoder kind {kind!r}{nearest(kind, known)}; known: {', '.join(known)}")
    if not encoders or len(set(encoders)) < len(encoders):
        raise ConfigError(f"encoders: expected one or several different kinds, got {', '.join(encoders) or 'none'}")


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Remember what this directory is for, or refuse to mix towers that had different pretraining."""
    file = folder / "prepare.json"
    before = dataset.left_over(file)
    if before is None:
        if file.exists():  # for whatever settings these were made
            shutil.rmtree(folder / "towers", ignore_errors=True)
        files.write_json(file, settings)
    elif before != settings:
        raise ConfigError(f"{folder} was prepared with {before}, now asked for {settings}; give another directory")


def reads_siglip(kind: str, encoders: Sequence[str]) -> bool:
    """Is this the SigLIP, read as NaFlex, and no tower of its own?"""
    return bool(SHIPPED.get(kind)) and "siglip" in encoders


def comparison(encoders: Sequence[str]) -> dict[str, Any]:
    """The content of compare.yaml."""
    run = read_recipe()
    for stage in run["stages"]:
        stage["steps"] = RUN_STEPS[stage["name"]]
    run["model"] = {"decoder": "gemma", "projector": "linear"}
    run["data"] = {"train": "data/train.jsonl"}
    run["checkpoint_every"] = 200
    towers: dict[str, Any] = {kind: of_kind(kind, "towers") for kind in encoders}
    for kind in encoders:
        if reads_siglip(kind, encoders):
            towers[kind] = {"encoder": "towers/siglip", **NAFLEX}
    answers = {"data": "data/test_questions.jsonl", "metrics": ["exact_match"], "max_new_tokens": 8, "batch_size": 125}
    captions = {"data": "data/test_captions.jsonl", "metrics": ["cider"], "max_new_tokens": 24, "batch_size": 125}
    return {
        "seeds": SEEDS,
        "encoders": towers,
        "tasks": {"questions": answers, "captions": captions},
        "probes": {"train": "data/probe_train.jsonl", "test": "data/probe_test.jsonl"},
        "run": run,
    }


def write_labelled(data: Path, seed: int) -> None:
    """`probe_train.jsonl` and `probe_test.jsonl`: {"image", "label"}, one thing in each picture, labelled "red circle".

    The things of the test stand where no thing of their class stands in training.
    """
    for name, count in (("train", PROBE_TRAIN), ("test", PROBE_TEST)):
        rng = random.Random(f"probe {name} {seed}")
        lines = []
        for pair in scenes.PAIRS:
            for number in range(count):
                image = f"images/probe-{name}-{pair[0]}-{pair[1]}-{number:02d}.png"
                scenes.draw(scenes.make_labelled(rng, pair, held_out=name == "test")).save(data / image)
                lines.append({"image": image, "label": " ".join(pair)})
        files.write_lines(data / f"probe_{name}.jsonl", lines)
