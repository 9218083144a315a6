"""What the models say to the demo's test set, and how it is scored."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vlm import files
from vlm.checkpoints import digests
from vlm.data import content
from vlm.demo import captions, dataset
from vlm.demo.recipe import Size

log = logging.getLogger("vlm")

MAX_NEW_TOKENS = 56
"""The longest caption has 48 words and commas."""
BATCH_SIZE = 125
QUESTIONED = ("answers", "answers_shuffled", "answers_untrained")
"""Files of predictions about the questions."""


class Models(Protocol):
    """Models by their directories."""

    def identity(self, model: Path) -> str:
        """What makes it this model, and no other."""
        ...

    def answer(self, model: Path, images: Sequence[Path], prompts: Sequence[str]) -> list[str]:
        """What it says, greedily, `MAX_NEW_TOKENS` at most."""
        ...


class Answers:
    """What the models said to the test set, kept in `out/predictions`, and how it is scored."""

    def __init__(self, out: Path, seed: int, size: Size) -> None:
        self.folder = out / "predictions"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = out / "data"
        self.seed = seed
        self.questions = dataset.read_lines(self.data / "test_questions.jsonl")
        self.captions = dataset.read_lines(self.data / "test_captions.jsonl")
        self.scenes = dataset.test_set(seed, size.test_scenes)

    @cached_property
    def said(self) -> dict[str, dict[str, str]]:
        """Name of a file in `predictions` -> id -> what the model said; complete once `collect` is through."""
        files = sorted(self.folder.glob("*.jsonl"))
        return {file.stem: {row["id"]: row["prediction"] for row in dataset.read_lines(file)} for file in files}

    def collect(self, models: Models, model: Path, untrained: Path) -> None:
        """Ask the models whatever they have not been asked in an earlier run."""
        self._predict("answers", models, model, self.questions)
        self._predict("captions", models, model, self.captions)
        self._predict("answers_shuffled", models, model, self.shuffled())
        self._predict("answers_untrained", models, untrained, self.questions)

    def complete(self) -> bool:
        """Whether every model has answered everything."""
        asked = {"captions": self.captions} | dict.fromkeys(QUESTIONED, self.questions)
        return all(dataset.answered(self.folder / f"{name}.jsonl", lines) for name, lines in asked.items())

    def scores(self) -> dict[str, Any]:
        """All figures of `demo.json` that come from predictions."""
        return {
            "vqa_accuracy": self.accuracy("answers"),
            "vqa_accuracy_shuffled": self.accuracy("answers_shuffled"),
            "vqa_accuracy_untrained": self.accuracy("answers_untrained"),
            "vqa_accuracy_question_only": self._question_only(),
            "caption_accuracy": round(sum(v.true for v in self.verdicts().values()) / len(self.captions), 4),
            "cider": self._cider(),
            "vqa_accuracy_by_kind": self.by_kind("answers"),
            "num_questions": len(self.questions),
            "num_captions": len(self.captions),
        }

    def shuffled(self) -> list[dict[str, Any]]:
        """The questions, each with the picture of another scene."""
        pictures = sorted({line["image"] for line in self.questions})
        random.Random(f"shuffle {self.seed}").shuffle(pictures)
        other = dict(zip(pictures, pictures[1:] + pictures[:1], strict=True))
        return [{**line, "image": other[line["image"]]} for line in self.questions]

    def accuracy(self, name: str) -> float:
        right = [self.said[name][line["id"]] == line["suffix"] for line in self.questions]
        return round(sum(right) / len(right), 4)

    def by_kind(self, name: str) -> dict[str, float]:
        """Kind of question -> accuracy."""
        groups: dict[str, list[bool]] = {}
        for line in self.questions:
            groups.setdefault(line["kind"], []).append(self.said[name][line["id"]] == line["suffix"])
        return {kind: round(sum(right) / len(right), 4) for kind, right in sorted(groups.items())}

    def verdicts(self) -> dict[str, captions.Verdict]:
        """Caption id -> is it true of its scene?"""
        pairs = zip(self.captions, self.scenes, strict=True)
        return {line["id"]: captions.check(scene, self.said["captions"][line["id"]]) for line, scene in pairs}

    def _question_only(self) -> float:
        """Accuracy of the best constant answer to each kind of question: what needs no picture and no model."""
        counts: dict[str, dict[str, int]] = {}
        for line in self.questions:
            kind = counts.setdefault(line["kind"], {})
            kind[line["suffix"]] = kind.get(line["suffix"], 0) + 1
        return round(sum(max(answers.values()) for answers in counts.values()) / len(self.questions), 4)

    def _cider(self) -> float:
        from vlm.eval.metrics.registry import compute

        references = {line["id"]: tuple(line["references"]) for line in self.captions}
        return round(compute("cider", self.said["captions"], references).value, 4)

    def _predict(self, name: str, models: Models, model: Path, lines: Sequence[dict[str, Any]]) -> None:
        images = [self.data / line["image"] for line in lines]
        asked = [lines, [content.of_file(image) for image in images], MAX_NEW_TOKENS, BATCH_SIZE]
        made_of = {"model": models.identity(model), "asked": digests.of_values(asked)}
        file, note = self.folder / f"{name}.jsonl", self.folder / f"{name}.made_of.json"
        if dataset.answered(file, lines) and dataset.left_over(note) == made_of:
            return
        log.info("predicting: %s", name)
        texts = models.answer(model, images, [line["prefix"] for line in lines])
        rows = [{**line, "prediction": text} for line, text in zip(lines, texts, strict=True)]
        files.write_lines(file, rows)
        files.write_json(note, made_of)
