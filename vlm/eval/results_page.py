"""The report page of one evaluation, made from what the harness has at its end."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from vlm.data.examples import Example
from vlm.eval import items, tables
from vlm.eval.metrics import registry
from vlm.eval.metrics.result import MetricResult
from vlm.report.page import Section
from vlm.report.scores import Score, Scores, Table, breakdown
from vlm.report.sections import GalleryItem, write_report

GALLERY_SIZE = 60


def write(
    path: Path,
    results: Mapping[str, Any],
    shown: Sequence[Example],
    records: Sequence[dict[str, Any]],
    scored: Sequence[MetricResult],
    kinds: Mapping[str, str],
    groups: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write the page.

    Args:
        results: what `evaluate` returns.
        shown: the examples with the images that the model saw.
        records: the predictions, in the order of `shown`.
        scored: one result per metric; the first that knows right from wrong, else the first, orders the gallery.
        kinds: item id -> kind.
        groups: name of a breakdown -> item id -> group; by `kinds` alone if there are none.
    """
    main = next((result for result in scored if registry.get(result.name).per_item_is_right), scored[0])
    sections: list[Section] = []
    sections += published(results)
    for name, kind_of in (groups or {"kind of prompt": kinds}).items():
        if len(set(kind_of.values())) > 1:
            sections.append(
                breakdown(main.per_item, kind_of, metric=main.name, percent=percent_of(main.maximum), by=name)
            )
        if table := _by_group(results, name):
            sections.append(table)
    if found := details(results):
        sections.append(found)
    if results["failures"]:
        rows = [[failure["id"], failure["code"], failure["message"]] for failure in results["failures"][:100]]
        sections.append(
            Table("Images that could not be decoded", ["id", "code", "message"], rows, "They count as wrong.")
        )
    control = " · control: images shuffled among the items" if results["images_shuffled_with_seed"] is not None else ""
    task = results["task"]
    return write_report(
        path,
        title=task["title"] if task else "Evaluation",
        subtitle=f"{results['model']['name']} on {results['data']['source']}{control}",
        summary=[row for result in scored for row in _scores(result)],
        sections=sections,
        gallery=gallery(shown, records, main, kinds),
        footer=_footer(results),
    )


def percent_of(maximum: float | None) -> bool:
    """Whether a score is shown in percent: one that ends at 1."""
    return maximum == 1.0


def published(results: Mapping[str, Any]) -> list[Section]:
    """What others have published: beside ours, and for other splits."""
    return [one for one in (_published(results), _published_elsewhere(results)) if one]


def _published(results: Mapping[str, Any]) -> Scores | None:
    """Ours above what others have published for the same metric, split and, where they say one, group of items."""
    task = results["task"]
    entries = [entry for entry in (task or {}).get("published", ()) if entry["metric"] in results["metrics"]]
    if not entries:
        return None
    rows = []
    for metric, group in dict.fromkeys((entry["metric"], entry["group"]) for entry in entries):
        maximum, about = results["metrics"][metric]["maximum"], f", {group}" if group else ""
        scale: dict[str, Any] = {"maximum": maximum, "percent": percent_of(maximum)}
        if ours := _ours(results, metric, group):
            value, count = ours
            rows.append(Score(f"{metric} · this model{about}", value, num_items=count, **scale))
        for entry in entries:
            if (entry["metric"], entry["group"]) == (metric, group):
                note = "; ".join(part for part in (entry["source"], entry["note"]) if part)
                rows.append(Score(tables.model_of(entry) + about, entry["value"] / 100, note=note, **scale))
    return Scores(rows, title="Beside published figures", note=_not_comparable(results))


def _published_elsewhere(results: Mapping[str, Any]) -> Table | None:
    """What others have published for splits that were not evaluated here, such as those of a test server."""
    rows = []
    for entry in (results["task"] or {}).get("published_for_other_splits", ()):
        split = f"{entry['split']}, {entry['group']}" if entry["group"] else entry["split"]
        rows.append([tables.model_of(entry), entry["metric"], split, f"{entry['value']:g}", entry["source"]])
    if not rows:
        return None
    note = "These items are not ours, so the figures may not be set beside ours; as printed, 100 stands for 1."
    return Table("Published for other splits", ["model", "metric", "split", "value", "source"], rows, note)


def _ours(results: Mapping[str, Any], metric: str, group: str) -> tuple[float, int] | None:
    """Our value for a group of a breakdown ("" for all items) and its number of items; None without such a group."""
    if not group:
        result = results["metrics"][metric]
        return result["value"], result["num_items"]
    cells = (found[metric].get(group) for found in results["breakdown"].values())
    cell = next((cell for cell in cells if cell), None)
    return None if cell is None else (cell.get("value", cell["mean"]), cell["num_items"])


def _not_comparable(results: Mapping[str, Any]) -> str:
    """Why our figure may not be set beside them, where we know."""
    task, reasons = results["task"], []
    if task["expected_items"] not in (None, results["num_items"]):
        reasons.append(f"only {results['num_items']} of {task['expected_items']} items were evaluated")
    if not task.get("decoding_is_the_tasks", True):
        reasons.append("the decoding settings are not those of the task")
    if not task.get("protocol_is_the_tasks", True):
        reasons.append("the protocol is not that of the published figures")
    if results["images_shuffled_with_seed"] is not None:
        reasons.append("the images were shuffled")
    return f"Ours is not comparable: {'; '.join(reasons)}." if reasons else ""


def _by_group(results: Mapping[str, Any], name: str, limit: int = 40) -> Table | None:
    """All metrics of each group of a breakdown, the largest groups first; None for a single metric."""
    found = results["breakdown"].get(name, {})
    if len(found) < 2 or len(next(iter(found.values()))) < 2:
        return None
    sizes = {group: cell["num_items"] for group, cell in next(iter(found.values())).items()}
    ordered = sorted(sizes, key=lambda group: (-sizes[group], group))[:limit]
    rows = [
        [group, *(cells[group].get("value", cells[group]["mean"]) for cells in found.values()), sizes[group]]
        for group in ordered
    ]
    return Table(f"All metrics by {name.replace('_', ' ')}", [name, *found, "items"], rows)


def details(results: Mapping[str, Any]) -> Table | None:
    """Further numbers of the metrics; None where they have none."""
    over = (results["task"] or {}).get("average_over")  # the values of its groups have a table of their own
    rows = [
        [metric, name, value]
        for metric, result in results["metrics"].items()
        for name, value in result["details"].items()
        if not (over and name.startswith(f"{over} "))
    ]
    return Table("Details", ["metric", "figure", "value"], rows) if rows else None


def gallery(
    shown: Sequence[Example],
    records: Sequence[dict[str, Any]],
    result: MetricResult,
    kinds: Mapping[str, str],
    size: int = GALLERY_SIZE,
) -> list[GalleryItem]:
    """Cards for a fair look: best, worst and random items in equal parts; where an item is right or wrong, wrong and
    right ones in equal parts where there are enough.

    The choice is random with a fixed seed, not hand-picked, and the same for the same results.
    """
    metric = registry.get(result.name)
    order = sorted(result.per_item)
    random.Random(0).shuffle(order)
    chosen = [(key, "") for key in halves(result, size)] if metric.per_item_is_right else _thirds(order, result, size)
    place = {example.id: index for index, example in enumerate(shown)}
    cards = []
    for key, pick in chosen:
        example, record = shown[place[key]], records[place[key]]
        score = result.per_item[key]
        notes = [record["error"]["message"]] if "error" in record else []
        if example.more_images:
            notes.append(f"the first of {1 + len(example.more_images)} images")
        cards.append(
            GalleryItem(
                image=example.image,
                prompt=example.prefix,
                prediction=record["prediction"],
                references=_distinct(items.gold_texts(example, metric.reads)),
                correct=score == 1.0 if metric.per_item_is_right else None,
                score=score,
                id=key,
                kind=kinds[key],
                note="\n".join(notes),
                pick=pick,
            )
        )
    return cards


def halves(result: MetricResult, size: int) -> list[str]:
    """Ids of wrong and right items in equal parts where there are enough, in a random order with a fixed seed."""
    order = sorted(result.per_item)
    random.Random(0).shuffle(order)
    right = [key for key in order if result.per_item[key] == 1.0]
    wrong = [key for key in order if result.per_item[key] != 1.0]
    num_wrong = min(len(wrong), max(size // 2, size - len(right)))
    picked = set(wrong[:num_wrong] + right[: size - num_wrong])
    return [key for key in order if key in picked]


def _thirds(order: list[str], result: MetricResult, size: int) -> list[tuple[str, str]]:
    """Ids with the reason why each is shown, by falling score; no reason where all items are shown."""
    ranked = sorted(order, key=lambda key: -result.per_item[key])
    if len(ranked) <= size:
        return [(key, "") for key in ranked]
    third = size // 3
    picks = {**dict.fromkeys(ranked[:third], "best"), **dict.fromkeys(ranked[-third:], "worst")}
    others = [key for key in order if key not in picks]
    picks.update(dict.fromkeys(others[: size - 2 * third], "random"))
    return [(key, picks[key]) for pick in ("best", "worst", "random") for key in ranked if picks.get(key) == pick]


def _distinct(texts: Sequence[str], limit: int = 5) -> list[str]:
    return list(dict.fromkeys(texts))[:limit]


def _scores(result: MetricResult) -> list[Score]:
    """The metric's row, and below it what the best constant answer would score."""
    scale: dict[str, Any] = {"maximum": result.maximum, "percent": percent_of(result.maximum)}
    note = ". ".join((result.rule, *result.notes))
    rows = [Score(result.name, result.value, result.interval, result.num_items, note, **scale)]
    if result.best_constant is not None:
        said = shorten(result.best_constant.answer, 60, placeholder=" ...")
        rows.append(
            Score(
                f"{result.name} · best constant answer",
                result.best_constant.value,
                None,
                result.num_items,
                f'what "{said}" for every item would score',
                **scale,
            )
        )
    return rows


def _footer(results: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    decoding = ", ".join(f"{name} {value}" for name, value in results["decoding"].items())
    model = ", ".join(f"{name} {value}" for name, value in results["model"].items() if name != "name")
    lines = [f"Prompt: {results['prompts']['format']} · {decoding}", f"Model: {model}", f"Versions: {versions}"]
    note = (results["task"] or {}).get("note")
    return [f"Task: {note}", *lines] if note else lines
