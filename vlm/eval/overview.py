"""The page over the results of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.eval import tables
from vlm.eval.results_page import percent_of
from vlm.report.page import Section
from vlm.report.scores import Links, Score, Scores, Stat, Table
from vlm.report.sections import write_report


def write(path: Path, outcome: Mapping[str, Any], model: str) -> Path:
    """Write the page.

    Args:
        outcome: what `evaluate_tasks` returns.
        model: its name.
    """
    tasks: Mapping[str, Mapping[str, Any]] = outcome["tasks"]
    items = sum(results["num_items"] for results in tasks.values())
    sections: list[Section] = [_main_scores(tasks), _all_scores(tasks)]
    if failures := _failures(tasks):
        sections.append(failures)
    sections.append(Links("Pages of the tasks", {name: f"{name}/report.html" for name in tasks}))
    versions = ", ".join(f"{name} {number}" for name, number in next(iter(tasks.values()))["versions"].items())
    return write_report(
        path,
        title="Evaluation",
        subtitle=f"{model} on {len(tasks)} tasks",
        stats=[
            Stat("tasks", str(len(tasks))),
            Stat("items", f"{items:,}"),
            Stat("skipped", str(outcome["skipped"]), tone="bad" if outcome["skipped"] else ""),
        ],
        sections=sections,
        footer=[f"Versions: {versions}"],
    )


def _main_scores(tasks: Mapping[str, Mapping[str, Any]]) -> Scores:
    """The first metric of each task, which is the one that the task reports."""
    rows = []
    for name, results in tasks.items():
        metric, result = next(iter(results["metrics"].items()))
        published = "; ".join(tables.published(results, metric))
        note = [results["task"]["title"]] if results["task"] else []
        note += [f"published: {published}"] if published else []
        rows.append(
            Score(
                f"{name} · {metric}",
                result["value"],
                None if result["interval_95"] is None else tuple(result["interval_95"]),
                result["num_items"],
                " · ".join(note),
                maximum=result["maximum"],
                percent=percent_of(result["maximum"]),
            )
        )
    return Scores(rows, title="Scores", note="The metric that each task is reported by; published figures as printed.")


def _all_scores(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [
            name,
            metric,
            result["value"],
            tables.constant(result),
            tables.items_of(results, metric),
            _published(results, metric),
        ]
        for name, results in tasks.items()
        for metric, result in results["metrics"].items()
    ]
    return Table("All metrics", ["task", "metric", "value", "best constant answer", "items", "published"], rows)


def _published(results: Mapping[str, Any], metric: str) -> str:
    return "; ".join(tables.published(results, metric))


def _failures(tasks: Mapping[str, Mapping[str, Any]]) -> Table | None:
    rows = [
        [name, len(one["failures"]), one["failures"][0]["message"]] for name, one in tasks.items() if one["failures"]
    ]
    if not rows:
        return None
    return Table("Images that could not be decoded", ["task", "items", "the first"], rows, "They count as wrong.")
