"""The report page of one evaluation, made from what the harness has at its end."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data import Example

from . import items, metrics
from .metrics import MetricResult
from .report import GalleryItem, Score, Section, Table, breakdown, write_report

GALLERY_SIZE = 60


def write(
    path: Path,
    results: dict[str, Any],
    shown: Sequence[Example],
    records: Sequence[dict[str, Any]],
    scored: Sequence[MetricResult],
    kinds: Mapping[str, str],
) -> Path:
    """Write the page.

    Args:
        results: what `evaluate` returns.
        shown: the examples with the images that the model saw.
        records: the predictions, in the order of `shown`.
        scored: one result per metric; the first that knows right from wrong, else the first, orders the gallery.
        kinds: item id -> kind.
    """
    main = next((result for result in scored if metrics.get(result.name).per_item_is_right), scored[0])
    sections: list[Section] = []
    if len(set(kinds.values())) > 1:
        sections.append(breakdown(main.per_item, kinds, metric=main.name, percent=main.maximum == 1.0))
    if results["failures"]:
        rows = [[failure["id"], failure["code"], failure["message"]] for failure in results["failures"][:100]]
        sections.append(
            Table("Images that could not be decoded", ["id", "code", "message"], rows, "They count as wrong.")
        )
    control = " · control: images shuffled among the items" if results["images_shuffled_with_seed"] is not None else ""
    return write_report(
        path,
        title="Evaluation",
        subtitle=f"{results['model']['name']} on {results['data']['source']}{control}",
        summary=[_score(result) for result in scored],
        sections=sections,
        gallery=gallery(shown, records, main, kinds),
        footer=_footer(results),
    )


def gallery(
    shown: Sequence[Example],
    records: Sequence[dict[str, Any]],
    result: MetricResult,
    kinds: Mapping[str, str],
    size: int = GALLERY_SIZE,
) -> list[GalleryItem]:
    """Cards for a fair look: wrong and right items in equal parts where there are enough, else best, worst and random.

    The choice is random with a fixed seed, not hand-picked, and the same for the same results.
    """
    metric = metrics.get(result.name)
    order = sorted(result.per_item)
    random.Random(0).shuffle(order)
    chosen = _halves(order, result, size) if metric.per_item_is_right else _thirds(order, result, size)
    place = {example.id: index for index, example in enumerate(shown)}
    cards = []
    for key in chosen:
        example, record = shown[place[key]], records[place[key]]
        score = result.per_item[key]
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
                note=record["error"]["message"] if "error" in record else "",
            )
        )
    return cards


def _halves(order: list[str], result: MetricResult, size: int) -> list[str]:
    right = [key for key in order if result.per_item[key] == 1.0]
    wrong = [key for key in order if result.per_item[key] != 1.0]
    num_wrong = min(len(wrong), max(size // 2, size - len(right)))
    picked = set(wrong[:num_wrong] + right[: size - num_wrong])
    return [key for key in order if key in picked]


def _thirds(order: list[str], result: MetricResult, size: int) -> list[str]:
    ranked = sorted(order, key=lambda key: -result.per_item[key])
    if len(ranked) <= size:
        return ranked
    third = size // 3
    best, worst = ranked[:third], ranked[-third:]
    taken = {*best, *worst}
    middle = {*[key for key in order if key not in taken][: size - 2 * third]}
    return best + [key for key in ranked if key in middle] + worst


def _distinct(texts: Sequence[str], limit: int = 5) -> list[str]:
    return list(dict.fromkeys(texts))[:limit]


def _score(result: MetricResult) -> Score:
    return Score(
        result.name,
        result.value,
        result.interval,
        result.num_items,
        result.rule,
        maximum=result.maximum,
        percent=result.maximum == 1.0,
    )


def _footer(results: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    decoding = ", ".join(f"{name} {value}" for name, value in results["decoding"].items())
    model = ", ".join(f"{name} {value}" for name, value in results["model"].items() if name != "name")
    return [f"Prompt: {results['prompts']['format']} · {decoding}", f"Model: {model}", f"Versions: {versions}"]
