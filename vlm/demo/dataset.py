"""The demo's data on disk, as a user's would be: PNG files and JSONL annotations.

DATA/train.jsonl          image, prefix, suffix: questions and captions mixed
DATA/test_questions.jsonl with `answers` (one) and `kind`
DATA/test_captions.jsonl  with `references` (every caption the scene's writer knows)
DATA/images/              train-00000.png ..., test-0000.png ...
DATA/complete.json        what was drawn; written last
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from vlm.demo import captions, questions, scenes

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
    done = folder / "complete.json"
    facts = {"seed": seed, "train_scenes": train_scenes, "test_scenes": test_scenes, "image_size": scenes.IMAGE_SIZE}
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == facts:
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    _write_train(folder, seed, train_scenes)
    _write_test(folder, seed, test_scenes)
    done.write_text(json.dumps(facts) + "\n", encoding="utf-8")


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
    write_lines(folder / "train.jsonl", lines)


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
    write_lines(folder / "test_questions.jsonl", asked)
    write_lines(folder / "test_captions.jsonl", described)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """The objects as a JSONL file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
