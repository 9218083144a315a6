"""Several rankings of the same rows as one: of a text and an image, or of several phrasings of a query.

Scores of texts and of images lie on different scales, so only ranks are counted: reciprocal rank fusion,
`score(row) = sum over rankings of 1 / (60 + rank)`, ranks from 1; a ranking without the row adds nothing.

Source: G. Cormack, C. Clarke, S. Buettcher, Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning
Methods, SIGIR 2009.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

from vlm.errors import ConfigError

CONSTANT = 60
"""The paper's constant, "to mitigate the impact of high rankings by outlier systems"."""
DEPTH = 1000
"""Rows of each ranking to hand in: deeper than what is shown, for a row that is second everywhere."""


def fused(rankings: Iterable[Sequence[int]], k: int | None = None) -> list[tuple[int, float]]:
    """Rows with their fused scores, best first; of equal scores the lower row.

    Args:
        rankings: rows of each ranking, best first, each row once.
        k: how many; None means all.

    Raises:
        ConfigError: a ranking that has a row twice.
    """
    total: dict[int, Fraction] = defaultdict(Fraction)  # exact, so that the order of the rankings is irrelevant
    for number, ranking in enumerate(rankings):
        if len(set(ranking)) < len(ranking):
            raise ConfigError(f"ranking {number} has a row twice: expected each row once")
        for rank, row in enumerate(ranking, 1):
            total[row] += Fraction(1, CONSTANT + rank)
    best = sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(row, float(score)) for row, score in best[:k]]
