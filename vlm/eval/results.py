"""From predictions to what `results.json` holds: scores, counts, breakdowns. Writes nothing; `vlm.eval.run` does."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from vlm.data.examples import Example
from vlm.data.problems import Problem
from vlm.errors import DataError
from vlm.eval import items
from vlm.eval.metrics import captions, official, registry
from vlm.eval.metrics.registry import Metric
from vlm.eval.metrics.result import NUM_RESAMPLES, MetricResult
from vlm.generation.predictions import Record
from vlm.version import __version__

NO_ANSWER = "\N{REPLACEMENT CHARACTER}"
"""Scored for an item without an answer where a metric would call the empty text right: VQA's "a" is nothing, too, once
articles are dropped."""


def unanswered(records: Sequence[Record]) -> frozenset[str]:
    """Ids of the items that the model was never asked, because an image could not be decoded."""
    return frozenset(record["id"] for record in records if "error" in record)


def score(
    chosen: Sequence[Metric],
    examples: Sequence[Example],
    said: Mapping[str, str],
    wrong: Collection[str],
    groups: Mapping[str, str] | None = None,
    over: str = "",
) -> list[MetricResult]:
    """One result per metric, each compared with the gold texts that it reads.

    Args:
        said: item id -> answer, cleaned up.
        wrong: ids of the items that were not answered (`unanswered`): they are wrong, whatever a metric makes of the
            empty text.
        groups: item id -> group; each group is scored alone then, and a value is the mean over groups, unweighted.
        over: what the groups are called.
    """
    if groups is None:
        return [compute(metric, examples, said, wrong) for metric in chosen]
    members: dict[str, list[Example]] = {}
    for example in examples:
        members.setdefault(groups[example.id], []).append(example)
    return [
        average(
            {name: compute(metric, group, said, wrong) for name, group in sorted(members.items())},
            [example.id for example in examples],
            over,
        )
        for metric in chosen
    ]


def with_constants(
    scored: Sequence[MetricResult], examples: Sequence[Example], groups: Mapping[str, str] | None = None, over: str = ""
) -> list[MetricResult]:
    """The results with the best constant answer beside each, scored over the same items and groups."""
    return [_with_constant(result, examples, groups, over) for result in scored]


def _with_constant(
    result: MetricResult, examples: Sequence[Example], groups: Mapping[str, str] | None, over: str
) -> MetricResult:
    metric = registry.get(result.name)
    if metric.constants is None:
        return result
    gold = {example.id: items.gold_texts(example, metric.reads) for example in examples}
    info = {example.id: example.info for example in examples}

    def average(answer: str) -> float:
        return score([metric], examples, dict.fromkeys(gold, answer), (), groups, over)[0].value

    constant = registry.best_constant(metric, gold, info, None if groups is None else average)
    return replace(result, best_constant=constant)


def check(
    chosen: Sequence[Metric], examples: Sequence[Example], groups: Mapping[str, str] | None = None, over: str = ""
) -> None:
    """Score the first gold text of every item as if the model had said it, so that what a metric refuses (too few
    answers, a missing fact, METEOR without Java) is refused before anything is predicted and not hours later.

    Caption metrics are left out: they refuse next to nothing, and take long.

    Raises:
        ConfigError, DataError: as the metrics.
    """
    if any(metric.name == "meteor" for metric in chosen):
        official.require("meteor")
    quick = [metric for metric in chosen if metric.name not in captions.METRICS and metric.name != "meteor"]
    for metric in quick:
        said = {example.id: items.gold_texts(example, metric.reads)[0] for example in examples}
        score([metric], examples, said, (), groups, over)


def compute(
    metric: Metric, examples: Sequence[Example], said: Mapping[str, str], wrong: Collection[str]
) -> MetricResult:
    """One metric over some items; see `score`."""
    predictions = {example.id: said[example.id] for example in examples}
    gold = {example.id: items.gold_texts(example, metric.reads) for example in examples}
    info = {example.id: {**example.info, "answered": example.id not in wrong} for example in examples}
    result = registry.compute(metric.name, predictions, gold, info)
    credited = [key for key, score in result.per_item.items() if key in wrong and score > 0]
    if not credited:
        return result
    return registry.compute(metric.name, predictions | dict.fromkeys(credited, NO_ANSWER), gold, info)


def average(parts: Mapping[str, MetricResult], ids: Sequence[str], over: str) -> MetricResult:
    """The mean over groups, unweighted, of a metric that was computed in each alone.

    Args:
        parts: group -> its result. ids: of all items, in the order of the data. over: what the groups are called.
    """
    per_item = {key: score for part in parts.values() for key, score in part.per_item.items()}
    first = next(iter(parts.values()))
    scores = [list(part.per_item.values()) for part in parts.values()]
    return replace(
        first,
        value=sum(part.value for part in parts.values()) / len(parts),
        per_item={key: per_item[key] for key in ids},
        rule=f"{first.rule}; computed for each {over} alone ({len(parts)} of them) and averaged without weights",
        # Of corpus BLEU the items' scores say nothing; `vlm eval diff` resamples it properly.
        interval=_interval_of_average(scores) if all(map(is_mean, parts.values())) else None,
        details={f"{over} {name}": part.value for name, part in parts.items()},
    )


def _interval_of_average(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of group means, items resampled inside each group."""
    rng = np.random.default_rng(0)
    means = np.zeros(NUM_RESAMPLES)
    for group in groups:
        scores = np.asarray(group)
        for index in range(NUM_RESAMPLES):
            means[index] += scores[rng.integers(0, len(scores), len(scores))].mean()
    low, high = np.percentile(means / len(groups), [2.5, 97.5])
    return float(low), float(high)


def figures(
    scored: Sequence[MetricResult], kinds: Mapping[str, str], records: Sequence[Record], problems: Sequence[Problem]
) -> dict[str, Any]:
    """Scores, counts, failures and the breakdown by kind: the part of the results that is measured."""
    failures = [{"id": record["id"], **record["error"]} for record in records if "error" in record]
    return {
        "metrics": {result.name: result.summary() for result in scored},
        "num_items": len(records),
        "num_empty_predictions": sum(not record["prediction"].strip() for record in records),
        "num_cut_predictions": sum(record.get("finish") == "length" for record in records),
        "skipped": len(failures) + len(problems),
        "failures": failures,
        "skipped_annotations": [
            {"file": str(problem.file), "line": problem.line, "code": problem.code, "message": problem.message}
            for problem in problems
        ],
        "by_kind": {result.name: by_group(result, kinds) for result in scored},
    }


def breakdown(
    scored: Sequence[MetricResult],
    groups: Mapping[str, Mapping[str, str]],
    examples: Sequence[Example],
    said: Mapping[str, str],
    wrong: Collection[str],
) -> dict[str, Any]:
    """Name of a breakdown -> metric -> group -> `mean` of the items' scores, and `num_items`.

    Where the metric is not the mean of its items' scores (corpus BLEU, F1), `value` is the metric of the group alone;
    it is missing where the metric refuses the group.
    """
    found: dict[str, Any] = {}
    for name, kinds in groups.items():
        members: dict[str, list[Example]] = {}
        for example in examples:
            members.setdefault(kinds[example.id], []).append(example)
        found[name] = {result.name: by_group(result, kinds) for result in scored}
        for result in scored:
            if not is_mean(result):
                for kind, group in members.items():
                    with suppress(DataError):
                        value = compute(registry.get(result.name), group, said, wrong).value
                        found[name][result.name][kind]["value"] = value
    return found


def is_mean(result: MetricResult) -> bool:
    """Whether the metric is the mean of its items' scores."""
    mean = sum(result.per_item.values()) / len(result.per_item)
    return abs(mean - result.value) <= 1e-9 * max(1.0, abs(result.value))


def by_group(result: MetricResult, kinds: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Group -> `mean` of its items' scores and `num_items`."""
    groups: dict[str, list[float]] = {}
    for key, value in result.per_item.items():
        groups.setdefault(kinds[key], []).append(value)
    return {kind: {"mean": sum(group) / len(group), "num_items": len(group)} for kind, group in sorted(groups.items())}


def item_lines(
    examples: Sequence[Example],
    kinds: Mapping[str, str],
    records: Sequence[Record],
    said: Mapping[str, str],
    scored: Sequence[MetricResult],
) -> Iterator[Record]:
    """One record per item, in the order of the data: prediction, gold texts, facts, kind and scores."""
    for example, record in zip(examples, records, strict=True):
        gold = {"suffix": example.suffix, "references": example.references, "answers": example.answers}
        line = {**record, **{key: value for key, value in gold.items() if value not in (None, ())}}
        if said[example.id] != record["prediction"]:
            line["scored_as"] = said[example.id]
        if example.info:
            line["info"] = dict(example.info)
        images = [str(image) for image in example.images if not hasattr(image, "size")]
        if images:
            line["images"] = images
        yield {
            **line,
            "kind": kinds[example.id],
            "scores": {result.name: result.per_item[example.id] for result in scored},
        }


def one_prompt_per_kind(examples: Sequence[Example], kinds: Mapping[str, str], limit: int = 8) -> list[str]:
    """The first prompt of each kind, as the model got it, for at most `limit` kinds."""
    first: dict[str, str] = {}
    for example in examples:
        first.setdefault(kinds[example.id], example.prefix)
    return list(first.values())[:limit]


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    found = {"vlm": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "Pillow", "numpy"):
        try:
            found[package.lower()] = version(package)
        except PackageNotFoundError:
            found[package.lower()] = "not installed"
    return found
