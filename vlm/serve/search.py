"""The pages of `vlm search --serve`: what answers the search page, and the pictures of a collection by their row.

/                        the page (`vlm.report.live`); ?q= and the like are what it starts with
/api/search?q=...        one JSON object; `q`, `like` (an id) and a picture as the body of a POST are one query, fused
/picture/STATE/ROW       a small picture of an entry; /picture/STATE/ROW/large a larger one
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from vlm.errors import ConfigError, ImageError, nearest
from vlm.report.live import POLICY, search_page
from vlm.report.pictures import THUMBNAIL, ImageLike, Small, small
from vlm.serve.local import Refused, Request, Response, in_json
from vlm.siglip.search.asking import Found, Query, Searcher

LARGE = 1280
"""Pixels of the longer side of a picture that is looked at."""
STEP = 48
"""So many hits are shown first, and so many more on request."""
MOST, LONGEST, PARTS = 1000, 2000, 8
"""Hits of an answer, characters of a text and parts of a query that are taken."""
_KEPT = 1500
_DECODERS = 4
_FIELDS = ("q", "like", "where", "k")


class SearchPages:
    """Answers the requests of the search page from one state of a collection.

    Args:
        picture: row -> what `vlm.images.load.load_image` takes, None where the entry has no picture.
        text: row -> its text, "" where it has none.
        title, about: head of the page.
        filters: key -> values that the page offers.
    """

    def __init__(
        self,
        searcher: Searcher,
        picture: Callable[[int], ImageLike | None],
        text: Callable[[int], str],
        *,
        title: str,
        about: str,
        filters: Mapping[str, Sequence[str]],
    ) -> None:
        self._searcher, self._picture, self._text = searcher, picture, text
        self._page = search_page(title, about, filters, step=STEP).encode()
        # Rows mean something in this state of the collection only, and browsers keep pictures.
        self._state = secrets.token_urlsafe(6)
        self._decoding = threading.BoundedSemaphore(_DECODERS)
        self._thumbnail = lru_cache(_KEPT)(self._small)

    def __call__(self, request: Request) -> Response:
        """The answer. Raises `Refused` and other `VLMError`."""
        match request.path.split("/")[1:]:
            case [""]:
                headers = {"Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'", "Cache-Control": "no-cache"}
                return Response(body=self._page, kind="text/html; charset=utf-8", headers=headers)
            case ["api", "search"]:
                return in_json(self._search(request))
            case ["picture", state, row] if state == self._state:
                return self._shown(row, THUMBNAIL)
            case ["picture", state, row, "large"] if state == self._state:
                return self._shown(row, LARGE)
        raise Refused(404, f"nothing has the address {request.path[:200]!r}")

    def _search(self, request: Request) -> dict[str, Any]:
        query, k, where = _asked(request)
        began = time.perf_counter()
        if query.parts:
            (found,) = self._searcher.answer([query], k, where)
        else:
            found = self._first(query, k, where)
        took = time.perf_counter() - began
        results = [self._hit(found, rank) for rank in range(len(found.rows))]
        return {
            "query": query.name,
            "results": results,
            "total": found.total,
            "seconds": took,
            "note": self._note(found, took),
            "more": len(results) == k < min(found.allowed, MOST),
        }

    def _first(self, query: Query, k: int, where: Sequence[str]) -> Found:
        """Where nothing is asked: the collection from its beginning."""
        allowed = self._searcher.allowed(where)
        total = len(self._searcher.ids)
        rows = range(total) if allowed is None else allowed.nonzero().flatten().tolist()
        return Found(query=query, rows=tuple(rows[:k]), scores=(), total=total, allowed=len(rows))

    def _hit(self, found: Found, place: int) -> dict[str, Any]:
        row = found.rows[place]
        picture = None if self._picture(row) is None else f"/picture/{self._state}/{row}"
        return {
            "id": self._searcher.ids[row],
            "score": found.scores[place] if found.scores else None,
            "rank": place + 1,
            "picture": picture,
            "text": self._text(row),
        }

    def _note(self, found: Found, took: float) -> str:
        told = [f"{len(found.rows):,} of {found.total:,}"]
        if found.allowed < found.total:
            told.append(f"the filter leaves {found.allowed:,}")
        if found.query.parts:
            told += [found.scored_by, f"{1000 * took:.0f} ms"]
        if found.cut:
            told.append("longer than the model reads: the end of the text was left out")
        return " · ".join(told)

    def _shown(self, row: str, largest: int) -> Response:
        if not (row.isascii() and row.isdecimal() and len(row) < 12 and int(row) < len(self._searcher.ids)):
            raise Refused(404, f"no entry has the row {row[:50]!r}")
        make = self._thumbnail if largest == THUMBNAIL else self._small
        try:
            made = make(int(row), largest)
        except ImageError as error:
            raise Refused(404, str(error)) from error
        return Response(body=made.data, kind=made.kind, headers={"Cache-Control": "private, max-age=3600"})

    def _small(self, row: int, largest: int) -> Small:
        source = self._picture(row)
        if source is None:
            raise Refused(404, f"the entry {self._searcher.ids[row]!r} has no picture")
        with self._decoding:
            return small(source, largest)


def _asked(request: Request) -> tuple[Query, int, list[str]]:
    """The query, how many hits, and the filter of a request."""
    for name in request.fields:
        if name not in _FIELDS:
            raise ConfigError(f"unknown field {name!r}{nearest(name, _FIELDS)}; known: {', '.join(_FIELDS)}")
    texts = tuple(text for text in request.fields.get("q", []) if text.strip())
    likes = tuple(request.fields.get("like", []))
    images = (("the picture", request.body),) if request.body else ()
    query = Query(texts=texts, images=images, likes=likes)
    if query.parts > PARTS:
        raise ConfigError(f"a query of {query.parts} parts; at most {PARTS} are taken")
    if any(len(text) > LONGEST for text in texts):
        raise ConfigError(f"a text of {max(map(len, texts)):,} characters; at most {LONGEST:,} are taken")
    (k, *more) = request.fields.get("k", [str(STEP)])
    if more or not (k.isascii() and k.isdecimal() and len(k) < 9 and 1 <= int(k) <= MOST):
        raise ConfigError(f"k = {k[:50]!r}: expected one whole number from 1 to {MOST:,}")
    return query, int(k), request.fields.get("where", [])
