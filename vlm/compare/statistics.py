"""Intervals over seeds, paired tests over items, and Holm's correction; numpy only.

Sources: Student's t distribution, Abramowitz and Stegun 26.7.3 and 26.7.4 (finite series for whole degrees of freedom);
the percentile bootstrap of pairs and the sign-flip test, Efron and Tibshirani, An Introduction to the Bootstrap (1993);
Holm, A simple sequentially rejective multiple test procedure (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
"""The smallest p that the sign-flip test can give is 1 / (this + 1)."""
LEVEL = 0.05
_DRAWS_AT_ONCE = 1 << 22  # bounds the memory of the index matrix to 32 MB


# --- over seeds


@dataclass(frozen=True)
class OverSeeds:
    """A figure over the seeds of an arm."""

    mean: float
    half_width: float | None
    """Half of the 95 % t-interval of the mean; None for one seed, which says nothing about others."""
    num_seeds: int


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean and 95 % t-interval: mean +- t(0.975, n - 1) s / sqrt(n), s the sample's standard deviation."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return OverSeeds(mean, None, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return OverSeeds(mean, t_quantile(0.975, count - 1) * deviation / math.sqrt(count), count)


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t for a probability from 0.5 up to (not including) 1, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    if degrees % 2:
        inside, term = 0.0, math.cos(theta)
        for k in range(1, (degrees - 1) // 2 + 1):
            inside += term
            term *= square * 2 * k / (2 * k + 1)
        within = 2 / math.pi * (theta + sine * inside)
    else:
        inside, term = 0.0, 1.0
        for k in range(1, degrees // 2 + 1):
            inside += term
            term *= square * (2 * k - 1) / (2 * k)
        within = sine * inside
    return 0.5 + within / 2


# --- over items


@dataclass(frozen=True)
class Paired:
    """One arm against another on the same items."""

    difference: float
    """Mean over items of (first - second), each averaged over seeds."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval over items; None for fewer than two images."""
    p: float
    """Two-sided, of the sign-flip test."""
    seeds_agree: int
    """In how many seeds the difference has the sign of the mean one."""
    num_seeds: int
    num_items: int
    num_groups: int
    """Items that share an image are drawn and flipped together: so many independent groups there are."""


def paired(
    first: Sequence[Mapping[str, float]],
    second: Sequence[Mapping[str, float]],
    groups: Mapping[str, str],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Paired:
    """Compare the per-item scores of two arms.

    Args:
        first, second: per seed, in the same order of seeds, item id -> score; the same ids everywhere.
        groups: item id -> group, such as its image.
    """
    ids = sorted(first[0])
    assert all(sorted(scores) == ids for scores in (*first, *second)) and len(first) == len(second)
    by_seed = np.array([[a[key] - b[key] for key in ids] for a, b in zip(first, second, strict=True)])
    differences = by_seed.mean(axis=0)
    names = sorted({groups[key] for key in ids})
    place = {name: index for index, name in enumerate(names)}
    member = np.array([place[groups[key]] for key in ids])
    sums = np.bincount(member, weights=differences, minlength=len(names))
    sizes = np.bincount(member, minlength=len(names)).astype(float)
    mean = float(differences.mean())
    rng = np.random.default_rng(seed)
    signs = np.sign(by_seed.mean(axis=1))
    return Paired(
        difference=mean,
        interval=_bootstrap(sums, sizes, rng, num_resamples),
        p=_sign_flip(sums, rng, num_resamples),
        seeds_agree=int((signs == np.sign(mean)).sum()),
        num_seeds=len(first),
        num_items=len(ids),
        num_groups=len(names),
    )


def _bootstrap(
    sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, resamples: int
) -> tuple[float, float] | None:
    """Percentile interval of sum / size when whole groups are drawn with replacement."""
    count = len(sums)
    if count < 2:
        return None
    values = []
    for rows in _portions(resamples, count):
        drawn = rng.integers(0, count, size=(rows, count))
        values.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def _sign_flip(sums: np.ndarray, rng: np.random.Generator, resamples: int) -> float:
    """How often a total as far from 0 comes about when each group's difference could as well have the other sign.

    The observed one counts as a draw, so that p is never 0.
    """
    observed = abs(sums.sum()) * (1 - 1e-12)  # rounding must not decide between equal totals
    hits = 0
    for rows in _portions(resamples, len(sums)):
        signs = rng.integers(0, 2, size=(rows, len(sums)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ sums) >= observed).sum())
    return (hits + 1) / (resamples + 1)


def _portions(total: int, width: int) -> list[int]:
    size = max(1, _DRAWS_AT_ONCE // max(1, width))
    return [min(size, total - start) for start in range(0, total, size)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: each may be compared with the level as if it were alone.

    With m tests, the i-th smallest (from 0) is multiplied by m - i, is at least the one before, and at most 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def winner(result: Paired, adjusted: float) -> str | None:
    """`first` or `second` where one is shown to be better, else None.

    That needs an interval without 0, a corrected p below 0.05, and the same sign in every seed.
    """
    ends = result.interval
    clear = ends is not None and (ends[0] > 0 or ends[1] < 0)
    if not clear or adjusted >= LEVEL or result.seeds_agree < result.num_seeds:
        return None
    return "first" if result.difference > 0 else "second"


def sentence(first: str, second: str, task: str, result: Paired, adjusted: float) -> str:
    """What may be said about a pair."""
    upper = result.difference >= 0
    left, right = (first, second) if upper else (second, first)
    size = f"{abs(result.difference):.3f}"
    if result.interval is not None:
        low, high = result.interval if upper else (-result.interval[1], -result.interval[0])
        size += f" (95 % interval {low:.3f} to {high:.3f})"
    rest = f"{size}, {p_text(adjusted)}, same sign in {result.seeds_agree} of {result.num_seeds} seeds"
    if winner(result, adjusted):
        return f"{task}: {left} is better than {right} by {rest}"
    return f"{task}: no difference shown between {left} and {right}: {rest}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
