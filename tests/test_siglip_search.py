"""Exact search: the result is that of the true inner products, whatever the blocks, the batch and the arithmetic.

The truth is numpy's product in float64 of the stored values, rounded to float32, sorted by score and then by row; the
second opinion is FAISS, where it is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm.errors import ConfigError, DataError
from vlm.siglip.search import exact, filters, fusion, screen
from vlm.siglip.search.exact import Exact, top

WIDTH = 40


def vectors(rows: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def truth(stored: Tensor, queries: Tensor, k: int, allowed: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.numpy().astype(np.float64) @ stored.numpy().astype(np.float64).T).astype(np.float32)
    rows = np.arange(len(stored)) if allowed is None else np.flatnonzero(allowed.numpy())
    order = np.stack([rows[np.lexsort((rows, -line[rows]))[:k]] for line in scores])
    return np.take_along_axis(scores, order, axis=1), order


@pytest.fixture(params=[7, 1 << 20], ids=["small blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(exact, "VALUES", request.param * WIDTH if request.param < 100 else request.param)
    monkeypatch.setattr(exact, "VALUES_AS_STORED", request.param * WIDTH if request.param < 100 else request.param)
    monkeypatch.setattr(exact, "PILED", 50)
    monkeypatch.setattr(exact, "SETTLED", 9)
    monkeypatch.setattr(exact, "QUERIES", 4)
    yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("queries", [1, 2, 11])
@pytest.mark.parametrize("share", [None, 0.5, 0.02])
@pytest.mark.usefixtures("blocks")
def test_the_best_rows_are_those_of_the_true_products(dtype: torch.dtype, queries: int, share: float | None) -> None:
    stored, asked = vectors(600).to(dtype), vectors(queries, seed=1)
    allowed = None if share is None else torch.rand(600, generator=torch.Generator().manual_seed(2)) < share
    scores, rows = truth(stored, asked, 10, allowed)
    found = top(stored.split([100, 0, 350, 150]), asked, 10, allowed)
    assert found.scores.dtype == torch.float32 and found.rows.dtype == torch.int64
    np.testing.assert_array_equal(found.rows.numpy(), rows)
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("ascending", [False, True])
def test_scores_that_lie_closer_than_float16_can_tell_are_told_apart(queries: int, ascending: bool) -> None:
    # Float16 scores near 1 are 0.0005 apart, and these only 0.0000001: the first pass alone would mix them up.
    stored = torch.zeros(500, WIDTH, dtype=torch.float16)
    stored[:, 0] = 1.0
    stored[:, 1] = torch.arange(500, dtype=torch.float16)
    stored = stored if ascending else stored.flip(0)
    asked = torch.zeros(queries, WIDTH)
    asked[:, 0], asked[:, 1] = 1.0, 2.0**-23
    found = top([stored], asked, 5)
    expected = [499, 498, 497, 496, 495] if ascending else [0, 1, 2, 3, 4]
    assert found.rows.tolist() == [expected] * queries
    assert found.scores[0].tolist() == [1 + (499 - i) * 2.0**-23 for i in range(5)]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("queries", [1, 5])
def test_of_equal_vectors_the_lower_row_comes_first(dtype: torch.dtype, queries: int) -> None:
    stored = vectors(300).to(dtype)
    same = [3, 50, 51, 120, 222, 299]
    stored[same] = stored[77].clone()
    found = top(stored.split(90), stored[77].float().expand(queries, -1), 5)
    assert found.rows.tolist() == [[3, 50, 51, 77, 120]] * queries
    assert all(len(set(line)) == 1 for line in found.scores.tolist())


@pytest.mark.usefixtures("blocks")
def test_a_batch_gives_what_each_query_gives_alone() -> None:
    stored, asked = vectors(400).half(), vectors(9, seed=3)
    whole, search = Exact(stored.split(64)).top(asked, 12), Exact([stored])
    for i in range(9):
        alone = search.top(asked[i : i + 1], 12)
        assert torch.equal(alone.scores[0], whole.scores[i]) and torch.equal(alone.rows[0], whole.rows[i])


def test_fewer_rows_than_k_are_fewer_results() -> None:
    stored, asked = vectors(4).half(), vectors(3, seed=1)
    for shards, allowed, most in (
        ([stored], None, 4),
        ([stored], torch.tensor([False, True, False, True]), 2),
        ([stored], torch.zeros(4, dtype=torch.bool), 0),
        ([stored[:0]], None, 0),
        ([], None, 0),
    ):
        found = top(shards, asked, 10, allowed)
        assert found.scores.shape == found.rows.shape == (3, most)
        may = range(4) if allowed is None else allowed.nonzero()[:, 0].tolist()
        assert all(sorted(line) == sorted(may)[:most] for line in found.rows.tolist())
    assert top([stored], asked[:0], 10).rows.shape == (0, 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_vectors_and_queries_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    stored, asked = vectors(50).to(dtype), vectors(3, seed=1)
    stored[31, 5] = value
    with pytest.raises(DataError, match="vector 31 is not finite"):
        top(stored.split(20), asked, 5)
    asked[1, 0] = value
    with pytest.raises(ConfigError, match="query 1 has NaN or infinity"):
        top([vectors(50)], asked, 5)


def test_long_vectors_are_searched_in_float32() -> None:
    stored, asked = (vectors(200) * 3000).half(), vectors(1, seed=1) * 3000  # products overflow float16
    np.testing.assert_array_equal(top([stored], asked, 9).rows.numpy(), truth(stored, asked, 9)[1])


@pytest.mark.parametrize("queries", [1, 5])
def test_arithmetic_that_torch_was_allowed_to_hasten_changes_nothing(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hastened(self: screen.Float32, block: Tensor) -> Tensor:
        return (block.bfloat16() @ self.queries.bfloat16().T).float()

    mkldnn: Any = torch.backends.mkldnn
    assert mkldnn.matmul.fp32_precision == "none"
    stored, asked = vectors(3000).half(), vectors(queries, seed=1)
    before = top([stored], asked, 10)
    monkeypatch.setattr(exact, "sums_in_float16", lambda: True)
    monkeypatch.setattr(screen.Float32, "__call__", hastened)
    mkldnn.matmul.fp32_precision = "bf16"  # no plain attribute: monkeypatch cannot take it back
    try:
        after = top([stored], asked, 10)
    finally:
        mkldnn.matmul.fp32_precision = "none"
    assert torch.equal(before.scores, after.scores) and torch.equal(before.rows, after.rows)


def test_a_cpu_that_sums_float16_in_float16_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(self: screen.AsStored, block: Tensor) -> Tensor:
        return block.float() @ self.queries.T + 0.1 * (torch.arange(len(block)) % 3)[:, None]

    stored, asked = vectors(3000).half(), vectors(1, seed=1)
    before = top([stored], asked, 10)
    monkeypatch.setattr(screen.AsStored, "__call__", coarse)
    after = top([stored], asked, 10)
    assert torch.equal(before.scores, after.scores) and torch.equal(before.rows, after.rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("queries", [1, 50])
def test_faiss_finds_the_same_rows(dtype: torch.dtype, queries: int) -> None:
    faiss = pytest.importorskip("faiss")
    stored, asked = vectors(5000, width=384).to(dtype), vectors(queries, seed=1, width=384)
    index = faiss.IndexFlatIP(384)
    index.add(stored.float().numpy())
    scores, rows = index.search(asked.numpy(), 10)
    found = top(stored.split(777), asked, 10)
    np.testing.assert_array_equal(found.rows.numpy(), rows)
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=0, atol=1e-6)


def test_what_is_no_search_is_refused() -> None:
    stored, asked = vectors(5), vectors(2)
    for shards, queries, k, allowed, message in (
        ([stored], asked[:, :7], 3, None, r"queries of shape \(2, 7\).*expected \[Q, 40\]"),
        ([stored], asked[0], 3, None, r"queries of shape \(40,\)"),
        ([stored], asked, 0, None, "k is 0"),
        ([stored], asked, 3, torch.ones(4, dtype=torch.bool), r"bool of \[5\]"),
        ([stored], asked, 3, torch.ones(5), r"bool of \[5\]"),
        ([stored, stored[:, :8]], asked, 3, None, "shard 1 has vectors of 8 values, shard 0 of 40"),
        ([stored.double()], asked, 3, None, "shard 0 .* is torch.float64"),
        ([stored[0]], asked, 3, None, "shard 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            top(shards, queries, k, allowed)


# --- several rankings as one ------------------------------------------------------------------------------------------


def test_fused_ranks_are_those_of_the_papers_formula() -> None:
    # 7 is second of both: 2/62; 5 is first and fourth: 1/61 + 1/64; 9 is third and first: 1/63 + 1/61.
    found = fusion.fused([[5, 7, 9], [9, 7, 2, 5]])
    assert [row for row, _ in found] == [9, 7, 5, 2]
    scores = [1 / 63 + 1 / 61, 2 / 62, 1 / 61 + 1 / 64, 1 / 63]
    assert [score for _, score in found] == pytest.approx(scores, abs=1e-15)
    assert fusion.fused([[5, 7, 9], [9, 7, 2, 5]], 2) == found[:2]
    assert fusion.fused([[9, 7, 2, 5], [5, 7, 9]]) == found


def test_equal_fused_scores_go_by_row_and_a_row_counts_once() -> None:
    assert [row for row, _ in fusion.fused([[8, 1], [1, 8]])] == [1, 8]
    assert fusion.fused([]) == [] and fusion.fused([[], [3]]) == [(3, 1 / 61)]
    with pytest.raises(ConfigError, match="ranking 1 has a row twice"):
        fusion.fused([[1], [2, 2]])


# --- which rows may be found ------------------------------------------------------------------------------------------

INFO = [
    {"split": "train", "year": 2019, "score": 0.5, "tags": ["cat", "dog"], "ok": True, "size": {"w": 10}},
    {"split": "test", "year": 2020, "tags": [], "ok": False, "size.w": 11},
    {"split": "Test", "year": 2020.0, "tags": "cat", "ok": None, "size": {"w": [10, 12]}},
    {},
]


@pytest.mark.parametrize(
    ("texts", "rows"),
    [
        ([], [0, 1, 2, 3]),
        (["split=test"], [1]),
        (["split=test", "split=train"], [0, 1]),
        (["split=test", "year=2019"], []),
        (["year=2020"], [1, 2]),
        (["year=2020.0"], [1, 2]),
        (["score=.5"], [0]),
        (["year=nan"], []),
        (["year=x"], []),
        (["ok=true"], [0]),
        (["ok=True"], []),
        (["ok=1"], []),
        (["ok=null"], [2]),
        (["tags=cat"], [0, 2]),
        (["tags=dog"], [0]),
        (["tags="], []),
        (["size.w=10"], [0, 2]),
        (["size.w=11"], [1]),
        (["split=a=b"], []),
    ],
)
def test_filters_hold_by_value(texts: list[str], rows: list[int]) -> None:
    assert filters.allowed(INFO, filters.parse(texts)).nonzero()[:, 0].tolist() == rows


def test_a_filter_that_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"filter 'splt': no entry has this key \(did you mean 'split'\?\)"):
        filters.allowed(INFO, filters.parse(["splt=test"]))
    with pytest.raises(ConfigError, match="they have no metadata"):
        filters.allowed([{}], filters.parse(["split=test"]))
    for text in ("split", "=test", ""):
        with pytest.raises(ConfigError, match="expected key=value"):
            filters.parse([text])
