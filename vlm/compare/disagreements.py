"""Items on which the arms disagree, as cards of the report."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vlm.compare.items import read_items
from vlm.data.examples import Example
from vlm.eval.items import gold_texts
from vlm.eval.metrics import registry
from vlm.report.sections import GalleryItem


class Run(Protocol):
    """A finished run."""

    @property
    def arm(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def folder(self) -> Path: ...


R = TypeVar("R", bound=Run)


def cards(
    finished: Sequence[Run],
    task: str,
    metric_name: str,
    examples: Sequence[Example],
    most: int,
    short: Mapping[str, str],
) -> list[GalleryItem]:
    """Items of a task whose scores differ between arms, one run per arm (all of the first seed that most arms have).

    Where scores are right or wrong, each pattern (which arms are right) gets the same share of the cards; elsewhere the
    items of the widest spread come first. The order is random with a fixed seed, not hand-picked.
    """
    runs = one_seed(finished)
    if len(runs) < 2:
        return []
    answers = {short[spec.arm]: {item["id"]: item for item in read_items(spec.folder, task)} for spec in runs}
    metric = registry.get(metric_name)
    chosen = _choose(answers, metric.name, metric.per_item_is_right, most)
    by_id = {example.id: example for example in examples}
    return [
        GalleryItem(
            image=by_id[key].image,
            prompt=by_id[key].prefix,
            prediction="",
            references=list(dict.fromkeys(gold_texts(by_id[key], metric.reads)))[:3],
            answers=[_answer(arm, items[key], metric.name, metric.per_item_is_right) for arm, items in answers.items()],
            id=key,
            kind=_pattern({arm: items[key]["scores"][metric.name] for arm, items in answers.items()})
            if metric.per_item_is_right
            else "",
        )
        for key in chosen
    ]


def one_seed(finished: Sequence[R]) -> list[R]:
    """The runs of the seed that most arms have, the earlier one among equals."""
    by_seed: dict[int, list[R]] = {}
    for spec in finished:
        by_seed.setdefault(spec.seed, []).append(spec)
    return max(by_seed.values(), key=len, default=[])


def _choose(answers: Mapping[str, Mapping[str, dict[str, Any]]], metric: str, binary: bool, most: int) -> list[str]:
    keys = sorted(next(iter(answers.values())))
    random.Random(0).shuffle(keys)
    scores = {key: {arm: items[key]["scores"][metric] for arm, items in answers.items()} for key in keys}
    spread = {key: max(values.values()) - min(values.values()) for key, values in scores.items()}
    differing = [key for key in keys if spread[key] > 0]
    if not binary:
        return sorted(differing, key=lambda key: -spread[key])[:most]
    groups: dict[str, list[str]] = {}
    for key in differing:
        groups.setdefault(_pattern(scores[key]), []).append(key)
    ordered = sorted(groups.values(), key=len, reverse=True)
    dealt = [group[turn] for turn in range(most) for group in ordered if turn < len(group)]
    return dealt[:most]


def _pattern(scores: Mapping[str, float]) -> str:
    """Which arms are right, in a few words."""
    right = [arm for arm, score in scores.items() if score == 1.0]
    wrong = [arm for arm, score in scores.items() if score != 1.0]
    if len(right) == 1:
        return f"only {right[0]} right"
    if len(wrong) == 1:
        return f"only {wrong[0]} wrong"
    return f"right: {', '.join(right)}"


def _answer(arm: str, item: dict[str, Any], metric: str, binary: bool) -> tuple[str, str, bool | None]:
    score = item["scores"][metric]
    if binary:
        return arm, item["prediction"], score == 1.0
    return f"{arm} ({score:.2f})", item["prediction"], None
