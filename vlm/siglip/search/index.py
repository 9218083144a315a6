"""Search through an index of another engine, with what exact search promises: never -1, never a row twice, true scores.

    VECTORS/indexes/hnsw-faiss/
        index.faiss       the engine's own format: row numbers are those of the living vectors, in order
        manifest.json     kind, engine, settings, the vectors it was made of, and the recall that was measured

The engine only proposes rows. Their scores come from the vectors, as in exact search; the filter is applied to them;
where too few are left, more are asked for, and at last the vectors themselves are searched. A row may be missed, which
is what the measured recall counts, but nothing that is shown is wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError, nearest
from vlm.files import publishing, write_json
from vlm.siglip.search.engines import ENGINES, KINDS, Engine
from vlm.siglip.search.exact import Exact, Ranked, Top, checked_k, checked_mask, checked_queries
from vlm.words import listed

FOLDER, MANIFEST, FORMAT = "indexes", "manifest.json", 1
WANTED = 0.95
"""The recall that the effort of a search is chosen for."""
AT, ASKED = 10, 500
"""Recall is measured among so many best rows, with so many queries."""
SAMPLED = 1024
"""Vectors whose bytes tie an index to its vectors."""
EXACT_BELOW, EXACT_ABOVE = 0.1, 0.25
"""With a filter that leaves less than this share, or where more than that share would have to be proposed, the vectors
themselves are searched: that is the faster way."""
_ADDED = 8192


class Index:
    """An index together with its vectors: answers as `Exact.top` does, but may miss rows.

    Attributes:
        manifest: kind, engine, settings, effort, recall and more, as it was written.
    """

    def __init__(self, engine: Engine, vectors: Exact, manifest: dict[str, Any]) -> None:
        self.engine, self.vectors, self.manifest = engine, vectors, manifest

    def top(self, queries: Tensor, k: int, allowed: Tensor | None = None) -> Top:
        """As `Exact.top`: the same arguments, shapes, scores, order and refusals; k' = min(k, rows allowed) always."""
        rows = self.vectors.rows
        queries = checked_queries(queries, self.vectors.width, rows)
        left = rows if allowed is None else checked_mask(allowed, rows)
        most = min(checked_k(k), left)
        count = most if left == rows else math.ceil(1.5 * most * rows / max(1, left))
        found = Top(torch.zeros(len(queries), most), torch.zeros(len(queries), most, dtype=torch.int64))
        missing = torch.arange(len(queries)) if left >= EXACT_BELOW * rows else torch.arange(0)
        asked = missing
        while len(asked) and count <= EXACT_ABOVE * rows:
            asked = self._propose(queries, asked, count, allowed, found)
            count *= 4
        rest = asked if len(missing) else torch.arange(len(queries))
        if most and len(rest):
            exact = self.vectors.top(queries[rest], k, allowed)
            found.scores[rest], found.rows[rest] = exact.scores, exact.rows
        return found

    def _propose(self, queries: Tensor, asked: Tensor, count: int, allowed: Tensor | None, found: Top) -> Tensor:
        """Fill `found` for the queries `asked` that get enough rows from so many proposals; those that do not."""
        some = queries[asked]
        rows = self.engine.search(some, count)
        good = rows >= 0
        if allowed is not None:
            good &= allowed[rows.clamp(min=0)]
        which = torch.arange(len(some))[:, None].expand_as(rows)
        pairs = (which[good] * self.vectors.rows + rows[good]).unique()  # each row once, whatever the engine says
        which, rows = pairs // self.vectors.rows, pairs % self.vectors.rows
        k = found.rows.shape[1]
        best = Ranked(which, rows, self.vectors.scores(some, which, rows)).best(len(some), k)
        full = best.which.bincount(minlength=len(some)) == k
        best = best.where(full[best.which])
        found.scores[asked[full]], found.rows[asked[full]] = best.scores.view(-1, k), best.rows.view(-1, k)
        return asked[~full]


# --- building, opening ------------------------------------------------------------------------------------------------


def build(
    folder: Path, kind: str, engine: str, vectors: Exact, ids: Sequence[str], told: Callable[[str], None] = print
) -> Index:
    """Build an index, choose how hard it looks so that recall@10 reaches 0.95, and save it beside the vectors.

    Recall is measured with vectors of the collection as queries, each without itself, against exact search. Queries of
    another kind (texts for pictures) lie farther away, and less may be found: `recall` measures it for any queries.

    Args:
        folder: of the vectors. kind: `flat`, `ivf` or `hnsw`. engine: `faiss` or `usearch`.
        ids: of the rows; with the vectors they are what the index is made for.
        told: gets a line for each measurement.

    Raises:
        ConfigError: no such kind or engine, its library is missing, or there are no vectors. DiskError.
    """
    _check_names(kind, engine)
    if not vectors.rows:
        raise ConfigError(f"{folder}: no vectors in it yet; embed some, then build the index")
    began = time.perf_counter()
    dtype = str(vectors.shards[0].dtype).removeprefix("torch.")
    made = ENGINES[engine].new(kind, vectors.rows, vectors.width, dtype, lambda count: _sample(vectors, count))
    for start in range(0, vectors.rows, _ADDED):
        made.add(vectors.vectors(torch.arange(start, min(start + _ADDED, vectors.rows))))
    took = time.perf_counter() - began
    told(f"{kind} ({engine} {made.version}): {vectors.rows:,} vectors in {took:.1f} s")
    measured = _measured(Index(made, vectors, {}), told)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "engine": engine,
        "version": made.version,
        "settings": made.settings,
        "seconds": round(took, 1),
        **measured,
        "made_for": _tie(vectors, ids),
    }
    with publishing(_place(folder, kind, engine)) as staging:
        made.save(staging / made.file)
        write_json(staging / MANIFEST, manifest)
    return Index(made, vectors, manifest)


def open_index(folder: Path, kind: str, engine: str, vectors: Exact, ids: Sequence[str]) -> Index:
    """The index that was built beside the vectors.

    Raises:
        ConfigError: there is none, or it was made for other vectors than are there now; names what differs.
    """
    _check_names(kind, engine)
    place = _place(folder, kind, engine)
    again = f"build it with `vlm search {folder} --index {kind}{'' if engine == 'faiss' else f' --engine {engine}'}`"
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        made_for, settings, effort = manifest["made_for"], manifest["settings"], manifest["effort"]
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no index {kind} of {engine} here; {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{place / MANIFEST}: cannot be read ({str(error)[:100]}); {again}") from error
    now = _tie(vectors, ids)
    if stale := [f"{name} {made_for.get(name)}, now {now[name]}" for name in now if made_for.get(name) != now[name]]:
        raise ConfigError(f"{place}: made for other vectors ({listed(stale)}); {again}")
    opened = ENGINES[engine].open(place / ENGINES[engine].file, kind, settings)
    opened.set_effort(effort)
    return Index(opened, vectors, manifest)


def recall(found: Top, exact: Top) -> float:
    """The share of the exact results that was found; a row that scores like the last exact one counts as it."""
    if not exact.rows.numel():
        return 1.0
    return float((found.scores >= exact.scores[:, -1:]).float().mean())


def _measured(index: Index, told: Callable[[str], None]) -> dict[str, Any]:
    """Raise the effort until the recall is reached: the effort, the recall, and the time of a query both ways."""
    vectors = index.vectors
    rows = _spread(vectors.rows, ASKED)
    queries, k = vectors.vectors(rows), min(AT, max(1, vectors.rows - 1))
    exact, exactly = _timed(lambda: _others(vectors.top(queries, k + 1), rows))
    for effort in index.engine.efforts:
        index.engine.set_effort(effort)
        found, seconds = _timed(lambda: _others(index.top(queries, k + 1), rows))
        share = recall(found, exact)
        told(
            f"effort {effort}: recall@{k} {share:.4f}, {seconds / len(rows) * 1e3:.2f} ms a query;"
            f" exact search {exactly / len(rows) * 1e3:.2f} ms ({len(rows)} queries at once)"
        )
        if share >= WANTED:
            break
    return {
        "effort": effort,
        "recall": share,
        "recall_at": k,
        "measured_with": f"{len(rows)} vectors of the collection",
    }


def _others(top: Top, rows: Tensor) -> Top:
    """Results without the row that asked; where it is not among them, without the last."""
    own = top.rows == rows[:, None]
    own[~own.any(dim=1), -1] = True
    return Top(top.scores[~own].view(len(rows), -1), top.rows[~own].view(len(rows), -1))


def _timed(action: Callable[[], Top]) -> tuple[Top, float]:
    began = time.perf_counter()
    return action(), time.perf_counter() - began


def _sample(vectors: Exact, count: int) -> Tensor:
    return vectors.vectors(_spread(vectors.rows, count))


def _spread(rows: int, count: int) -> Tensor:
    """So many rows from all over, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(rows, generator=generator)[:count].sort().values


def _tie(vectors: Exact, ids: Sequence[str]) -> dict[str, Any]:
    """What an index was made for: so many rows, their ids in order, and the values of some of them."""
    names = hashlib.sha256()
    for name in ids:
        names.update(json.dumps(name).encode() + b"\n")
    values = hashlib.sha256(_sample(vectors, SAMPLED).numpy().tobytes())
    return {
        "vectors": vectors.rows,
        "width": vectors.width,
        "ids": names.hexdigest()[:16],
        "values": values.hexdigest()[:16],
    }


def _place(folder: Path, kind: str, engine: str) -> Path:
    return folder / FOLDER / f"{kind}-{engine}"


def _check_names(kind: str, engine: str) -> None:
    for name, known, what in ((kind, KINDS, "index"), (engine, ENGINES, "engine")):
        if name not in known:
            raise ConfigError(f"{what} {name!r}: expected {listed(list(known))}{nearest(name, known)}")
