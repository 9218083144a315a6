"""Results as plain text, for a terminal or a log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlm.words import columns

_LISTED = 10


def table(results: Mapping[str, Any]) -> str:
    """The scores of `evaluate`, or of `evaluate_tasks`."""
    tasks = results.get("tasks")
    return _of_one(results) if tasks is None else _of_tasks(tasks)


def _of_one(results: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("metric", "value", "95 % interval", "best constant", "items")]
    for name, result in results["metrics"].items():
        shown = (f"{result['value']:.4f}", _interval(result), constant(result), str(result["num_items"]))
        rows.append((name, *shown))
    return "\n".join([columns(_without_empty(rows, 3)), *_remarks(results)])


def constant(result: Mapping[str, Any], longest: int = 20) -> str:
    """What the best answer that is the same for every item would score: `0.5580 ("yes")`; "" if that is not known."""
    best = result.get("best_constant")
    if best is None:
        return ""
    answer = " ".join(best["answer"].split())
    return f"{best['value']:.4f} ({json.dumps(answer[:longest], ensure_ascii=False)}{'...' * (len(answer) > longest)})"


def _without_empty(rows: list[tuple[str, ...]], column: int) -> list[tuple[str, ...]]:
    """The rows without a column that has a heading only."""
    if any(row[column] for row in rows[1:]):
        return rows
    return [(*row[:column], *row[column + 1 :]) for row in rows]


def _of_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per task and metric, with what others have published for it beside."""
    heading = ("task", "metric", "value", "95 % interval", "best constant", "items", "published")
    rows: list[tuple[str, ...]] = [heading]
    remarks: list[str] = []
    for name, results in tasks.items():
        for place, (metric, result) in enumerate(results["metrics"].items()):
            shown = "; ".join(published(results, metric))
            rows.append(
                (
                    name if place == 0 else "",
                    *(metric, f"{result['value']:.4f}", _interval(result), constant(result)),
                    *(items_of(results, metric), shown),
                )
            )
        remarks += [f"{name}: {line}" for line in _remarks(results)]
    if any(row[6] for row in rows[1:]):
        remarks.insert(0, "published figures are as printed: 100 stands for 1")
    rows = _without_empty(_without_empty(rows, 6), 4)
    left = [i for i, name in enumerate(rows[0]) if name in ("task", "metric", "published")]
    return "\n".join([columns(rows, left=left), *remarks])


def published(results: Mapping[str, Any], metric: str) -> list[str]:
    """Published figures for a metric over all items, as printed."""
    task = results.get("task") or {}
    return [label(entry) for entry in task.get("published", ()) if entry["metric"] == metric and not entry["group"]]


def label(entry: Mapping[str, Any]) -> str:
    """One published figure with its model: "82.1 (PaliGemma 3B at 448)"."""
    return f"{entry['value']:g} ({model_of(entry)})"


def model_of(entry: Mapping[str, Any]) -> str:
    """Whose figure it is: "PaliGemma 3B at 448"."""
    size = f" at {entry['resolution']}" if entry.get("resolution") else ""
    return entry["model"] + (f" with {entry['tokens']} tokens" if entry.get("tokens") else size)


def items_of(results: Mapping[str, Any], metric: str) -> str:
    """The number of items, and of how many, where the task says how many its split has; of a metric that is about
    others (captions, where the items are images), theirs."""
    own = results["metrics"][metric]["num_items"]
    if own != results["num_items"]:
        return str(own)
    count, expected = results["num_items"], (results.get("task") or {}).get("expected_items")
    return f"{count} of {expected}" if expected not in (None, count) else str(count)


def _interval(result: Mapping[str, Any]) -> str:
    ends = result["interval_95"]
    return "" if ends is None else f"{ends[0]:.4f} - {ends[1]:.4f}"


def _remarks(results: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: {note}" for name, result in results["metrics"].items() for note in result.get("notes", ())]
    if over := (results.get("task") or {}).get("average_over"):
        lines += _by_group(results, over)
    if others := (results.get("task") or {}).get("published_for_other_models"):
        if not results["task"]["published"]:
            models = len({one["model"] for one in others})
            lines.append(f"published figures of {models} checkpoints, none of this name, are in results.json")
    if results["images_shuffled_with_seed"] is not None:
        lines.append("control: every item was shown another item's image")
    if results["failures"]:
        lines.append(f"{len(results['failures'])} items count as wrong, because an image could not be decoded:")
        lines += [f"  {one['id']}: {one['code']}: {one['message']}" for one in results["failures"][:_LISTED]]
    if results.get("num_cut_predictions"):
        limit = results["decoding"]["max_new_tokens"]
        lines.append(f"{results['num_cut_predictions']} answers were cut after {limit} tokens (--max-new-tokens)")
    if results["skipped_annotations"]:
        lines.append(f"{len(results['skipped_annotations'])} broken annotations were left out (see results.json)")
    return lines


def _by_group(results: Mapping[str, Any], over: str) -> list[str]:
    """What a metric at rank 1 is in each group that it is a mean over."""
    leading = [name for name in results["metrics"] if name.endswith("_r@1")]
    found = {name: results["metrics"][name]["details"] for name in leading}
    return [
        f"{name}: " + ", ".join(f"{key.removeprefix(f'{over} ')} {value:.4f}" for key, value in values.items())
        for name, values in found.items()
    ]
