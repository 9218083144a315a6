"""What a task makes of vectors: metrics, and a line per query. Nothing here sees a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlm.data.examples import Labelled
from vlm.eval.metrics.ranking import RULE, Ranked, by_chance, median_rank, ranks, recall_at
from vlm.eval.metrics.result import Constant, MetricResult, mean_result, means_by
from vlm.eval.results import average
from vlm.eval.towers.contract import Picture
from vlm.eval.towers.data import Pool

DEPTHS = (1, 5, 10)
TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text_to_image", "image_to_text"


@dataclass(frozen=True)
class Scored:
    """The outcome of a task.

    Attributes:
        lines: one per query, as `items.jsonl` holds them.
        groups: name of a breakdown -> id -> group.
        average_over: one of `groups`, where the metrics are means over its groups.
        pictures: id -> what its card on the page shows.
    """

    metrics: Sequence[MetricResult]
    lines: Sequence[dict[str, Any]]
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    average_over: str = ""
    pictures: Mapping[str, Picture | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Vectors of N things.

    Attributes:
        vectors: float32[N, D]. there: bool[N], which of them are vectors.
    """

    vectors: np.ndarray
    there: np.ndarray

    def take(self, index: np.ndarray) -> Rows:
        """Some of them, in that order."""
        return Rows(self.vectors[index], self.there[index])


# --- classes ----------------------------------------------------------------------------------------------------------


def zero_shot(
    test: Sequence[Labelled], images: Rows, classes: Rows, labels: Sequence[str], notes: Sequence[str] = ()
) -> Scored:
    """Each picture is of the class whose text is most similar.

    Args:
        images: of `test`. classes: of `labels`.
    """
    number = {label: place for place, label in enumerate(labels)}
    own = np.array([number[item.label] for item in test])
    found = ranks(images.vectors, classes.vectors, (np.arange(len(test)), own), usable=(images.there, classes.there))
    said = ["" if place < 0 else labels[place] for place in found.first]
    by_id = {item.id: int(rank) for item, rank in zip(test, found.ranks, strict=True)}
    metrics = [
        _accuracy(test, {key: float(rank == 1) for key, rank in by_id.items()}, f"top-1 accuracy; {RULE}", notes)
    ]
    if len(labels) > 5:
        metrics.append(recall_at("accuracy_top_5", by_id, 5))
    return _of_classes(test, said, metrics)


def by_probe(
    name: str, test: Sequence[Labelled], there: np.ndarray, answers: Sequence[str], rule: str, notes: Sequence[str]
) -> Scored:
    """The answers of a classifier that was fitted to vectors; a picture that could not be read is wrong."""
    said = [answer if good else "" for answer, good in zip(answers, there, strict=True)]
    right = {item.id: float(answer == item.label) for item, answer in zip(test, said, strict=True)}
    return _of_classes(test, said, [_accuracy(test, right, rule, notes)])


def _accuracy(test: Sequence[Labelled], right: dict[str, float], rule: str, notes: Sequence[str]) -> MetricResult:
    info = {item.id: {"label": item.label} for item in test}
    by_label = means_by(right, info, "label")
    details = {"mean_over_classes": sum(by_label.values()) / len(by_label)}
    (most, count), *_ = Counter(item.label for item in test).most_common(1)
    result = mean_result("accuracy", right, rule, details=details, notes=notes)
    return replace(result, best_constant=Constant(most, count / len(test)))


def _of_classes(test: Sequence[Labelled], said: Sequence[str], metrics: Sequence[MetricResult]) -> Scored:
    lines = [
        {
            "id": item.id,
            "prefix": "",
            "prediction": answer,
            "references": [item.label],
            **_shown(item.image),
            "kind": item.label,
            "scores": {one.name: one.per_item[item.id] for one in metrics},
        }
        for item, answer in zip(test, said, strict=True)
    ]
    labels = {item.id: item.label for item in test}
    return Scored(metrics, lines, {"label": labels}, pictures={item.id: item.image for item in test})


def _shown(image: Picture) -> dict[str, Any]:
    return {} if hasattr(image, "size") else {"images": [str(image)]}


# --- retrieval --------------------------------------------------------------------------------------------------------


def retrieval(pools: Sequence[Pool], images: Sequence[Rows], texts: Sequence[Rows]) -> Scored:
    """Text to image and image to text, in each pool alone; of several pools the mean without weights.

    Args:
        images, texts: of each pool.
    """
    depth = min(min(len(pool.ids), len(pool.texts)) for pool in pools)
    depths = [k for k in DEPTHS if k < depth] or [1]
    parts: dict[str, dict[str, MetricResult]] = {}
    lines: list[dict[str, Any]] = []
    pictures: dict[str, Picture | None] = {}
    languages: dict[str, str] = {}
    for pool, seen, read in zip(pools, images, texts, strict=True):
        for direction, found, own, ids in _both_ways(pool, seen, read):
            by_id = {key: int(rank) for key, rank in zip(ids, found.ranks, strict=True)}
            made = _metrics(direction, by_id, depths, len(pool.ids if direction == TEXT_TO_IMAGE else pool.texts), own)
            for one in made:
                parts.setdefault(one.name, {})[pool.name] = one
            add = _text_lines if direction == TEXT_TO_IMAGE else _image_lines
            lines += add(pool, ids, found, made)
            languages.update(dict.fromkeys(ids, pool.name))
            pictures.update(_cards(pool, direction, ids, found))
    over = "language" if len(pools) > 1 else ""
    metrics = [average(of, list(_joined(of)), over) if over else next(iter(of.values())) for of in parts.values()]
    kinds = {line["id"]: line["kind"] for line in lines}
    groups = {"direction": kinds, **({"language": languages} if any(languages.values()) else {})}
    return Scored(metrics, lines, groups, over, pictures)


def _both_ways(pool: Pool, seen: Rows, read: Rows) -> list[tuple[str, Ranked, np.ndarray, list[str]]]:
    """(direction, what was found, how many of its own each query has, ids of the queries), text to image first."""
    place = np.arange(len(pool.texts))
    t2i = ranks(read.vectors, seen.vectors, (place, pool.owner), usable=(read.there, seen.there))
    i2t = ranks(seen.vectors, read.vectors, (pool.owner, place), usable=(seen.there, read.there))
    counts = np.bincount(pool.owner, minlength=len(pool.ids))
    which = [int(number) for number in _numbers(pool.owner, counts)]
    tail = f"@{pool.name}" if pool.name else ""
    texts = [f"text:{pool.ids[owner]}#{n}{tail}" for owner, n in zip(pool.owner, which, strict=True)]
    return [
        (TEXT_TO_IMAGE, t2i, np.ones(len(pool.texts), int), texts),
        (IMAGE_TO_TEXT, i2t, counts, [f"image:{key}{tail}" for key in pool.ids]),
    ]


def _numbers(owner: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The place of each caption among those of its picture: [0, 0, 1, 2, 2] -> [0, 1, 0, 0, 1]."""
    starts = np.concatenate([[0], counts.cumsum()])[:-1]
    return np.arange(len(owner)) - starts[owner]


def _metrics(
    direction: str, by_id: Mapping[str, int], depths: Sequence[int], candidates: int, own: np.ndarray
) -> list[MetricResult]:
    about = "; any caption of a picture counts" if direction == IMAGE_TO_TEXT else "; each caption is a query"
    found = []
    for k in depths:
        one = recall_at(f"{direction}_r@{k}", by_id, k, about)
        found.append(replace(one, details={"by_chance": by_chance(candidates, own, k), "num_candidates": candidates}))
    return [*found, median_rank(f"{direction}_median_rank", by_id, about)]


def _joined(parts: Mapping[str, MetricResult]) -> list[str]:
    return [key for one in parts.values() for key in one.per_item]


def _text_lines(pool: Pool, ids: Sequence[str], found: Ranked, made: Sequence[MetricResult]) -> list[dict[str, Any]]:
    return [
        {
            "id": key,
            "prefix": pool.texts[place],
            "prediction": "" if found.first[place] < 0 else pool.ids[found.first[place]],
            "references": [pool.ids[pool.owner[place]]],
            **_shown(pool.images[pool.owner[place]]),
            **_common(pool, TEXT_TO_IMAGE, key, found.ranks[place], made),
        }
        for place, key in enumerate(ids)
    ]


def _image_lines(pool: Pool, ids: Sequence[str], found: Ranked, made: Sequence[MetricResult]) -> list[dict[str, Any]]:
    own: list[list[str]] = [[] for _ in pool.ids]
    for text, owner in zip(pool.texts, pool.owner, strict=True):
        own[owner].append(text)
    return [
        {
            "id": key,
            "prefix": "",
            "prediction": "" if found.first[place] < 0 else pool.texts[found.first[place]],
            "references": own[place],
            **_shown(pool.images[place]),
            **_common(pool, IMAGE_TO_TEXT, key, found.ranks[place], made),
        }
        for place, key in enumerate(ids)
    ]


def _common(pool: Pool, direction: str, key: str, rank: int, made: Sequence[MetricResult]) -> dict[str, Any]:
    return {
        "info": {"language": pool.name, "rank": int(rank)} if pool.name else {"rank": int(rank)},
        "kind": direction,
        "scores": {one.name: one.per_item[key] for one in made},
    }


def _cards(pool: Pool, direction: str, ids: Sequence[str], found: Ranked) -> dict[str, Picture | None]:
    """What a card shows: the picture that was asked about, or the one that was found for a text."""
    if direction == IMAGE_TO_TEXT:
        return dict(zip(ids, pool.images, strict=True))
    return {key: None if place < 0 else pool.images[place] for key, place in zip(ids, found.first, strict=True)}
