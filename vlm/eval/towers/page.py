"""The report page of one task of a model of two towers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.eval.metrics.result import MetricResult
from vlm.eval.results_page import GALLERY_SIZE, details, halves, percent_of, published
from vlm.eval.tables import model_of
from vlm.eval.towers.scored import Scored
from vlm.report.page import Section
from vlm.report.scores import Score, Table, breakdown
from vlm.report.sections import GalleryItem, write_report

MOST_GROUPS = 60


def write(path: Path, results: Mapping[str, Any], scored: Scored) -> Path:
    """Write the page.

    Args:
        results: what `results.json` holds.
    """
    main = scored.metrics[0]
    sections: list[Section] = [*published(results), *_others(results)]
    for name, groups in scored.groups.items():
        for one in _leading(scored) if name != "direction" else []:
            kept = {key: groups[key] for key in one.per_item}
            if len(set(kept.values())) > 1:
                sections.append(
                    breakdown(one.per_item, kept, metric=one.name, percent=True, by=name, limit=MOST_GROUPS)
                )
    if found := details(results):
        sections.append(found)
    if results["failures"]:
        rows = [[one["id"], one["code"], one["message"]] for one in results["failures"][:100]]
        sections.append(
            Table("Images that could not be decoded", ["id", "code", "message"], rows, "They count as wrong.")
        )
    control = "" if results["images_shuffled_with_seed"] is None else " · control: images shuffled among the items"
    return write_report(
        path,
        title=results["task"]["title"],
        subtitle=f"{results['model']['name']} on {results['data']['source']}{control}",
        summary=[_score(one) for one in scored.metrics],
        sections=sections,
        gallery=_gallery(scored, main),
        footer=_footer(results),
    )


def _leading(scored: Scored) -> list[MetricResult]:
    """The first metric, and the first of the other direction."""
    directions = {one.name.partition("_r@")[0]: one for one in reversed(scored.metrics) if one.maximum == 1.0}
    return [one for one in scored.metrics if one in directions.values() and "top" not in one.name]


def _score(one: MetricResult) -> Score:
    note = ". ".join((one.rule, *one.notes))
    percent = percent_of(one.maximum)
    return Score(one.name, one.value, one.interval, one.num_items, note, maximum=one.maximum, percent=percent)


def _others(results: Mapping[str, Any]) -> list[Table]:
    """What is published for checkpoints of other names."""
    entries = results["task"]["published_for_other_models"]
    if not entries:
        return []
    rows = [[model_of(one), one["metric"], one["split"], f"{one['value']:g}", one["source"]] for one in entries]
    note = "Other checkpoints than this one, as printed: 100 stands for 1. A figure of this one is found by its name."
    return [Table("Published for other checkpoints", ["model", "metric", "split", "value", "source"], rows, note)]


def _gallery(scored: Scored, main: MetricResult) -> list[GalleryItem]:
    """Right and wrong ones in equal parts where there are enough, with a fixed seed; of a retrieval both ways."""
    lines = {line["id"]: line for line in scored.lines}
    leading = _leading(scored)
    chosen = [key for one in leading for key in halves(one, GALLERY_SIZE // len(leading))]
    found = []
    for key in chosen:
        line = lines[key]
        rank = line.get("info", {}).get("rank")
        right = rank == 1 if rank is not None else line["scores"][main.name] == 1.0
        found.append(
            GalleryItem(
                image=scored.pictures[key],
                prompt=line["prefix"],
                prediction=line["prediction"],
                references=line["references"][:5],
                correct=right,
                id=key,
                kind=line["kind"],
                note=f"rank {rank}" if rank is not None else "",
            )
        )
    return found


def _footer(results: Mapping[str, Any]) -> list[str]:
    def told(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())

    model = {name: value for name, value in results["model"].items() if name != "name"}
    lines = [
        f"Protocol: {told(results['protocol'])}",
        f"Model: {told(model)}",
        f"Versions: {told(results['versions'])}",
    ]
    return [f"Task: {results['task']['note']}", *lines] if results["task"]["note"] else lines
