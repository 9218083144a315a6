"""Batches by length: as many samples at a time as fit a budget of tokens, similar lengths together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlm.errors import ConfigError


class Padding(NamedTuple):
    """What a way to form batches costs.

    Attributes:
        real: tokens of the samples.
        padded: rows times the longest, over all batches.
    """

    real: int
    padded: int

    @property
    def share(self) -> float:
        """Of what is computed, how much is padding: 0 to 1."""
        return 1 - self.real / self.padded


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions in batches whose padded size (rows x longest) is at most `budget` tokens.

    The longest come first, so that what needs the most memory is seen at once; equal lengths keep their order. A sample
    that is longer than the budget is a batch of its own. The result depends on the lengths alone.

        lengths 3 9 4 4, budget 10:  [[1], [2, 3], [0]]

    Raises:
        ConfigError: a budget below 1.
    """
    if budget < 1:
        raise ConfigError(f"batch_tokens is {budget}, expected at least 1 token")
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batches, first = [], 0
    while first < len(order):
        rows = max(1, budget // max(1, lengths[order[first]]))
        batches.append(order[first : first + rows])
        first += rows
    return batches


def padding(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> Padding:
    """What these batches of these samples cost."""
    padded = sum(len(batch) * max(lengths[position] for position in batch) for batch in batches)
    return Padding(sum(lengths[position] for batch in batches for position in batch), padded)
