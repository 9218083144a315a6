"""Search through an index: nothing that is shown is wrong, whatever the engine proposes; a stale index is refused.

The engines are the real ones where they are installed, and a bad one that answers as the worst of them could.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm.errors import ConfigError, DiskError
from vlm.siglip.search import index
from vlm.siglip.search.engines import Faiss, Usearch
from vlm.siglip.search.exact import Exact, Top

ROWS, WIDTH = 900, 24
BUILT = [("flat", "faiss"), ("ivf", "faiss"), ("hnsw", "faiss"), ("hnsw", "usearch")]


def vectors(rows: int = ROWS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)


def names(rows: int = ROWS) -> list[str]:
    return [f"{row}.jpg" for row in range(rows)]


def quiet(line: str) -> None:
    """Nobody reads along."""


class Bad:
    """An engine that repeats its best row, has no more after it, and knows every third row alone."""

    settings: dict[str, Any] = {}
    efforts = [1]
    version = "0"

    def __init__(self, stored: Tensor) -> None:
        self.stored = stored
        self.asked: list[int] = []

    def search(self, queries: Tensor, count: int) -> Tensor:
        self.asked.append(count)
        known = torch.arange(0, len(self.stored), 3)
        best = known[(queries @ self.stored[known].T).topk(min(count, len(known))).indices]
        rows = torch.full((len(queries), count), -1)
        rows[:, 0] = best[:, 0]
        rows[:, 1 : best.shape[1] - 1] = best[:, : best.shape[1] - 2]
        return rows

    def add(self, vectors: Tensor) -> None:
        """Nothing to take in."""

    def set_effort(self, effort: int) -> None:
        """No effort to set."""

    def save(self, path: Path) -> None:
        """Nothing to write."""


def check_promises(found: Top, exact: Exact, queries: Tensor, k: int, allowed: Tensor | None) -> None:
    """Every row once and allowed, true scores, best first, as many as there are."""
    may = set(range(exact.rows) if allowed is None else allowed.nonzero()[:, 0].tolist())
    assert found.rows.shape == found.scores.shape == (len(queries), min(k, len(may)))
    for line, scores, query in zip(found.rows.tolist(), found.scores.numpy(), queries.numpy(), strict=True):
        assert len(set(line)) == len(line) and set(line) <= may
        true = exact.vectors(torch.tensor(line, dtype=torch.int64)).numpy().astype(np.float64) @ query.astype(
            np.float64
        )
        np.testing.assert_allclose(scores, true, rtol=0, atol=1e-7)
        assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("share", [None, 0.9, 0.3, 0.02, 0.0])
@pytest.mark.parametrize("k", [1, 10, 150, 2000])
def test_whatever_the_engine_proposes_what_is_shown_is_right(share: float | None, k: int) -> None:
    exact, queries = Exact([vectors()]), vectors(7, seed=1)
    allowed = None if share is None else torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) < share
    bad = Bad(vectors())
    found = index.Index(bad, exact, {}).top(queries, k, allowed)
    check_promises(found, exact, queries, k, allowed)
    if share == 0.9 and k == 10:
        assert bad.asked == [17, 68] or bad.asked == [17]
    if share in (0.02, 0.0) or k == 2000:
        assert not bad.asked  # the vectors themselves are searched
        assert torch.equal(found.rows, exact.top(queries, k, allowed).rows)


@pytest.mark.parametrize(("kind", "engine"), BUILT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_index_answers_as_exact_search_does(kind: str, engine: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    exact, queries = Exact(vectors().to(dtype).split(250)), vectors(20, seed=1)
    lines: list[str] = []
    made = index.build(tmp_path, kind, engine, exact, names(), lines.append)
    opened = index.open_index(tmp_path, kind, engine, exact, names())
    assert made.manifest == opened.manifest and opened.manifest["recall"] >= 0.95
    assert f"recall@10 {made.manifest['recall']:.4f}" in lines[-1]
    for allowed in (None, torch.arange(ROWS) % 2 == 0):
        truth, found = exact.top(queries, 10, allowed), opened.top(queries, 10, allowed)
        check_promises(found, exact, queries, 10, allowed)
        assert index.recall(found, truth) >= 0.9
        if kind == "flat":
            assert torch.equal(found.rows, truth.rows) and torch.equal(found.scores, truth.scores)


def test_faiss_itself_reads_what_is_written(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    exact, queries = Exact([vectors().half()]), vectors(20, seed=1)
    index.build(tmp_path, "flat", "faiss", exact, names(), quiet)
    _, rows = faiss.read_index(str(tmp_path / "indexes/flat-faiss/index.faiss")).search(queries.numpy(), 10)
    np.testing.assert_array_equal(rows, exact.top(queries, 10).rows.numpy())


def test_an_index_of_other_vectors_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    stored = vectors()
    index.build(tmp_path, "flat", "faiss", Exact([stored]), names(), quiet)
    grown = Exact([torch.cat([stored, vectors(5, seed=9)])])
    with pytest.raises(ConfigError, match="made for other vectors .vectors 900, now 905.*vlm search .* --index flat`"):
        index.open_index(tmp_path, "flat", "faiss", grown, names(905))
    with pytest.raises(ConfigError, match=r"\(values \w+, now \w+\)"):
        index.open_index(tmp_path, "flat", "faiss", Exact([stored.flip(0)]), names())
    with pytest.raises(ConfigError, match=r"\(ids \w+, now \w+\)"):
        index.open_index(tmp_path, "flat", "faiss", Exact([stored]), names()[::-1])
    with pytest.raises(ConfigError, match="no index hnsw of usearch here; build it with .*--engine usearch"):
        index.open_index(tmp_path, "hnsw", "usearch", Exact([stored]), names())
    index.build(tmp_path, "flat", "faiss", grown, names(905), quiet)
    assert index.open_index(tmp_path, "flat", "faiss", grown, names(905)).manifest["made_for"]["vectors"] == 905


@pytest.mark.parametrize(("kind", "engine"), [("flat", "faiss"), ("hnsw", "usearch")])
def test_damaged_files_are_refused(kind: str, engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    exact = Exact([vectors()])
    index.build(tmp_path, kind, engine, exact, names(), quiet)
    place = tmp_path / "indexes" / f"{kind}-{engine}"
    written = place / f"index.{engine}"
    written.write_bytes(written.read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"{written.name}.*build"):
        index.open_index(tmp_path, kind, engine, exact, names())
    written.unlink()
    with pytest.raises(ConfigError, match=f"{written.name}.*build"):
        index.open_index(tmp_path, kind, engine, exact, names())
    for text in ("{", "[]", json.dumps({"made_for": {}})):
        (place / "manifest.json").write_text(text)
        with pytest.raises(ConfigError, match="manifest.json: cannot be read"):
            index.open_index(tmp_path, kind, engine, exact, names())


def test_what_cannot_be_built_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Exact([vectors()])
    with pytest.raises(ConfigError, match=r"index 'hnws': expected flat, ivf, hnsw \(did you mean 'hnsw'\?\)"):
        index.build(tmp_path, "hnws", "faiss", exact, names(), quiet)
    with pytest.raises(ConfigError, match="engine 'annoy': expected faiss, usearch"):
        index.build(tmp_path, "hnsw", "annoy", exact, names(), quiet)
    with pytest.raises(ConfigError, match="usearch has no index 'ivf', only hnsw"):
        index.build(tmp_path, "ivf", "usearch", exact, names(), quiet)
    with pytest.raises(ConfigError, match="no vectors in it yet"):
        index.build(tmp_path, "ivf", "faiss", Exact([]), [], quiet)
    for library, kind in (("faiss", "flat"), ("usearch.index", "hnsw")):
        monkeypatch.setitem(sys.modules, library, None)
        extra = library.partition(".")[0]
        with pytest.raises(ConfigError, match=rf"pip install 'vlm-backbone\[{extra}\]'"):
            index.build(tmp_path, kind, extra, exact, names(), quiet)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(("engine", "made"), [("faiss", Faiss), ("usearch", Usearch)])
def test_a_full_disk_is_told(engine: str, made: type[Faiss] | type[Usearch]) -> None:
    pytest.importorskip(engine)
    built = made.new("hnsw", ROWS, WIDTH, "float32", lambda count: vectors()[:count])
    built.add(vectors())
    with pytest.raises(DiskError, match="cannot write /dev/full"):
        built.save(Path("/dev/full"))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(("kind", "engine"), BUILT)
def test_a_few_vectors_can_be_indexed(rows: int, kind: str, engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    exact = Exact([vectors(rows)])
    made = index.build(tmp_path, kind, engine, exact, names(rows), quiet)
    check_promises(made.top(vectors(3, seed=1), 10), exact, vectors(3, seed=1), 10, None)
    assert made.manifest["recall"] == 1.0


def test_recall_counts_what_scores_like_the_last_exact_row() -> None:
    exact = Top(torch.tensor([[0.9, 0.5, 0.4, 0.4]]), torch.tensor([[1, 2, 3, 4]]))
    # Row 7 ties with row 4; row 8 does not belong there.
    found = Top(torch.tensor([[0.9, 0.5, 0.4, 0.3]]), torch.tensor([[1, 2, 7, 8]]))
    assert index.recall(found, exact) == 0.75
    assert index.recall(exact, exact) == 1.0
