"""The demo's data on disk, as a user's would be: PNG files and JSONL annotations.

DATA/train.jsonl          image, prefix, suffix: questions and captions mixed
DATA/test_questions.jsonl with `answers` (one) and `kind`
DATA/test_captions.jsonl  with `references` (every caption the scene's writer knows)
DATA/images/              train-00000.png ..., test-0000.png ...
DATA/complete.json        what was drawn; written last
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm import files
from vlm.demo import captions, questions, scenes

log = logging.getLogger("vlm")

CAPTION_PROMPT = "caption en"
ANSWER_PROMPT = "answer en {}"
TRAIN_SCENES = 4500
TRAIN_QUESTIONS = 6
MOST_THINGS = 2
"""In one scene; more make the minutes of training too few."""
TEST_SCENES = 250
TEST_QUESTIONS = 4


def write(folder: Path, seed: int, train_scenes: int = TRAIN_SCENES, test_scenes: int = TEST_SCENES) -> None:
    """Draw the training and test sets into `folder`, or leave it alone when that is done already."""
    if whole(folder, seed, train_scenes, test_scenes):
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    _write_train(folder, seed, train_scenes)
    _write_test(folder, seed, test_scenes)
    finish(folder, _drawn(seed, train_scenes, test_scenes))


def whole(folder: Path, seed: int, train_scenes: int = TRAIN_SCENES, test_scenes: int = TEST_SCENES) -> bool:
    """Whether just these sets were drawn to their end."""
    return finished(folder, _drawn(seed, train_scenes, test_scenes))


def _drawn(seed: int, train_scenes: int, test_scenes: int) -> dict[str, int]:
    return {"seed": seed, "train_scenes": train_scenes, "test_scenes": test_scenes, "image_size": scenes.IMAGE_SIZE}


def finish(folder: Path, drawn: dict[str, Any]) -> None:
    """Say in `complete.json` what the folder holds, and the size of every file of lines."""
    files.write_json(folder / "complete.json", {**drawn, "bytes": _sizes(folder)})


def finished(folder: Path, drawn: dict[str, Any]) -> bool:
    """Whether `finish` has said so, and the files of lines are those of then."""
    found = left_over(folder / "complete.json")
    if not isinstance(found, dict) or {name: found.get(name) for name in drawn} != drawn:
        return False
    if any(_sizes(folder).get(name) != size for name, size in found.get("bytes", {}).items()):
        log.warning("%s is damaged: it is drawn again", folder)
        return False
    return True


def _sizes(folder: Path) -> dict[str, int]:
    # The probes of `vlm demo --prepare` are written later, and each time.
    paths = (path for path in sorted(folder.glob("*.jsonl")) if not path.name.startswith("probe_"))
    return {path.name: path.stat().st_size for path in paths}


def test_set(seed: int, count: int = TEST_SCENES) -> list[scenes.Scene]:
    """The test scenes themselves, against which captions are checked."""
    rng = random.Random(f"test scenes {seed}")
    return [scenes.make_scene(rng, held_out=True, most=MOST_THINGS, radius=scenes.CLEAR_RADIUS) for _ in range(count)]


def _write_train(folder: Path, seed: int, count: int) -> None:
    rng = random.Random(f"train {seed}")
    lines: list[dict[str, Any]] = []
    for number in range(count):
        scene = scenes.make_scene(rng, most=MOST_THINGS, radius=scenes.CLEAR_RADIUS)
        image = f"images/train-{number:05d}.png"
        scenes.draw(scene).save(folder / image)
        asked = questions.ask(rng, scene, TRAIN_QUESTIONS)
        pairs = [(ANSWER_PROMPT.format(question.text), question.answer) for question in asked]
        pairs += [(CAPTION_PROMPT, caption) for caption in _train_captions(rng, scene)]
        for index, (prefix, suffix) in enumerate(pairs):
            lines.append({"id": f"train-{number:05d}-{index}", "image": image, "prefix": prefix, "suffix": suffix})
    files.write_lines(folder / "train.jsonl", lines)


def _train_captions(rng: random.Random, scene: scenes.Scene) -> list[str]:
    """Three true captions, lists of everything in reading order: what comes next is then never a matter of taste."""
    everything = captions.all_things(scene)
    related = [c for c in captions.captions(rng, scene) if any(r in c for r in questions.RELATIONS)]
    return [everything, f"a picture of {everything}", rng.choice([everything, *related[:1]])]


def _write_test(folder: Path, seed: int, count: int) -> None:
    rng = random.Random(f"test {seed}")
    asked: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    for number, scene in enumerate(test_set(seed, count)):
        image = f"images/test-{number:04d}.png"
        scenes.draw(scene).save(folder / image)
        for index, question in enumerate(questions.ask(rng, scene, TEST_QUESTIONS)):
            line = {"id": f"test-{number:04d}-{index}", "image": image, "kind": question.kind}
            prefix = ANSWER_PROMPT.format(question.text)
            asked.append({**line, "prefix": prefix, "suffix": question.answer, "answers": [question.answer]})
        known = sorted(captions.captions(rng, scene))
        line = {"id": f"test-{number:04d}", "image": image, "prefix": CAPTION_PROMPT}
        described.append({**line, "suffix": known[0], "references": known})
    files.write_lines(folder / "test_questions.jsonl", asked)
    files.write_lines(folder / "test_captions.jsonl", described)


def left_over(path: Path) -> Any:
    """The JSON value that an earlier run has left; None where there is none, or a damaged one, which is told."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s is damaged (%d bytes): what it stands for is made again", path, path.stat().st_size)
        return None


def answered(path: Path, lines: Sequence[dict[str, Any]]) -> bool:
    """Whether the file holds a prediction for each of these lines, in order; if it is damaged, that is told."""
    if not path.exists():
        return False
    try:
        rows = read_lines(path)
        whole = [(row["id"], type(row["prediction"])) for row in rows] == [(line["id"], str) for line in lines]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        log.warning("%s is damaged: the model is asked again", path)
    return whole


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
