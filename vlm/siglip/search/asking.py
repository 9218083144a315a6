"""Queries in words, pictures and examples to what a collection has for them: embedded, searched, fused, told.

The model is handed in as two functions, and so is the search: exact, or through an index. One `Searcher` answers a
command's queries and a page's; it holds one state of the collection, whatever is written meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.siglip.search import filters, fusion

_FILTERS = 16
"""So many filters are remembered; a page asks with the same one again and again."""
Top = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]
"""queries float32[Q, D], k, allowed bool[N] or None -> scores float32[Q, k'], rows int64[Q, k'], best first."""
Texts = Callable[[Sequence[str]], tuple[Tensor, tuple[int, ...]]]
"""texts -> vectors float32[N, D] and the numbers of those that were cut."""
Images = Callable[[Sequence[Any]], Tensor]
"""images, as `vlm.images.load.load_image` takes them -> vectors float32[N, D]. Raises ImageError."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked for; several things together are one query, and their rankings are fused.

    Attributes:
        texts: words. images: (name, image) of pictures. likes: ids of the collection.
    """

    texts: tuple[str, ...] = ()
    images: tuple[tuple[str, Any], ...] = ()
    likes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """In words."""
        names = (*self.texts, *(name for name, _ in self.images), *(f"like {id}" for id in self.likes))
        return " + ".join(names)

    @property
    def parts(self) -> int:
        """How many rankings it has."""
        return len(self.texts) + len(self.images) + len(self.likes)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a query found, best first.

    Attributes:
        rows: of the collection. scores: of each row.
        total: entries of the collection. allowed: how many of them the filter leaves.
        cut: texts of the query that are longer than the model reads.
    """

    query: Query
    rows: tuple[int, ...]
    scores: tuple[float, ...]
    total: int
    allowed: int
    cut: tuple[str, ...] = ()

    @property
    def scored_by(self) -> str:
        """What the scores are."""
        if self.query.parts > 1:
            return f"reciprocal rank fusion of {self.query.parts} rankings, 1/({fusion.CONSTANT} + rank)"
        return "cosine similarity"


class Searcher:
    """Answers queries from one state of a collection; may be called from several threads.

    Args:
        ids: of every row. info: what is known of every row; filters read it.
        vector: row -> its vector float32[D].
    """

    def __init__(
        self,
        ids: Sequence[str],
        info: Sequence[Mapping[str, Any]],
        vector: Callable[[int], Tensor],
        top: Top,
        texts: Texts,
        images: Images,
    ) -> None:
        self.ids, self.info = ids, info
        self.row_of = {id: row for row, id in enumerate(ids)}
        self._vector, self._top, self._texts, self._images = vector, top, texts, images
        self._allowed = lru_cache(_FILTERS)(lambda where: filters.allowed(info, filters.parse(where)))
        # The model runs one query after the other: two at once would only share the same cores.
        self._model = threading.Lock()

    def answer(self, queries: Sequence[Query], k: int, where: Sequence[str] = ()) -> list[Found]:
        """What is found for each query: at most `k` rows, fewer where there are fewer.

        Raises:
            ConfigError: a query without anything in it, `k` below 1, an id or key that is not there.
            ImageError: a picture of a query cannot be read.
        """
        if k < 1:
            raise ConfigError(f"k = {k}: expected at least 1 result")
        allowed = self.allowed(where)
        left = len(self.ids) if allowed is None else int(allowed.sum())
        vectors, cut = self._embedded(queries)
        depth = max(k, fusion.DEPTH) if any(query.parts > 1 for query in queries) else k
        rankings = self._rankings(vectors, min(depth, left), allowed)
        results, start = [], 0
        for query in queries:
            own = rankings[start : start + query.parts]
            start += query.parts
            best = own[0] if query.parts == 1 else fusion.fused([[row for row, _ in one] for one in own])
            results.append(
                Found(
                    query=query,
                    rows=tuple(row for row, _ in best[:k]),
                    scores=tuple(score for _, score in best[:k]),
                    total=len(self.ids),
                    allowed=left,
                    cut=tuple(text for text in query.texts if text in cut),
                )
            )
        return results

    def allowed(self, where: Sequence[str]) -> Tensor | None:
        """bool[N]: rows that a filter leaves (`key=value`, all of them must hold); None without a filter."""
        return self._allowed(tuple(where)) if where else None

    def _rankings(self, vectors: Tensor, depth: int, allowed: Tensor | None) -> list[list[tuple[int, float]]]:
        if not depth:
            return [[] for _ in vectors]
        scores, rows = self._top(vectors, depth, allowed)
        return [list(zip(*best, strict=True)) for best in zip(rows.tolist(), scores.tolist(), strict=True)]

    def _embedded(self, queries: Sequence[Query]) -> tuple[Tensor, set[str]]:
        """The vectors of all parts of all queries, in order, and the texts that were cut."""
        for number, query in enumerate(queries, 1):
            if not query.parts or any(not text.strip() for text in query.texts):
                raise ConfigError(f"query {number} is empty; say in words what is looked for")
        texts = [text for query in queries for text in query.texts]
        images = [image for query in queries for _, image in query.images]
        likes = [self._row(id) for query in queries for id in query.likes]
        with self._model:
            by_text, cut = self._texts(texts) if texts else (torch.zeros(0, 0), ())
            by_image = self._images(images) if images else torch.zeros(0, 0)
        pending = iter(by_text), iter(by_image), map(self._vector, likes)
        rows = [
            next(source)
            for query in queries
            for source, count in zip(pending, (len(query.texts), len(query.images), len(query.likes)), strict=True)
            for _ in range(count)
        ]
        return torch.stack(rows), {texts[number] for number in cut}

    def _row(self, id: str) -> int:
        if id not in self.row_of:
            raise ConfigError(f"no entry of the collection has the id {id!r}")
        return self.row_of[id]
