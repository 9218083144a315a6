"""Ranks of what belongs together, and what is counted from them: recall at k, median rank, top-1 accuracy.

    ranked = ranks(texts, images, (queries, own))       # text -> image: each caption has one image
    recall_at("text_to_image_r@1", {"t1": 1, "t2": 4}, 1).value

Vectors or ranks come in, numbers go out; nothing here sees a model.

**The rule.** The rank of a query is 1 + the number of wrong candidates that are at least as similar to it as the best
of its own ones: ties count against it. So a model that gives all images the same vector finds nothing, where a sort
would find whatever the order of the data makes of it. With several captions per image an image is found at k if any of
its captions is among the first k (its other captions never stand in the way of the best), and each caption is a query
of its own. Without ties this is what big_vision's `image_text_retrieval.py` counts, and Karpathy's protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import NamedTuple

import numpy as np

from vlm.errors import DataError
from vlm.eval.metrics.result import MetricResult, mean_result

TIE = 1e-9
"""Similarities of this distance are equal: sums of the same products in another order differ by about 1e-16, vectors
that differ at all in float32 by far more."""
AT_ONCE = 2**24
"""Similarities in memory at a time: 128 MiB in float64."""
RULE = (
    "the rank of a query is 1 + the number of wrong candidates that are at least as similar to it as the best of its"
    " own ones (ties count against it)"
)


class Ranked(NamedTuple):
    """What was found for each of Q queries.

    Attributes:
        ranks: int64[Q], from 1.
        first: int64[Q], the most similar candidate, the first of equals; -1 for a query that is no vector.
    """

    ranks: np.ndarray
    first: np.ndarray


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    own: tuple[np.ndarray, np.ndarray],
    *,
    usable: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    at_once: int = AT_ONCE,
) -> Ranked:
    """The rank of the best of its own candidates for each query, by inner product, a block of queries at a time.

    Args:
        queries: float[Q, D]. candidates: float[N, D]. Normalised for cosine similarity.
        own: (int64[K], int64[K]), the pairs (query, candidate) that belong together; at least one for each query.
        usable: (bool[Q], bool[N]), which are vectors at all; None: all. A query that is none, or whose own candidates
            are all none, ranks behind all wrong candidates; no other query meets a candidate that is none.
        at_once: similarities in memory at a time.

    Raises:
        DataError: a query without a candidate of its own, or a number that is not finite.
    """
    pairs = np.stack([np.asarray(part, dtype=np.int64) for part in own])
    pairs = pairs[:, np.argsort(pairs[0], kind="stable")]
    counts = np.bincount(pairs[0], minlength=len(queries))
    if (counts == 0).any():
        raise DataError(f"{int((counts == 0).sum())} of {len(queries)} queries have no candidate of their own")
    asked, there = _usable(queries, usable[0]), _usable(candidates, usable[1])
    held = np.where(there[:, None], candidates, 0).astype(np.float64)
    ends = np.concatenate([[0], counts.cumsum()])
    rows = max(1, at_once // max(1, len(held)))
    found, first = np.empty(len(queries), np.int64), np.full(len(queries), -1)
    for start in range(0, len(queries), rows):
        stop = min(start + rows, len(queries))
        good = asked[start:stop, None]
        alike = np.where(good, queries[start:stop], 0).astype(np.float64) @ held.T
        alike = np.where(good & there, alike, -np.inf)
        first[start:stop] = np.where(np.isfinite(alike.max(1)), alike.argmax(1), -1)
        place, column = pairs[0, ends[start] : ends[stop]] - start, pairs[1, ends[start] : ends[stop]]
        best = np.maximum.reduceat(alike[place, column], ends[start:stop] - ends[start])
        wrong = alike >= (best - TIE)[:, None]  # all of them where the best is no vector: -inf
        wrong[place, column] = False
        found[start:stop] = 1 + wrong.sum(1)
    return Ranked(found, first)


def _usable(vectors: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Which rows are vectors. Raises DataError for one with a number that is not finite."""
    good = np.ones(len(vectors), bool) if mask is None else np.asarray(mask, bool)
    odd = np.flatnonzero(good & ~np.isfinite(vectors).all(1))
    if len(odd):
        raise DataError(f"{len(odd)} of {len(vectors)} vectors hold NaN or infinity, first number {odd[0]}")
    return good


def recall_at(name: str, found: Mapping[str, int], k: int, about: str = "") -> MetricResult:
    """The share of queries whose rank is at most k.

    Args:
        found: id of each query -> its rank.
        about: what else decides the number, for the rule.
    """
    scores = {key: float(rank <= k) for key, rank in found.items()}
    return mean_result(name, scores, f"share of the queries with a rank of at most {k}; {RULE}{about}")


def median_rank(name: str, found: Mapping[str, int], about: str = "") -> MetricResult:
    """The median of the ranks; lower is better, 1 is best. No interval is given."""
    scores = {key: float(rank) for key, rank in found.items()}
    rule = f"median over the queries of their rank; {RULE}{about}"
    value = float(np.median(list(scores.values())))
    return MetricResult(name, value, scores, rule, "1", None, higher_is_better=False, maximum=None, normalizer="none")


def by_chance(num_candidates: int, own: np.ndarray, k: int) -> float:
    """Recall at k of a random order, the mean over queries.

    Args:
        own: int[Q], how many candidates of its own each query has.
    """
    total = comb(num_candidates, k)
    values, times = np.unique(own, return_counts=True)
    hits = [1 - comb(num_candidates - int(m), k) / total if k <= num_candidates else 1.0 for m in values]
    return float(np.average(hits, weights=times))
