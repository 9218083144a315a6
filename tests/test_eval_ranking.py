"""Ranks and what is counted from them, against plain loops, hand-made tables and the rule of the reference code."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.errors import DataError
from vlm.eval.metrics.ranking import by_chance, median_rank, ranks, recall_at


def unit(rng: np.random.Generator, count: int, width: int = 8) -> np.ndarray:
    vectors = rng.normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pairs(owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image i and its texts, as (image, text)."""
    return owner, np.arange(len(owner))


def by_loops(queries: np.ndarray, candidates: np.ndarray, own: list[set[int]]) -> list[int]:
    found = []
    for query, mine in zip(queries, own, strict=True):
        alike = [float(np.dot(query.astype(np.float64), one.astype(np.float64))) for one in candidates]
        best = max(alike[i] for i in mine)
        found.append(1 + sum(alike[i] >= best - 1e-12 for i in range(len(candidates)) if i not in mine))
    return found


def reference_recall(alike: np.ndarray, owner: np.ndarray, k: int) -> tuple[float, float]:
    """Text to image and image to text as big_vision's evaluator defines them: sort, cut, look for any own one."""
    distance = -alike  # [images, texts]
    text_to_image = (distance.argsort(axis=0)[:k] == owner[None]).any(axis=0).mean()
    image_to_text = (owner[distance.argsort(axis=1)[:, :k]] == np.arange(len(alike))[:, None]).any(axis=1).mean()
    return float(text_to_image), float(image_to_text)


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
def test_ranks_are_those_of_plain_loops_in_blocks_of_any_size(at_once: int) -> None:
    rng = np.random.default_rng(0)
    images, owner = unit(rng, 17), np.sort(rng.permutation(np.arange(60) % 17))
    texts = unit(rng, 60)
    both = pairs(owner)
    t2i = ranks(texts, images, (both[1], both[0]), at_once=at_once)
    i2t = ranks(images, texts, both, at_once=at_once)
    assert t2i.ranks.tolist() == by_loops(texts, images, [{int(one)} for one in owner])
    assert i2t.ranks.tolist() == by_loops(images, texts, [set(np.flatnonzero(owner == i).tolist()) for i in range(17)])
    assert t2i.first.tolist() == (texts.astype(float) @ images.astype(float).T).argmax(1).tolist()


def test_without_ties_recall_is_that_of_the_reference_code() -> None:
    rng = np.random.default_rng(1)
    images, owner = unit(rng, 40), np.repeat(np.arange(40), 5)
    texts = unit(rng, 200) * 0.3 + images[owner]
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    both = pairs(owner)
    t2i, i2t = ranks(texts, images, (both[1], both[0])), ranks(images, texts, both)
    for k in (1, 5, 10):
        expected = reference_recall(images.astype(float) @ texts.astype(float).T, owner, k)
        ours = [
            recall_at("r", dict(zip(map(str, range(len(one.ranks))), one.ranks, strict=True)), k).value
            for one in (t2i, i2t)
        ]
        assert ours == pytest.approx(expected) and expected[0] > 0.1


def test_a_hand_made_table() -> None:
    """Three images, five captions; similarities written down, ranks counted by hand.

    image 0 owns captions 0 and 1, image 1 owns 2, image 2 owns 3 and 4.
    """
    alike = np.array([[0.9, 0.1, 0.95, 0.2, 0.0], [0.3, 0.2, 0.5, 0.5, 0.4], [0.1, 0.1, 0.1, 0.7, 0.8]])
    owner = np.array([0, 0, 1, 2, 2])
    basis = np.eye(3, dtype=np.float32)
    texts = alike.T.astype(np.float32)
    both = pairs(owner)
    # Image 0: caption 2 (0.95) stands before its best (0.9): rank 2. Image 1: caption 3 ties with its own: 2.
    # Image 2: its own two are first, and the second never stands in the way of the first: 1.
    assert ranks(basis, texts, both).ranks.tolist() == [2, 2, 1]
    # Captions: 0 finds image 0; 1 has 0.2 for image 1 first, then 0.1 twice, a tie: 3; 2 has 0.95 for image 0: 2;
    # 3 is image 2's with 0.7: 1; 4: 1.
    assert ranks(texts, basis, (both[1], both[0])).ranks.tolist() == [1, 3, 2, 1, 1]
    found = dict(zip("abc", [2, 2, 1], strict=True))
    assert recall_at("r", found, 1).value == pytest.approx(1 / 3) and recall_at("r", found, 2).value == 1.0
    assert median_rank("m", found).value == 2.0 and not median_rank("m", found).higher_is_better


def test_a_model_that_sees_nothing_finds_nothing() -> None:
    """All vectors the same: a sort would find item 0 for the first query, and more with data in a lucky order."""
    same = np.tile(unit(np.random.default_rng(2), 1), (6, 1))
    found = ranks(same, same, (np.arange(6), np.arange(6)))
    assert found.ranks.tolist() == [6] * 6


def test_equal_vectors_tie_wherever_they_stand() -> None:
    rng = np.random.default_rng(3)
    for count in (3, 17, 129, 1000):
        candidates = unit(rng, count, 1152)
        candidates[-1] = candidates[0]
        found = ranks(candidates, candidates, (np.arange(count), np.arange(count)))
        assert found.ranks[0] == found.ranks[-1] == 2 and (found.ranks[1:-1] == 1).all()


def test_shuffled_pairs_are_at_chance() -> None:
    rng = np.random.default_rng(4)
    images, owner = unit(rng, 200, 64), np.repeat(np.arange(200), 5)
    texts = images[owner]
    turned = (owner + 7) % 200
    right = ranks(texts, images, (np.arange(1000), owner)).ranks
    wrong = ranks(texts, images, (np.arange(1000), turned)).ranks
    assert (right == 1).all() and (wrong <= 10).mean() < 3 * by_chance(200, np.ones(1000, int), 10)


def test_chance_is_that_of_random_orders() -> None:
    rng = np.random.default_rng(5)
    own = np.array([1, 3])
    drawn = np.array([[(rng.permutation(20)[:5] < m).any() for m in own] for _ in range(20_000)])
    assert by_chance(20, own, 5) == pytest.approx(drawn.mean(), abs=0.01)
    assert by_chance(4, own, 10) == 1.0


def test_what_is_no_vector_ranks_last_and_stands_in_nobodys_way() -> None:
    rng = np.random.default_rng(6)
    images, texts = unit(rng, 4), unit(rng, 4)
    there = np.array([True, False, True, True])
    images[1] = np.nan
    one_to_one = (np.arange(4), np.arange(4))
    t2i = ranks(texts, images, one_to_one, usable=(None, there))
    others = ranks(texts[there], images[there], (np.arange(3), np.arange(3)))
    assert t2i.ranks[there].tolist() == others.ranks.tolist() and t2i.ranks[1] == 4
    i2t = ranks(images, texts, one_to_one, usable=(there, None))
    assert i2t.ranks[1] == 4 and i2t.first[1] == -1


def test_refused() -> None:
    one = np.ones((2, 3), np.float32)
    with pytest.raises(DataError, match="1 of 2 queries have no candidate"):
        ranks(one, one, (np.array([0]), np.array([0])))
    with pytest.raises(DataError, match="1 of 2 vectors hold NaN"):
        ranks(one, np.array([[1, 1, 1], [np.nan, 1, 1]]), (np.arange(2), np.arange(2)))
