"""The demo from start to end: draw, train in two stages, score on held-out scenes, show.

Every step leaves a file behind and is skipped when that is there, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import logging
import platform
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from vlm import files
from vlm.data import content
from vlm.demo import captions, dataset, show, start
from vlm.errors import ConfigError

log = logging.getLogger("vlm")

RECIPE = Path(__file__).with_name("recipe.yaml")
MAX_NEW_TOKENS = 56
"""The longest caption has 48 words and commas."""
BATCH_SIZE = 125
QUESTIONED = ("answers", "answers_shuffled", "answers_untrained")
"""Files of predictions about the questions."""
LIBRARIES = ("torch", "transformers", "lightning", "pillow", "sentencepiece")


@dataclass(frozen=True)
class Size:
    """How much of everything; the defaults are the demo's, smaller ones make a quick test."""

    train_scenes: int = dataset.TRAIN_SCENES
    test_scenes: int = dataset.TEST_SCENES
    overrides: tuple[str, ...] = ()
    """Changes to the training recipe, such as `stages.0.steps=10`."""
    pretrain_steps: int | None = None
    """Of each start checkpoint; None: as many as it takes."""


def main(
    out: str | Path = "demo",
    *,
    from_scratch: bool = False,
    pretrain: bool = False,
    encoder: str = "siglip",
    pretrain_encoder: bool = False,
    seed: int = 0,
    size: Size | None = None,
) -> dict[str, Any]:
    """Run the demo in the directory `out`, or go on with it, and return what `out/demo.json` holds.

    Args:
        out: everything is written below it; made if missing.
        from_scratch: first make the start checkpoints in `out/start`, instead of using those of the package.
        pretrain: make only the start checkpoints (`out/siglip`, `out/gemma`) and return their sizes in bytes.
        encoder: the tower: a kind, or a checkpoint. `siglip` and `siglip2_naflex` have the package's weights, any other
            kind is a tower of the same size with new weights.
        pretrain_encoder: first pretrain a tower of that kind in `out/start`, as the package's SigLIP was.
        seed: of data, weights and training; the start checkpoints of the package are those of seed 0.

    Raises:
        ConfigError: `out` holds a demo with other settings, or there is no such tower.
        Stopped: (a SystemExit) interrupted; running it again goes on.
    """
    from vlm.children import peak_memory_bytes

    out, size = Path(out), size or Size()
    choice = start.Choice(encoder, pretrain_encoder, from_scratch or pretrain, size.pretrain_steps)
    choice.check()
    if pretrain:
        start.make(choice, out, seed)
        return start.list_files(out)
    out.mkdir(parents=True, exist_ok=True)
    tower = {} if choice == start.Choice(steps=choice.steps, from_scratch=from_scratch) else asdict(choice)
    claim(out, {"seed": seed, "from_scratch": from_scratch, "size": repr(size), **tower})
    facts: dict[str, Any] | None = dataset.left_over(out / "demo.json")
    drawn = dataset.whole(out / "data", seed, size.train_scenes, size.test_scenes)
    if facts is not None and drawn and Answers(out, seed, size).complete():
        show.print_results(out, facts, Answers(out, seed, size))
        return facts
    with _Clock(out / "seconds.json") as clock:
        begin = start.make(choice, out / "start", seed)
        log.info("tower: %s", begin.text)
        log.info("drawing scenes")
        dataset.write(out / "data", seed, size.train_scenes, size.test_scenes)
        model = _train(out, begin, seed, size)
        answers = Answers(out, seed, size)
        answers.collect(model, out / "train" / "start")
        facts = {
            "seconds": round(clock.seconds(), 1),
            "peak_memory_gb": round(peak_memory_bytes() / 1e9, 2),
            **answers.scores(),
            "encoder": begin.facts(),
            "seed": seed,
            "versions": versions(),
        }
        show.write_report(out, facts, answers)
    files.write_json(out / "demo.json", facts)
    show.print_results(out, facts, answers)
    return facts


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


def _train(out: Path, begin: start.Start, seed: int, size: Size) -> Path:
    """Both stages through `vlm train`'s own entry, from a configuration that the user can read and run again."""
    from vlm import train

    recipe = read_recipe()
    recipe["out"] = str(out / "train")
    recipe["seed"] = seed
    recipe["model"] |= {**begin.model, "seed": seed}
    recipe["data"]["train"] = str(out / "data" / "train.jsonl")
    file = out / "train.yaml"
    files.write_text(file, yaml.safe_dump(recipe, sort_keys=False))
    train.run(train.load_config(file, size.overrides), resume=True)
    with files.publishing(out / "model") as folder:
        shutil.copytree(out / "train" / "model", folder, dirs_exist_ok=True)
    return out / "model"


def read_recipe() -> dict[str, Any]:
    """The training configuration without its paths."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    return recipe


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

    def collect(self, model: Path, untrained: Path) -> None:
        """Ask the models whatever they have not been asked in an earlier run."""
        loaded: dict[Path, Any] = {}
        self._predict("answers", loaded, model, self.questions)
        self._predict("captions", loaded, model, self.captions)
        self._predict("answers_shuffled", loaded, model, self.shuffled())
        self._predict("answers_untrained", loaded, untrained, self.questions)

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
        from vlm.eval import metrics

        references = {line["id"]: tuple(line["references"]) for line in self.captions}
        return round(metrics.compute("cider", self.said["captions"], references).value, 4)

    def _predict(self, name: str, loaded: dict[Path, Any], model: Path, lines: Sequence[dict[str, Any]]) -> None:
        from vlm.checkpoints import digests, identity

        images = [self.data / line["image"] for line in lines]
        asked = [lines, [content.of_file(image) for image in images], MAX_NEW_TOKENS, BATCH_SIZE]
        made_of = {"model": identity.of_checkpoint(model), "asked": digests.of_values(asked)}
        file, note = self.folder / f"{name}.jsonl", self.folder / f"{name}.made_of.json"
        if dataset.answered(file, lines) and dataset.left_over(note) == made_of:
            return
        import vlm

        if model not in loaded:
            loaded[model] = vlm.load(model)
        log.info("predicting: %s", name)
        prompts = [line["prefix"] for line in lines]
        network, processor = loaded[model]
        texts = vlm.generate(network, processor, images, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE)
        rows = [{**line, "prediction": text} for line, text in zip(lines, texts, strict=True)]
        files.write_lines(file, rows)
        files.write_json(note, made_of)


class _Clock:
    """Seconds spent in a directory over all runs of the demo in it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        before = dataset.left_over(file)
        self.before = float(before) if isinstance(before, int | float) else 0.0

    def __enter__(self) -> _Clock:
        self._start = time.monotonic()
        return self

    def seconds(self) -> float:
        return self.before + time.monotonic() - self._start

    def __exit__(self, *_: object) -> None:
        files.write_json(self.file, self.seconds())


def versions() -> dict[str, str]:
    """Library -> installed version."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
