"""Shared by the tests of the task loaders: a data root to fill, and a check that gold answers score the maximum."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.examples import Example
from vlm.eval import items, metrics, tasks
from vlm.eval.gold import read_gold
from vlm.eval.tasks import Task


class Root:
    """A data root that a test fills."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def json(self, name: str, content: Any) -> None:
        self.text(name, json.dumps(content))

    def lines(self, name: str, rows: Sequence[Any]) -> None:
        self.text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def text(self, name: str, content: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")

    def images(self, *names: str, size: tuple[int, int] = (40, 30)) -> None:
        for name in names:
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, "teal").save(path)


def load(name: str, root: Root, split: str | None = None) -> list[Example]:
    """The items; every image has to be there."""
    examples = tasks.get(name).load(root.path, split)
    for example in examples:
        for image in example.images:
            assert isinstance(image, Image.Image) or image.is_file()
    items.check(examples)
    return examples


def values(task: Task, examples: list[Example], said: dict[str, str]) -> dict[str, float]:
    """The metrics of a task for what was said."""
    info = {example.id: example.info for example in examples}
    found = {}
    for metric in metrics.expand(task.metrics):
        gold = {example.id: items.gold_texts(example, metric.reads) for example in examples}
        found[metric.name] = metrics.compute(metric.name, said, gold, info).value
    return found


def gold_scores_all(name: str, examples: list[Example], said: Sequence[str] | None = None) -> None:
    """Gold answers (or what is `said`) get every metric of the task to 1."""
    task = tasks.get(name)
    texts = said or [items.gold_texts(example, "answers")[0] for example in examples]
    answers = {example.id: text for example, text in zip(examples, texts, strict=True)}
    assert set(values(task, examples, answers).values()) == {1.0}
    for key in task.breakdown:
        assert task.groups(examples, key)


def as_scored_files(name: str, examples: list[Example], path: Path) -> None:
    """`vlm score` reads the same items, gold texts and facts of choice from the official file as the task does."""
    gold, _ = read_gold(path)
    for metric in metrics.expand(tasks.get(name).metrics):
        kept = {key: item for key, item in gold.items() if item.scored(metric.reads)}
        told = {key: item.texts(metric.reads) for key, item in kept.items()}
        assert {example.id: items.gold_texts(example, metric.reads) for example in examples} == told
    for example in examples:
        for fact in gold[example.id].info.keys() & example.info.keys():
            assert example.info[fact] == gold[example.id].info[fact], fact
