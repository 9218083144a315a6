"""From predictions to `results.json`: scores, counts, breakdown, and the table for the terminal."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import vlm
from vlm.data import Example, Problem

from . import items
from .metrics import Metric, MetricResult, registry

Record = dict[str, Any]
"""One prediction: `id`, `prefix`, `prediction`, and `error` (`code`, `message`) where the image was not decodable."""


def score(chosen: Sequence[Metric], examples: Sequence[Example], records: Sequence[Record]) -> list[MetricResult]:
    """One result per metric, each compared with the gold texts that it reads."""
    said = {record["id"]: record["prediction"] for record in records}
    return [
        registry.compute(metric.name, said, {ex.id: items.gold_texts(ex, metric.reads) for ex in examples})
        for metric in chosen
    ]


def figures(
    scored: Sequence[MetricResult], kinds: dict[str, str], records: Sequence[Record], problems: Sequence[Problem]
) -> dict[str, Any]:
    """Scores, counts, failures and the breakdown: the part of the results that is measured."""
    failures = [{"id": record["id"], **record["error"]} for record in records if "error" in record]
    return {
        "metrics": {result.name: result.summary() for result in scored},
        "num_items": len(records),
        "num_empty_predictions": sum(not record["prediction"].strip() for record in records),
        "skipped": len(failures) + len(problems),
        "failures": failures,
        "skipped_annotations": [
            {"file": str(problem.file), "line": problem.line, "code": problem.code, "message": problem.message}
            for problem in problems
        ],
        "by_kind": {result.name: _by_kind(result, kinds) for result in scored},
    }


def _by_kind(result: MetricResult, kinds: dict[str, str]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = {}
    for key, score in result.per_item.items():
        groups.setdefault(kinds[key], []).append(score)
    return {kind: {"mean": sum(group) / len(group), "num_items": len(group)} for kind, group in sorted(groups.items())}


def item_lines(
    examples: Sequence[Example], records: Sequence[Record], scored: Sequence[MetricResult], kinds: dict[str, str]
) -> Iterator[Record]:
    """One record per item, in the order of the data: prediction, gold texts, kind and scores."""
    for example, record in zip(examples, records, strict=True):
        gold = {"suffix": example.suffix, "references": example.references, "answers": example.answers}
        scores = {result.name: result.per_item[example.id] for result in scored}
        yield {
            **record,
            **{key: value for key, value in gold.items() if value},
            "kind": kinds[example.id],
            "scores": scores,
        }


def one_prompt_per_kind(examples: Sequence[Example], kinds: dict[str, str], limit: int = 8) -> list[str]:
    """The first prompt of each kind, as the model got it, for at most `limit` kinds."""
    first: dict[str, str] = {}
    for example in examples:
        first.setdefault(kinds[example.id], example.prefix)
    return list(first.values())[:limit]


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    found = {"vlm": vlm.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "Pillow", "numpy"):
        try:
            found[package.lower()] = version(package)
        except PackageNotFoundError:
            found[package.lower()] = "not installed"
    return found


def table(results: dict[str, Any]) -> str:
    """The scores of `evaluate` as plain text, for a terminal or a log."""
    rows = [("metric", "value", "95 % interval", "items")]
    for name, result in results["metrics"].items():
        ends = result["interval_95"]
        interval = "" if ends is None else f"{ends[0]:.4f} - {ends[1]:.4f}"
        rows.append((name, f"{result['value']:.4f}", interval, str(result["num_items"])))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip() for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    if results["images_shuffled_with_seed"] is not None:
        lines.append("control: every item was shown another item's image")
    if results["failures"]:
        lines.append(f"{len(results['failures'])} images could not be decoded and count as wrong:")
        lines += [f"  {failure['id']}: {failure['code']}: {failure['message']}" for failure in results["failures"][:10]]
    if results["skipped_annotations"]:
        lines.append(f"{len(results['skipped_annotations'])} broken annotations were left out (see results.json)")
    return "\n".join(lines)
