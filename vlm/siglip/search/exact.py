"""Exact inner product of queries with stored vectors, on the CPU: the best rows of each query, in a settled order.

A first pass over all vectors, block by block, gives scores in fast arithmetic together with a bound on their rounding.
Whatever could still be among the best within twice this bound is settled: its inner product is taken again in float64
and rounded to float32 once. So the result is that of the true inner products of the stored values, whatever the batch,
the shards, the number of threads and the library that multiplies: equal vectors have equal scores, and of equal scores
the lower row comes first.

Two kinds of fast arithmetic. Blocks become float32 in one small buffer that stays in the cache, and one matrix product
scores them for all queries. For one or two queries, where reading memory is all the work, float16 vectors are
multiplied as they are: torch sums in float32 but rounds query and result to float16, which its larger bound covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.errors import ConfigError, DataError
from vlm.siglip.search.screen import AsStored, Float32, float32, sums_in_float16

VALUES = 1 << 20
"""Values in a block that becomes float32: 4 MiB, for the cache."""
VALUES_AS_STORED = 1 << 23
"""Values in a block that is multiplied as it is stored."""
QUERIES = 1024
"""Queries that one pass takes."""
FEW = 2
"""Up to so many queries, float16 vectors are multiplied as they are."""
SETTLED = 256
"""Products in float64 at a time; bounds the memory."""
PILED = 1 << 16
"""Candidates that wait to be settled."""


class Top(NamedTuple):
    """The best rows of each query, best first: scores float32[Q, k'], rows int64[Q, k']."""

    scores: Tensor
    rows: Tensor


def top(shards: Sequence[Tensor], queries: Tensor, k: int, allowed: Tensor | None = None) -> Top:
    """The `k` best rows of each query: `Exact(shards).top(queries, k, allowed)`. For many searches keep the `Exact`."""
    return Exact(shards).top(queries, k, allowed)


class Exact:
    """Vectors that lie in memory or in mapped files, ready to be searched; reads them once to check them.

    Args:
        shards: float16 or float32 [n_i, D] on the CPU; row numbers run through them.

    Attributes:
        rows, width: how many vectors, and their D.
        longest: the length of the longest vector; bounds the rounding.

    Raises:
        ConfigError: shards of other types or of different widths.
        DataError: a row with NaN or infinity, or too long to be squared; names it.
    """

    def __init__(self, shards: Sequence[Tensor]) -> None:
        _check_shards(shards)
        self.shards = list(shards)
        self.starts = [0, *accumulate(len(shard) for shard in shards)]
        self.rows, self.width = self.starts[-1], shards[0].shape[1] if shards else 0
        self._starts = torch.tensor(self.starts)
        self.longest = self._measure()

    def _measure(self) -> float:
        longest, buffer = 0.0, self._buffer()
        for block in self._blocks(None, self._at_once(VALUES)):
            lengths = torch.linalg.vector_norm(float32(block.vectors, buffer), dim=1)
            most = float(lengths.max())
            if not most < float("inf"):  # NaN too
                row = block.first + int(lengths.isfinite().logical_not().nonzero()[0])
                raise DataError(f"vector {row} is not finite (NaN or infinity, or too long): embed its source again")
            longest = max(longest, most)
        return longest

    def top(self, queries: Tensor, k: int, allowed: Tensor | None = None) -> Top:
        """The `k` best rows of each query among those allowed, by inner product; of equal scores the lower row first.

        Args:
            queries: float[Q, D]; taken as float32.
            k: at least 1. With fewer rows allowed, the result has fewer columns: never a row twice, never -1.
            allowed: bool[N], the rows that may be found; None means all.

        Returns:
            scores float32[Q, k'] and rows int64[Q, k'], on the CPU; k' = min(k, rows allowed).

        Raises:
            ConfigError: a query of another width or with NaN or infinity; k below 1; a mask of another length.
        """
        queries = checked_queries(queries, self.width, self.rows)
        most = min(checked_k(k), self.rows if allowed is None else checked_mask(allowed, self.rows))
        if not most or not len(queries):
            return Top(torch.zeros(len(queries), most), torch.zeros(len(queries), most, dtype=torch.int64))
        found = [self._search(some, most, allowed) for some in queries.split(QUERIES)]
        return Top(*map(torch.cat, zip(*found, strict=True)))

    def scores(self, queries: Tensor, which: Tensor, rows: Tensor) -> Tensor:
        """Settled inner products of pairs: float32[n] of `queries[which]` with the vectors `rows`, each int64[n]."""
        found = torch.empty(len(rows))
        for i in range(0, len(rows), SETTLED):
            part = slice(i, i + SETTLED)
            products = self.vectors(rows[part]).double().mul_(queries[which[part]])
            found[part] = products.sum(dim=1)
        return found

    def vectors(self, rows: Tensor) -> Tensor:
        """Stored vectors of these rows: float32[n, D]."""
        taken = torch.empty(len(rows), self.width)
        home = torch.bucketize(rows, self._starts, right=True) - 1
        for shard in home.unique().tolist():
            here = home == shard
            taken[here] = self.shards[shard][rows[here] - self.starts[shard]].float()
        return taken

    def _search(self, queries: Tensor, k: int, allowed: Tensor | None) -> Top:
        for screen in self._screens(queries):
            pile = self._candidates(screen, queries, k, allowed)
            settled = pile._replace(scores=self.scores(queries, pile.which, pile.rows))
            # Were float16 products summed in another way on some CPU, what was settled would show it.
            if ((settled.scores - pile.scores).abs() <= screen.error[pile.which]).all():
                break
        best = settled.best(len(queries), k)
        return Top(best.scores.view(-1, k), best.rows.view(-1, k))

    def _candidates(self, screen: Float32 | AsStored, queries: Tensor, k: int, allowed: Tensor | None) -> Ranked:
        """What may be among the best, by first scores. The floor of a query is what a score needs to be among them."""
        number = len(queries)
        limit = max(PILED, 4 * k * number)
        waiting: list[Ranked] = []
        floor = torch.full((number,), -torch.inf)
        seen, size, look_at = 0, 0, 1
        for block in self._blocks(allowed, screen.at_once):
            first = screen(block.vectors)
            places, which = (first >= floor).nonzero(as_tuple=True)
            if len(first) > k and len(which) > 4 * k * number:
                kth = first.topk(k, dim=0).values[-1]
                places, which = (first >= torch.maximum(floor, kth - 2 * screen.error)).nonzero(as_tuple=True)
            waiting.append(Ranked(which, block.rows(places), first[places, which]))
            seen, size = seen + len(first), size + len(which)
            # The floor rises most at the start: looked at each time the rows seen have doubled, and when many wait.
            if seen >= look_at or size > limit:
                pile = Ranked.joined(waiting)
                floor = pile.kth(number, k) - 2 * screen.error
                pile = pile.where(pile.scores >= floor[pile.which])
                if len(pile.which) > limit:  # too many for the first pass to tell apart
                    pile = pile._replace(scores=self.scores(queries, pile.which, pile.rows)).best(number, k)
                waiting, size, look_at = [pile], len(pile.which), 2 * seen
        return Ranked.joined(waiting)

    def _screens(self, queries: Tensor) -> Iterator[Float32 | AsStored]:
        """First passes to take, the fastest first; the next one where a pass did not keep its bound."""
        halves = all(shard.dtype == torch.float16 for shard in self.shards)
        if halves and len(queries) <= FEW and not sums_in_float16():
            stored = AsStored(queries, self.longest, self._at_once(VALUES_AS_STORED))
            if stored.usable:
                yield stored
        yield Float32(queries, self.longest, self._at_once(VALUES), self._buffer())

    def _at_once(self, values: int) -> int:
        return max(1, values // max(1, self.width))

    def _buffer(self) -> Tensor:
        return torch.empty(min(self._at_once(VALUES), self.rows), self.width)

    def _blocks(self, allowed: Tensor | None, at_once: int) -> Iterator[_Block]:
        for start, shard in zip(self.starts, self.shards, strict=False):
            for i in range(0, len(shard), at_once):
                vectors, first = shard[i : i + at_once], start + i
                if allowed is None or (here := allowed[first : first + len(vectors)]).all():
                    yield _Block(vectors, first, None)
                elif here.any():
                    chosen = here.nonzero()[:, 0]
                    yield _Block(vectors[chosen], first, chosen)


class _Block(NamedTuple):
    """Vectors that lie together, or those chosen from them: `chosen` int64[n] counts from row `first`."""

    vectors: Tensor
    first: int
    chosen: Tensor | None

    def rows(self, places: Tensor) -> Tensor:
        """Row numbers of these places in the block."""
        return self.first + (places if self.chosen is None else self.chosen[places])


class Ranked(NamedTuple):
    """Pairs of a query and a row, with their scores: int64[n], int64[n], float32[n]."""

    which: Tensor
    rows: Tensor
    scores: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Ranked]) -> Ranked:
        """All pairs of at least one part."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def where(self, chosen: Tensor) -> Ranked:
        """The pairs that a mask or an index chooses."""
        return Ranked(self.which[chosen], self.rows[chosen], self.scores[chosen])

    def best(self, queries: int, k: int) -> Ranked:
        """The `k` best pairs of each query, sorted by query, then by score, then by row."""
        found = self.where(self.rows.argsort())
        return found.where(found.order(queries, k))

    def order(self, queries: int, k: int) -> Tensor:
        """The `k` best pairs of each query, by query and falling score; of equal scores the one that is here first."""
        order = self.scores.argsort(descending=True, stable=True)
        order = order[self.which[order].argsort(stable=True)]
        counts = self.which.bincount(minlength=queries)
        starts = counts.cumsum(0) - counts
        return order[torch.arange(len(order)) - starts[self.which[order]] < k]

    def kth(self, queries: int, k: int) -> Tensor:
        """The k-th best score of each query, float32[queries]; -inf where it has fewer."""
        best = self.order(queries, k)
        counts = self.which[best].bincount(minlength=queries)
        found = torch.full((queries,), -torch.inf)
        found[counts == k] = self.scores[best[counts.cumsum(0)[counts == k] - 1]]
        return found


def _check_shards(shards: Sequence[Tensor]) -> None:
    for i, shard in enumerate(shards):
        if shard.dim() != 2 or shard.dtype not in (torch.float16, torch.float32) or shard.device.type != "cpu":
            got = f"{shard.dtype} of shape {tuple(shard.shape)} on {shard.device}"
            raise ConfigError(f"shard {i} of the vectors is {got}: expected float16 or float32 [n, D] on the CPU")
        if shard.shape[1] != shards[0].shape[1]:
            raise ConfigError(f"shard {i} has vectors of {shard.shape[1]} values, shard 0 of {shards[0].shape[1]}")


def checked_queries(queries: Tensor, width: int, rows: int) -> Tensor:
    """Queries as float32[Q, D] on the CPU, checked against the vectors that are searched. Raises `ConfigError`."""
    if queries.dim() != 2 or (rows and queries.shape[1] != width):
        raise ConfigError(
            f"queries of shape {tuple(queries.shape)} for vectors of {width} values: expected [Q, {width}]"
        )
    queries = queries.detach().to("cpu", torch.float32)
    if not queries.isfinite().all():
        which = int(queries.isfinite().all(dim=1).logical_not().nonzero()[0])
        raise ConfigError(f"query {which} has NaN or infinity; look at the model or the picture that it comes from")
    return queries


def checked_k(k: int) -> int:
    """How many results: at least 1. Raises `ConfigError`."""
    if k < 1:
        raise ConfigError(f"k is {k}: expected the number of results, at least 1")
    return k


def checked_mask(allowed: Tensor, rows: int) -> int:
    """How many rows a mask allows. Raises `ConfigError`: it is no bool[rows]."""
    if allowed.dtype != torch.bool or tuple(allowed.shape) != (rows,):
        got = f"{allowed.dtype} of shape {tuple(allowed.shape)}"
        raise ConfigError(f"the mask of allowed rows is {got}: expected bool of [{rows}]")
    return int(allowed.count_nonzero())
