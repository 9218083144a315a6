"""Which example is seen when: a pure function of the seed, so a run can start again at any step.

Each epoch is a permutation of the mixture, drawn from (seed, epoch) alone. The permutations are laid end to end into
one endless line of positions, and optimizer step s takes the positions [s * B, (s + 1) * B), as long as B stays the
same. Rank r and micro-batch a take a fixed slice of these. What is drawn for an example (its augmentation, the example
in its place when its image does not decode) is drawn from (seed, position), so `repeat` shows it in several views.
There is no state: to resume at step s is to begin counting at s. With B = 8, 2 ranks and 2 micro-batches:

    position   0 1 2 3 4 5 6 7
    rank       0 0 0 0 1 1 1 1
    micro      0 0 1 1 0 0 1 1
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vlm.errors import ConfigError


class Key(NamedTuple):
    """One micro-batch of one rank."""

    step: int
    """Optimizer step within the stage, from 0."""
    micro: int
    first: int
    """First position in the endless line of examples."""
    size: int

    @property
    def positions(self) -> range:
        return range(self.first, self.first + self.size)


@dataclass(frozen=True)
class Mixture:
    """Files of `counts[i]` examples, each seen `repeats[i]` times per epoch."""

    counts: tuple[int, ...]
    repeats: tuple[float, ...]
    seed: int

    @property
    def epoch_length(self) -> int:
        """Examples per epoch; at least 1 of every file."""
        return sum(self._taken(i) for i in range(len(self.counts)))

    @property
    def num_examples(self) -> int:
        return sum(self.counts)

    def example(self, position: int) -> int:
        """Index of the example at a position of the endless line, counted through the files one after the other."""
        epoch, place = divmod(position, self.epoch_length)
        return int(self.order(epoch)[place])

    def order(self, epoch: int) -> np.ndarray:
        """int64[epoch_length]: the examples of one epoch in the order they are seen."""
        return _epoch_order(self, epoch)

    def substitute(self, position: int, attempt: int) -> int:
        """Index of the example that takes the place at `position` when `attempt` earlier choices could not be used."""
        return int(_random(self.seed, 1, position, attempt, size=1)[0] % np.uint64(self.num_examples))

    def _taken(self, i: int) -> int:
        return max(1, round(self.counts[i] * self.repeats[i]))

    def _order(self, epoch: int) -> np.ndarray:
        """int64[epoch_length]: the examples of one epoch in the order they are seen."""
        chosen, first = [], 0
        for i, count in enumerate(self.counts):
            whole, part = divmod(self._taken(i), count)
            examples = np.arange(first, first + count)
            chosen += [examples] * whole
            if part:
                draw = np.argsort(_random(self.seed, 2, epoch, i, size=count), kind="stable")[:part]
                chosen.append(examples[draw])
            first += count
        line = np.concatenate(chosen)
        return line[np.argsort(_random(self.seed, 3, epoch, 0, size=len(line)), kind="stable")]


def _random(seed: int, purpose: int, a: int, b: int, size: int) -> np.ndarray:
    """uint64[size] of random bits that depend on the four numbers only.

    Raw bits of a counter-based generator, because numpy promises these for ever; it does not promise `permutation`.
    """
    words = (np.uint64(seed) ^ np.uint64(purpose << 60), np.uint64(b))
    return np.random.Philox(key=np.array(words), counter=[0, 0, a, 0]).random_raw(size)


# A step may straddle two epochs, and a loading process works on nothing older.
@lru_cache(maxsize=4)
def _epoch_order(mixture: Mixture, epoch: int) -> np.ndarray:
    return mixture._order(epoch)


def drawn(seed: int, step: int, choices: Sequence[int]) -> int:
    """One of `choices` for an optimizer step, each as likely: the same on every rank, and after a resume."""
    return choices[int(_random(seed, 5, step, 0, size=1)[0] % np.uint64(len(choices)))]


def steps_of(epochs: float, epoch_length: int, batch_size: int) -> int:
    """Optimizer steps that show every example at least `epochs` times."""
    return max(1, math.ceil(epochs * epoch_length / batch_size))


class StepSampler:
    """The micro-batches of one rank from optimizer step `start` up to (not including) `stop`, in order.

    Args:
        position: of step `start` in the endless line; None when every step before had this `batch_size`.

    Raises `ConfigError` when `batch_size` cannot be shared equally by `world` ranks of `accumulate` micro-batches.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        batch_size: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        position: int | None = None,
    ) -> None:
        shares = accumulate * world
        if batch_size % shares:
            raise ConfigError(
                f"batch_size {batch_size} cannot be shared equally by {world} processes x {accumulate} micro-batches "
                f"(accumulate); use other numbers of these (a run that goes on accepts that), or a batch_size that is a"
                f" multiple of {shares}"
            )
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.accumulate, self.rank, self.size = accumulate, rank, batch_size // shares
        self.position = start * batch_size if position is None else position

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[Key]:
        for step in range(self.start, self.stop):
            first = self.position + (step - self.start) * self.batch_size
            for micro in range(self.accumulate):
                place = self.rank * self.accumulate + micro
                yield Key(step, micro, first + place * self.size, self.size)


def stage_seed(seed: int, stage: int) -> int:
    """The seed of one stage (0 = the first), below 2**60: stages show the data in different orders."""
    return int(_random(seed, 4, stage, 0, size=1)[0] >> np.uint64(4))
