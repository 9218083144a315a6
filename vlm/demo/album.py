"""A folder of drawn scenes as a user's collection would be: pictures, and what is known about each.

ALBUM/images/     scene-000.png ...
ALBUM/scenes.jsonl     id, image, captions (all true of it), number, colours, shapes
ALBUM/colour.jsonl, shape.jsonl, number.jsonl     image and label: what `vlm eval --tasks zeroshot` reads
ALBUM/complete.json    what was drawn; written last

Every scene is a test scene (it holds a thing in its held-out place). As many show one thing as two and three, so that
counting has a chance of a third. A few are drawn for one search, beside others that differ from it in one way.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm import files
from vlm.demo import captions, dataset, scenes

SCENES = 300
NUMBERS = ("one shape", "two shapes", "three shapes")
"""Labels of `number.jsonl`; scenes of each stand in turn."""
SOUGHT = "a red star above a blue circle"
SOUGHT_EVERY = 24
"""One in so many scenes, always of three things, is drawn for that search; every fourth of them fits."""


def write(folder: Path, seed: int, count: int = SCENES) -> None:
    """Draw the scenes into `folder`, or leave it alone when that is done."""
    if whole(folder, seed, count):
        return
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rng = random.Random(f"album captions {seed}")
    lines = []
    for number, scene in enumerate(all_scenes(seed, count)):
        image = f"images/scene-{number:03d}.png"
        scenes.draw(scene).save(folder / image)
        lines.append(_line(rng, scene, f"scene-{number:03d}", image))
    files.write_lines(folder / "scenes.jsonl", lines)
    alone = [line for line in lines if line["number"] == 1]
    _write_labels(folder / "colour.jsonl", alone, lambda line: line["colours"][0])
    _write_labels(folder / "shape.jsonl", alone, lambda line: line["shapes"][0])
    _write_labels(folder / "number.jsonl", lines, lambda line: NUMBERS[line["number"] - 1])
    dataset.finish(folder, _drawn(seed, count))


def whole(folder: Path, seed: int, count: int = SCENES) -> bool:
    """Whether just these scenes were drawn to their end."""
    return dataset.finished(folder, _drawn(seed, count))


def _drawn(seed: int, count: int) -> dict[str, int]:
    return {"seed": seed, "scenes": count, "image_size": scenes.IMAGE_SIZE}


def all_scenes(seed: int, count: int = SCENES) -> list[scenes.Scene]:
    """The scenes themselves, against which texts are checked."""
    rng = random.Random(f"album {seed}")
    made = []
    for number in range(count):
        things = 1 + number % len(NUMBERS)
        turn, rest = divmod(number, SOUGHT_EVERY)
        made.append(_for_search(rng, turn) if rest == len(NUMBERS) - 1 else _of(rng, things))
    return made


def _for_search(rng: random.Random, turn: int) -> scenes.Scene:
    """A red star above a blue circle; in the next ones they have changed places, colours, or stand side by side. The
    third thing is in its held-out place."""
    upper, lower = ("red", "star"), ("blue", "circle")
    if turn % 4 == 1:
        upper, lower = lower, upper
    elif turn % 4 == 2:
        upper, lower = ("blue", "star"), ("red", "circle")
    while True:
        above, below = (3 * row + rng.randrange(3) for row in sorted(rng.sample(range(3), 2)))
        third = rng.choice(scenes.PAIRS)
        if turn % 4 == 3:
            below = rng.choice([cell for cell in range(9) if cell // 3 == above // 3 and cell != above])
        if third not in (upper, lower) and scenes.HELD_OUT[third] not in (above, below):
            placed = {upper: above, lower: below, third: scenes.HELD_OUT[third]}
            return scenes.arrange(rng, placed, scenes.CLEAR_RADIUS)


def _line(rng: random.Random, scene: scenes.Scene, name: str, image: str) -> dict[str, Any]:
    return {
        "id": name,
        "image": image,
        "captions": sorted(captions.captions(rng, scene)),
        "number": len(scene.things),
        "colours": [thing.colour for thing in scene.things],
        "shapes": [thing.shape for thing in scene.things],
    }


def _write_labels(file: Path, lines: list[dict[str, Any]], label: Callable[[dict[str, Any]], str]) -> None:
    files.write_lines(file, [{"id": line["id"], "image": line["image"], "label": label(line)} for line in lines])


def _of(rng: random.Random, things: int) -> scenes.Scene:
    while True:
        scene = scenes.make_scene(rng, held_out=True, radius=scenes.CLEAR_RADIUS)
        if len(scene.things) == things:
            return scene
