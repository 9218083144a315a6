"""What every metric returns: a number that carries its rule, its denominator and its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

NUM_RESAMPLES = 1000
"""Bootstrap resamples behind every interval. With 1000 the ends of a 95 % interval move by about 2 % of its width from
seed to seed, below what anyone should read into them."""

_DRAWS_AT_ONCE = 1 << 22  # bounds the memory of the index matrix to 32 MB, whatever the number of items


@dataclass(frozen=True)
class Constant:
    """One answer given to every item, and what the metric makes of it."""

    answer: str
    value: float


@dataclass(frozen=True)
class MetricResult:
    """One metric over one set of items."""

    name: str
    value: float
    per_item: dict[str, float]
    """Item id -> score on the scale of `value`; it holds every item that was scored, in the order of the references."""
    rule: str
    """A sentence that says how the number is computed, so that it can be set beside a paper's."""
    version: str
    """Changes whenever the rule can give another number for the same input."""
    interval: tuple[float, float] | None
    """Ends of the 95 % bootstrap interval over items; None for fewer than two items."""
    higher_is_better: bool = True
    maximum: float | None = 1.0
    """The largest possible value, None if there is none."""
    normalizer: str = "described in the rule"
    """What is done to both texts before they are compared; figures with different ones must not be set side by side."""
    details: dict[str, float] = field(default_factory=dict)
    """Further numbers that belong to the value, by name: precision, recall, values of parts, unparsed answers."""

    notes: tuple[str, ...] = ()
    """Sentences that a reader of the value needs: why it is 0 whatever was said, how many answers could not be read."""
    best_constant: Constant | None = None
    """What the best of the answers that are the same for every item would score; None where it was not computed."""

    @property
    def num_items(self) -> int:
        return len(self.per_item)

    def summary(self) -> dict[str, Any]:
        """Everything but the per-item scores, ready for JSON."""
        return {
            "value": self.value,
            "interval_95": None if self.interval is None else list(self.interval),
            "num_items": self.num_items,
            "rule": self.rule,
            "normalizer": self.normalizer,
            "version": self.version,
            "maximum": self.maximum,
            "higher_is_better": self.higher_is_better,
            "details": self.details,
            "notes": list(self.notes),
            "best_constant": None if self.best_constant is None else asdict(self.best_constant),
        }


_intervals: ContextVar[bool] = ContextVar("intervals", default=True)


@contextmanager
def no_intervals() -> Iterator[None]:
    """Inside, no result has an interval: for values that nobody shows, as resampling takes longer than scoring."""
    token = _intervals.set(False)
    try:
        yield
    finally:
        _intervals.reset(token)


def bootstrap(
    statistics: np.ndarray | Sequence[float],
    reduce: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval, resampling items with replacement.

    Args:
        statistics: float[N, K] sufficient statistics of each of N items (K = 1 for a plain mean; float[N] is accepted).
        reduce: float[R, K] means of R resamples -> float[R] values of the metric; the identity for K = 1 if None.
        seed: the same seed gives the same interval.

    Returns:
        (low, high), or None for fewer than two items, where resampling says nothing, and inside `no_intervals`.
    """
    if not _intervals.get():
        return None
    stats = np.asarray(statistics, dtype=np.float64)
    if stats.ndim == 1:
        stats = stats[:, None]
    num_items = len(stats)
    if num_items < 2:
        return None
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // num_items)
    values: list[np.ndarray] = []
    for start in range(0, num_resamples, at_once):
        rows = min(at_once, num_resamples - start)
        draws = rng.integers(0, num_items, size=(rows, num_items))
        means = np.stack([stats[:, k][draws].mean(axis=1) for k in range(stats.shape[1])], axis=1)
        values.append(means[:, 0] if reduce is None else reduce(means))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def mean_result(
    name: str,
    scores: dict[str, float],
    rule: str,
    *,
    version: str = "1",
    normalizer: str = "none",
    details: dict[str, float] | None = None,
    notes: Sequence[str] = (),
) -> MetricResult:
    """The result of a metric that is the plain mean of its per-item scores."""
    value, interval = mean_of(scores)
    return MetricResult(
        name, value, scores, rule, version, interval, normalizer=normalizer, details=details or {}, notes=tuple(notes)
    )


def groups(keys: Iterable[str], info: Mapping[str, Mapping[str, Any]], fact: str) -> dict[str, list[str]]:
    """The items with each value of a fact, values sorted: {"augmented": ["2"], "human": ["1", "3"]}; {} without it."""
    found: dict[str, list[str]] = {}
    for key in keys:
        if info[key].get(fact) is not None:
            found.setdefault(str(info[key][fact]), []).append(key)
    return dict(sorted(found.items()))


def means_by(scores: dict[str, float], info: Mapping[str, Mapping[str, Any]], fact: str) -> dict[str, float]:
    """Mean score of the items with each value of a fact: {"augmented": 0.9, "human": 0.6}; {} where nobody has it."""
    parts = groups(scores, info, fact)
    return {value: math.fsum(scores[key] for key in keys) / len(keys) for value, keys in parts.items()}


def mean_of(scores: dict[str, float]) -> tuple[float, tuple[float, float] | None]:
    """The mean over items and its interval; the interval does not depend on the order of the items."""
    ordered = np.array([scores[key] for key in sorted(scores)])
    return math.fsum(scores.values()) / len(scores), bootstrap(ordered)
