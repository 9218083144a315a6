"""The difference of two results on the same items, and whether chance alone could have made it.

Items are resampled in pairs (Koehn 2004; Efron & Tibshirani 1993, chapter 16): every resample draws items, and the
difference B - A is taken on the same draw. The interval holds the middle 95 % of these differences, and p is twice the
share of resamples on the far side of zero, itself counted in, so that it is never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.examples import Example
from vlm.eval import items
from vlm.eval.metrics import captions, registry
from vlm.eval.metrics.ptb import tokenize

NUM_RESAMPLES = 2000
_WORK = 1_000_000  # items scored again by all resamples together, for a metric that is no mean over items
_AT_ONCE = 1 << 20  # drawn items; bounds the memory

_Statistic = Callable[[np.ndarray], np.ndarray]
"""int64[R, N] drawn positions -> float[R], the differences B - A of the resamples."""
_Scored = tuple[dict[str, str], dict[str, tuple[str, ...]], dict[str, Any]]
"""What was said, the gold texts and further facts, by item."""


@dataclass(frozen=True)
class Side:
    """The results of one folder."""

    folder: Path
    results: dict[str, Any]
    items: dict[str, dict[str, Any]]


def metric(name: str, left: Side, right: Side) -> dict[str, Any]:
    """One metric of both: values, their difference, its interval and p, and how these were found."""
    ours, theirs = left.results["metrics"][name], right.results["metrics"][name]
    left, right = (replace(side, items=_scored(side, name)) for side in (left, right))
    scores = [np.array([side.items[key]["scores"][name] for key in left.items]) for side in (left, right)]
    change = (scores[1] - scores[0]) * (1 if ours["higher_is_better"] else -1)
    statistic, resamples, method = _statistic(name, left, right, scores)
    difference = theirs["value"] - ours["value"]
    interval, p = bootstrap(statistic, _strata(left), resamples)
    return {
        "a": ours["value"],
        "b": theirs["value"],
        "difference": difference,
        "interval_95": interval,
        "p": p,
        "better": int((change > 0).sum()),
        "worse": int((change < 0).sum()),
        "method": method,
        "details": {
            key: {"a": value, "b": theirs["details"][key]}
            for key, value in ours["details"].items()
            if key in theirs["details"]
        },
    }


def _scored(side: Side, name: str) -> dict[str, dict[str, Any]]:
    """The items that have a score in this metric: those of a retrieval are about one direction each."""
    return {key: item for key, item in side.items.items() if name in item["scores"]}


def _strata(side: Side) -> list[np.ndarray]:
    """Positions of the items that are drawn among themselves: all, or each group of an average over groups."""
    over = (side.results["task"] or {}).get("average_over")
    groups: dict[str, list[int]] = {}
    for position, item in enumerate(side.items.values()):
        groups.setdefault(str(item["info"][over]) if over else "", []).append(position)
    return [np.array(positions) for positions in groups.values()]


def _statistic(name: str, left: Side, right: Side, scores: Sequence[np.ndarray]) -> tuple[_Statistic, int, str]:
    """How a resample's difference is computed in one group, how many resamples, and the method in words."""
    if name.startswith("bleu_"):
        return _bleu(name, left, right), NUM_RESAMPLES, "paired bootstrap over items, corpus score of every resample"
    if name.endswith("_median_rank"):
        first, second = scores
        method = "paired bootstrap over items, the median of every resample"
        return lambda draws: np.median(second[draws], 1) - np.median(first[draws], 1), NUM_RESAMPLES, method
    values = [side.results["metrics"][name]["value"] for side in (left, right)]
    means = [np.mean([score[positions].mean() for positions in _strata(left)]) for score in scores]
    if all(abs(mean - value) <= 1e-9 * max(1.0, abs(value)) for mean, value in zip(means, values, strict=True)):
        change = scores[1] - scores[0]
        fixed = "; document frequencies stay those of all items, an approximation" if name.startswith("cider") else ""
        return lambda draws: change[draws].mean(axis=1), NUM_RESAMPLES, f"paired bootstrap over items{fixed}"
    resamples = max(200, min(NUM_RESAMPLES, _WORK // len(left.items)))
    return _recomputed(name, left, right), resamples, "paired bootstrap over items, every resample scored anew"


def _bleu(name: str, left: Side, right: Side) -> _Statistic:
    index = int(name.removeprefix("bleu_")) - 1
    statistics = []
    for side in (left, right):
        said, gold = _texts(side, "references")
        rows = [captions.bleu_statistics(tokenize(said[key]), [tokenize(text) for text in gold[key]]) for key in gold]
        statistics.append(np.stack(rows))

    def difference(draws: np.ndarray) -> np.ndarray:
        first, second = (captions.bleu_of(rows[draws].sum(axis=1))[:, index] for rows in statistics)
        return np.asarray(second - first)

    return difference


def _recomputed(name: str, left: Side, right: Side) -> _Statistic:
    metric = registry.get(name)
    sides = [(*_texts(side, metric.reads), _info(side)) for side in (left, right)]
    keys = list(left.items)

    def value(side: _Scored, draw: np.ndarray) -> float:
        drawn = {str(place): keys[position] for place, position in enumerate(draw)}  # an item may be drawn twice
        said, gold, facts = ({place: part[key] for place, key in drawn.items()} for part in side)
        return registry.compute(name, said, gold, facts).value  # type: ignore[arg-type]

    return lambda draws: np.array([value(sides[1], draw) - value(sides[0], draw) for draw in draws])


def _texts(side: Side, reads: Any) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """What was scored, and what it was compared with, by item."""
    said = {key: item.get("scored_as", item["prediction"]) for key, item in side.items.items()}
    return said, {key: items.gold_texts(_example(item), reads) for key, item in side.items.items()}


def _info(side: Side) -> dict[str, Any]:
    """The facts of each item as they were scored, see `results.compute`."""
    return {key: {**item.get("info", {}), "answered": "error" not in item} for key, item in side.items.items()}


def _example(item: Mapping[str, Any]) -> Example:
    references, answers = (tuple(item.get(name, ())) for name in ("references", "answers"))
    return Example(item["id"], None, item["prefix"], item.get("suffix"), references, answers, file="", line=0)


def bootstrap(
    statistic: _Statistic, strata: Sequence[np.ndarray], resamples: int
) -> tuple[list[float] | None, float | None]:
    """Ends of the 95 % interval and p; None for fewer than two items, where resampling says nothing."""
    total = sum(map(len, strata))
    if total < 2:
        return None, None
    rng = np.random.default_rng(0)
    at_once = max(1, _AT_ONCE // total)
    values = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = [positions[rng.integers(0, len(positions), (rows, len(positions)))] for positions in strata]
        values.append(np.mean([statistic(draws) for draws in drawn], axis=0))
    differences = np.concatenate(values)
    low, high = np.percentile(differences, [2.5, 97.5])
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return [float(low), float(high)], min(1.0, 2 * (tail + 1) / (resamples + 1))
