"""`vlm demo --task text`: read the number, with the same weights at a fixed resolution and as NaFlex.

Both towers start from the package's SigLIP, train on the same pictures by the same recipe with the same seed, and give
36 tokens for every picture. One squashes each picture to 72 x 72 pixels, the other keeps its aspect ratio.

OUT/data       train.jsonl, test.jsonl and images/
OUT/TOWER      the run of each tower, and what it said to the test pictures
OUT/text.json  the table
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vlm import files
from vlm.demo import dataset, text
from vlm.demo.recipe import claim, read_recipe
from vlm.demo.start import Choice, make
from vlm.train.config import load_config
from vlm.words import aligned

log = logging.getLogger("vlm")

PROMPT = "ocr"
TOWERS = ("siglip", "siglip2_naflex")
TRAIN = 8000
TEST = 420
STEPS = 750


@dataclass(frozen=True)
class Amount:
    """How much of everything; smaller numbers make a quick test."""

    train: int = TRAIN
    test: int = TEST
    steps: int = STEPS


def main(out: str | Path, *, seed: int = 0, amount: Amount | None = None, train: Callable[..., Path]) -> dict[str, Any]:
    """Train and score both towers in `out`, or go on there, and print the table.

    Args:
        train: `vlm.train.run`; processes that are started here call it.

    Returns:
        what `out/text.json` holds: for each tower `tokens` (mean), and for each shape and `all` the shares `exact` and
        `character_errors`.

    Raises:
        ConfigError: `out` holds a demo with other settings.
    """
    from vlm.demo import pretrain

    out, amount = Path(out), amount or Amount()
    out.mkdir(parents=True, exist_ok=True)
    claim(out, {"task": "text", "seed": seed, "amount": repr(amount)})
    log.info("drawing signs")
    write(out / "data", seed, amount)
    asked = dataset.read_lines(out / "data" / "test.jsonl")
    left = [tower for tower in TOWERS if not dataset.answered(out / tower / "said.jsonl", asked)]
    pretrain.run_jobs([(train_and_read, (tower, out, seed, amount.steps, train)) for tower in left])
    facts: dict[str, Any] = {tower: score(dataset.read_lines(out / tower / "said.jsonl")) for tower in TOWERS}
    files.write_json(out / "text.json", {"seed": seed, **facts})
    print(table(facts))
    return facts


def write(folder: Path, seed: int, amount: Amount) -> None:
    """Draw the training and the test set, or leave them alone when that is done."""
    drawn = {"seed": seed, "pictures": [amount.train, amount.test]}
    if dataset.finished(folder, drawn):
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, count in (("train", amount.train), ("test", amount.test)):
        rng = random.Random(f"signs {name} {seed}")
        lines = []
        for number in range(count):
            sign = text.make_sign(rng, grid_of(number, name))
            image = f"images/{name}-{number:05d}.png"
            text.draw(sign).save(folder / image)
            line = {"id": f"{name}-{number:05d}", "image": image, "prefix": PROMPT, "suffix": sign.text}
            lines.append(line if name == "train" else {**line, "shape": sign.shape})
        files.write_lines(folder / f"{name}.jsonl", lines)
    dataset.finish(folder, drawn)


def grid_of(number: int, name: str) -> tuple[int, int]:
    """The shape of a picture: in equal parts in the test; half squares in training, so that both towers have enough
    pictures that nothing distorts to learn the digits from."""
    if name == "train" and number % 2 == 0:
        return text.SQUARE
    others = [grid for grid in text.GRIDS if grid != text.SQUARE]
    return others[number // 2 % len(others)] if name == "train" else text.GRIDS[number % len(text.GRIDS)]


def train_and_read(tower: str, out: Path, seed: int, steps: int, train: Callable[..., Path]) -> None:
    """Train one tower and write `out/TOWER/said.jsonl`. On one thread: for a process of its own."""
    import torch

    from vlm.checkpoints.directory import load
    from vlm.generation.models import generate

    torch.set_num_threads(1)
    folder = out / tower
    folder.mkdir(exist_ok=True)
    files.write_text(folder / "train.yaml", yaml.safe_dump(recipe(tower, out, seed, steps), sort_keys=False))
    model, processor = load(train(load_config(folder / "train.yaml"), resume=True))
    lines = dataset.read_lines(out / "data" / "test.jsonl")
    images = [out / "data" / line["image"] for line in lines]
    said = generate(model, processor, images, [PROMPT] * len(lines), max_new_tokens=text.MOST + 2, batch_size=100)
    rows = [
        {**line, "prediction": words, "tokens": image_tokens(processor, image)}
        for line, words, image in zip(lines, said, images, strict=True)
    ]
    files.write_lines(folder / "said.jsonl", rows)


def recipe(tower: str, out: Path, seed: int, steps: int) -> dict[str, Any]:
    """The demo's second stage, longer or shorter: everything trains. One recipe for both towers."""
    run = read_recipe()
    stage = next(stage for stage in run["stages"] if stage["name"] == "tune")
    run["stages"] = [{**stage, "steps": steps}]
    run["model"] |= {**make(Choice(tower), out, seed).model, "seed": seed}
    run["data"] = {"train": str(out / "data" / "train.jsonl")}
    return {**run, "out": str(out / tower / "train"), "seed": seed}


def image_tokens(processor: Any, path: Path) -> int:
    """Placeholders of the decoder's input for this picture, counted."""
    with Image.open(path) as opened:
        batch = processor([opened.convert("RGB")], [PROMPT])
    return int((batch.input_ids == processor.image_token_id).sum())


def score(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """`tokens`, and for each shape (and `all`) the share of numbers read right and of characters read wrong."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["shape"], []).append(line)
    return {
        "tokens": sum(line["tokens"] for line in lines) / len(lines),
        **{shape: _shares(group) for shape, group in {**groups, "all": lines}.items()},
    }


def _shares(lines: list[dict[str, Any]]) -> dict[str, float]:
    wrong = sum(text.distance(line["prediction"], line["suffix"]) for line in lines)
    return {
        "exact": round(sum(line["prediction"] == line["suffix"] for line in lines) / len(lines), 4),
        "character_errors": round(wrong / sum(len(line["suffix"]) for line in lines), 4),
        "pictures": len(lines),
    }


def table(facts: dict[str, Any]) -> str:
    """Numbers read right (and characters read wrong) for each shape, in percent."""
    first, second = (facts[tower] for tower in TOWERS)
    head = ["width:height", "squashed to 72 x 72", "NaFlex"]
    rows = [[shape, *(_cell(tower[shape]) for tower in (first, second))] for shape in first if shape != "tokens"]
    rows.append(["image tokens", *(f"{tower['tokens']:.1f}" for tower in (first, second))])
    return "\n".join(["numbers read right (characters wrong)", *aligned([head, *rows], left=())])


def _cell(shares: dict[str, float]) -> str:
    return f"{100 * shares['exact']:5.1f} % ({100 * shares['character_errors']:5.1f} %)"
