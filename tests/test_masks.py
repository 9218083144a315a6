"""The masks against truth tables of digits, and against a rule written out with loops."""

import inspect
import re

import pytest
import torch

from vlm.model import masks


def table(text: str) -> torch.Tensor:
    """`"1 0 / 1 1"` -> bool[2, 2]."""
    return torch.tensor([[bool(int(digit)) for digit in row.split()] for row in text.strip().split("/")])


def ids(text: str) -> torch.Tensor:
    return torch.tensor([[int(word) for word in text.split()]])


TABLES = {
    "prefix and suffix": ("1 1 1 1", "0 0 1 1", None, "1 1 0 0 / 1 1 0 0 / 1 1 1 0 / 1 1 1 1"),
    "padding right": (
        "1 1 1 1 0",
        "0 0 1 1 0",
        None,
        "1 1 0 0 0 / 1 1 0 0 0 / 1 1 1 0 0 / 1 1 1 1 0 / 0 0 0 0 1",
    ),
    "padding left": (
        "0 1 1 1 1",
        "0 0 0 1 1",
        None,
        "1 0 0 0 0 / 0 1 1 0 0 / 0 1 1 0 0 / 0 1 1 1 0 / 0 1 1 1 1",
    ),
    "packed": ("1 1 1 1", "0 1 0 1", "0 0 1 1", "1 0 0 0 / 1 1 0 0 / 0 0 1 0 / 0 0 1 1"),
    "pure causal": ("1 1 1", "1 1 1", None, "1 0 0 / 1 1 0 / 1 1 1"),
    "pure prefix": ("1 1 1", "0 0 0", None, "1 1 1 / 1 1 1 / 1 1 1"),
    "packed, then padding": (
        "1 1 1 1 1 0",
        "0 0 1 0 1 0",
        "0 0 0 1 1 -1",
        "1 1 0 0 0 0 / 1 1 0 0 0 0 / 1 1 1 0 0 0 / 0 0 0 1 0 0 / 0 0 0 1 1 0 / 0 0 0 0 0 1",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_truth_table(name: str) -> None:
    attention, types, sequences, expected = TABLES[name]
    sequence_ids = None if sequences is None else ids(sequences)
    got = masks.prefix_lm_mask(ids(attention), ids(types), sequence_ids)
    assert torch.equal(got[0], table(expected)), got[0].int()


def test_the_documented_tables_are_the_tested_ones() -> None:
    """The digits of the module's docstring, side-by-side tables included, are those above."""
    doc = inspect.getdoc(masks) or ""
    blocks = re.findall(r"(?:^ {4}[01 ]+\n)+", doc + "\n", flags=re.MULTILINE)
    found = []
    for block in blocks:
        columns = [re.split(r" {3,}", line.strip()) for line in block.splitlines()]
        found += [" / ".join(column) for column in zip(*columns, strict=True)]
    assert found == [TABLES[name][3] for name in ("prefix and suffix", "padding right", "padding left", "packed")]


def rule(
    attention: list[int], types: list[int], sequences: list[int], window: int | None, query: int, key: int
) -> bool:
    """Who sees whom, in words: one token at a time."""
    if not attention[query] or not attention[key]:
        return query == key and not attention[query]
    if sequences[query] != sequences[key]:
        return False
    if types[query] == 0 and types[key] == 0:
        return True
    return key <= query and (window is None or query - key < window)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_mask_equals_the_rule_on_random_batches(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        length = 9
        attention = [1] * length
        left = bool(torch.randint(0, 2, (1,), generator=generator))
        for i in range(int(torch.randint(0, 4, (1,), generator=generator))):
            attention[i if left else -1 - i] = 0
        cut = int(torch.randint(1, length, (1,), generator=generator))
        sequences = [0] * cut + [1] * (length - cut)
        types = []
        for part in (cut, length - cut):
            prefix = int(torch.randint(0, part + 1, (1,), generator=generator))
            types += [0] * prefix + [1] * (part - prefix)
        got = masks.prefix_lm_mask(
            torch.tensor([attention]), torch.tensor([types]), torch.tensor([sequences]), window=window
        )
        for query in range(length):
            for key in range(length):
                assert got[0, query, key] == rule(attention, types, sequences, window, query, key), (query, key)


def test_decode_mask_is_the_end_of_the_whole_mask() -> None:
    """Decoding sees what the same queries would see in one forward over everything."""
    attention = ids("0 0 1 1 1 1 1 1")
    types = ids("0 0 0 0 1 1 1 1")
    for window in (None, 2, 3):
        whole = masks.prefix_lm_mask(attention, types, window=window)
        for queries in (1, 2, 4):
            got = masks.decode_mask(attention, queries, 8, window=window)
            assert torch.equal(got, whole[:, -queries:]), (window, queries)
    dropped = masks.decode_mask(attention, 1, 3, first_key=5, window=3)
    assert torch.equal(dropped, masks.prefix_lm_mask(attention, types, window=3)[:, -1:, 5:])


def test_decode_mask_hides_unwritten_slots() -> None:
    got = masks.decode_mask(ids("0 1 1"), 1, 6)
    assert got.int().tolist() == [[[0, 1, 1, 0, 0, 0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_is_finite_and_zero_where_allowed(dtype: torch.dtype) -> None:
    allowed = table("1 0 / 1 1")[None]
    got = masks.additive(allowed, dtype)
    assert got.shape == (1, 1, 2, 2) and got.dtype == dtype
    assert torch.isfinite(got).all()
    assert torch.equal(got[:, 0] == 0, allowed)
    assert (got[:, 0][~allowed] < -1e4).all()


@pytest.mark.parametrize(
    ("attention", "sequences", "expected"),
    [
        ("1 1 1 0 0", None, "0 1 2 0 0"),
        ("0 0 1 1 1", None, "0 0 0 1 2"),
        ("1 1 1 1 1", "0 0 0 1 1", "0 1 2 0 1"),
        ("1 1 1 1 0", "0 1 1 2 -1", "0 0 1 0 0"),
        ("0 1 1 1 1", "-1 0 0 1 1", "0 0 1 0 1"),
    ],
)
def test_position_ids(attention: str, sequences: str | None, expected: str) -> None:
    got = masks.position_ids(ids(attention), None if sequences is None else ids(sequences))
    assert torch.equal(got, ids(expected)), got
