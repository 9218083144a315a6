"""`vlm search`: asks vectors, prints what is found, writes the page of it, or serves the page that asks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vlm.cli import console
from vlm.cli.vectors import Opened
from vlm.data import strictjson
from vlm.errors import ConfigError, DataError, ImageError
from vlm.images.load import load_image
from vlm.report.hits import Hit, Hits
from vlm.report.sections import write_report
from vlm.serve.local import LocalServer
from vlm.serve.search import SearchPages
from vlm.siglip.search import index
from vlm.siglip.search.asking import Found, Query
from vlm.words import aligned, shown

STDIN = "-"
AT_ONCE = 256
"""Queries that are embedded and searched together."""
SHORT = 70
"""Characters of a text that a line of results shows."""
MENUS, MENU = 4, (2, 30)
"""So many filters the page offers, each of keys with so many different values."""


class Asking(NamedTuple):
    """What is asked: texts (`-` for stdin), files of pictures, how many results, filters."""

    texts: Sequence[str]
    images: Sequence[str]
    k: int
    where: Sequence[str]


def build(opened: Opened, kind: str, engine: str) -> int:
    """Build an index beside the vectors, and print what was measured; returns the exit code."""
    index.build(opened.path, kind, engine, opened.exact, opened.store.ids)
    return console.OK


# --- asking -----------------------------------------------------------------------------------------------------------


def search(opened: Opened, asking: Asking, *, as_json: bool, html: Path | None) -> int:
    """Print what each query finds, best first; returns the exit code.

    Pictures that cannot be read are told on stderr; where they are queries of their own, the others are answered.
    """
    pictures, num_bad = _pictures(asking)
    queries = _queries(list(_texts(asking.texts)), pictures)
    every: list[Found] = []
    began, num_asked, nothing = time.perf_counter(), 0, False
    while some := list(islice(queries, AT_ONCE)):
        for found in opened.searcher.answer(some, asking.k, asking.where):
            num_asked, nothing = num_asked + 1, not found.allowed
            _tell_cut(opened, found)
            print(_line(opened, found) if as_json else _table(opened, found), flush=True)
            every += [found] if html else []
    if not len(opened.store):
        print(f"{opened.path}: no vectors in it yet", file=sys.stderr)
    elif nothing:
        print(f"no entry holds {', '.join(asking.where)}", file=sys.stderr)
    if html:
        _write_page(opened, html, every, asking.where)
    took = time.perf_counter() - began
    asked = f"{num_asked:,} {'query' if num_asked == 1 else 'queries'}"
    print(f"{asked} of {len(opened.store):,} entries in {took:.2f} s", file=sys.stderr)
    return console.SKIPPED if num_bad else console.OK


def _texts(given: Sequence[str]) -> Iterator[str]:
    """The texts of the queries, those of stdin in their place. Raises ConfigError or DataError."""
    for text in given:
        if text != STDIN:
            if not text.strip():
                raise ConfigError("an empty QUERY; say in words what is looked for")
            yield text
            continue
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                said = strictjson.decode(line).strip()
            except strictjson.NotJSON as error:
                raise DataError(f"stdin, line {number}: {error}") from error
            if said:
                yield said


def _pictures(asking: Asking) -> tuple[list[tuple[str, Any]], int]:
    """The pictures that can be read, and how many cannot. Raises the last error where nothing is left to ask."""
    good: list[tuple[str, Any]] = []
    for path in asking.images:
        try:
            load_image(path)
            good.append((path, path))
        except ImageError as error:
            if asking.texts or len(asking.images) == 1:
                raise
            print(f"error: {error.code}: {error}", file=sys.stderr)
    num_bad = len(asking.images) - len(good)
    if num_bad and not good:
        raise ConfigError("no picture to look for could be read")
    return good, num_bad


def _queries(texts: list[str], pictures: list[tuple[str, Any]]) -> Iterator[Query]:
    """Each text is a query, and the pictures belong to each; without a text each picture is one."""
    if not texts and not pictures:
        raise ConfigError("nothing to look for: no line of stdin has a text")
    for text in texts:
        yield Query(texts=(text,), images=tuple(pictures))
    if not texts:
        yield from (Query(images=(picture,)) for picture in pictures)


def _tell_cut(opened: Opened, found: Found) -> None:
    for text in found.cut:
        context = opened.model[1].context
        print(
            f"warning: {text[:50]!r}...: longer than the {context} tokens that the model reads; its end was left out",
            file=sys.stderr,
        )


def _line(opened: Opened, found: Found) -> str:
    """A query with its results as JSON; what was fused, and how, where something was."""
    results = [
        {"id": opened.store.ids[row], "score": score, "rank": rank}
        for rank, (row, score) in enumerate(zip(found.rows, found.scores, strict=True), 1)
    ]
    query = found.query
    how: dict[str, Any] = {}
    if query.parts > 1:
        how = {"images": [name for name, _ in query.images], "fusion": found.scored_by}
    asked = query.texts[0] if query.texts else query.name
    return json.dumps({"query": asked, **how, "results": results})


def _table(opened: Opened, found: Found) -> str:
    """A query with its results as lines."""
    lines = [f"{shown(found.query.name)}: {_count(found)}"]
    if found.rows:
        rows = [("", "rank", "score", "id", "")]
        for rank, (row, score) in enumerate(zip(found.rows, found.scores, strict=True), 1):
            text = " ".join(opened.text(row).split())
            text = text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."
            rows.append(("", str(rank), f"{score:.4f}", shown(opened.store.ids[row]), text))
        lines += aligned(rows, left=(3, 4))
    return "\n".join(lines)


def _count(found: Found) -> str:
    some = f"{len(found.rows):,} of {found.total:,}"
    if found.allowed < found.total:
        some += f", the filter leaves {found.allowed:,}"
    return f"{some}, by {found.scored_by}" if found.rows else some


def _write_page(opened: Opened, path: Path, every: Sequence[Found], where: Sequence[str]) -> None:
    sections = []
    for found in every:
        hits = [_hit(opened, found, place) for place in range(len(found.rows))]
        asked = found.query.images[0][1] if found.query.images else None
        sections.append(Hits(found.query.name, hits, found.total, _note(found), asked))
    write_report(
        path,
        title=every[0].query.name if len(every) == 1 else f"{len(every):,} queries",
        subtitle=f"{_about(opened)}{' · only ' + ', '.join(where) if where else ''}",
        sections=sections,
    )
    print(f"the page is {path}", file=sys.stderr)


def _hit(opened: Opened, found: Found, place: int) -> Hit:
    row = found.rows[place]
    return Hit(opened.store.ids[row], found.scores[place], place + 1, opened.image(row), opened.text(row))


def _note(found: Found) -> str:
    left = f"the filter leaves {found.allowed:,} · " if found.allowed < found.total else ""
    return left + found.scored_by


def _about(opened: Opened) -> str:
    kind = {"images": "pictures"}.get(opened.store.kind, opened.store.kind)
    return f"{len(opened.store):,} {kind} in {opened.path} · {opened.model_name}"


# --- the page that asks -----------------------------------------------------------------------------------------------


def serve(opened: Opened, port: int) -> int:
    """Serve the search page until Ctrl-C or SIGTERM, which `vlm.children.endings` turns into the exit code."""
    opened.model  # noqa: B018 - a model that is not there, or another space, is told now and not to the first query
    pages = SearchPages(
        opened.searcher,
        opened.image,
        opened.text,
        title=opened.path.resolve().name,
        about=_about(opened),
        filters=_menus(opened.store.info),
    )
    with LocalServer(pages, port) as server:
        print(f"{_about(opened)}\n{server.address}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        server.serve_forever()
    return console.OK


def _menus(info: Sequence[Any]) -> dict[str, list[str]]:
    """Keys of the metadata that have a few values only, and these: the filters that the page offers."""
    found: dict[str, set[str]] = {}
    for one in info:
        for key, value in one.items():
            values = found.setdefault(key, set())
            if isinstance(value, str | int | bool) and len(values) <= MENU[1]:
                values.add(value if isinstance(value, str) else json.dumps(value))
    few = {key: sorted(values) for key, values in found.items() if MENU[0] <= len(values) <= MENU[1]}
    return dict(list(few.items())[:MENUS])
