"""Who sees whom, found out by changing an input and watching the logits: decoders x attention backends x padding
sides x mixed prefix lengths x packing. Sequences are longer than the small sliding windows."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from coretools import CASES, IMAGE_TOKENS, Case, Sample, each_case, lay_out, logits, loud, sample, shake, some_ids, span

from vlm.build.presets import tiny
from vlm.errors import ConfigError

SAME = 2e-5
"""Rounding: no information has passed."""
MOVED = 1e-3
"""A visible effect."""
each_side = pytest.mark.parametrize("side", ["right", "left"])

# Prefixes of 5, 9 and 2 tokens after 4 image tokens or none; the first row has packed samples.
PLAIN = [[sample(5, 12, 1)], [sample(9, 3, 2)], [sample(2, 7, 3, image=False)]]
PACKED = [[sample(3, 6, 4), sample(6, 9, 5), sample(4, 5, 6, image=False)], [sample(9, 11, 7)]]
LAYOUTS = {"plain": PLAIN, "packed": PACKED}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """float[B, S]: how far each position's logits moved."""
    return (before - after).abs().amax(-1)


def other(token: int) -> int:
    return 10 + (token + 97) % 240


@each_layout
@each_side
@each_case
def test_no_leak_from_the_future(case: Case, side: str, layout: str) -> None:
    """A changed suffix token moves its own logits and later ones of its sample only."""
    model, _ = case.model()
    rows = LAYOUTS[layout]
    batch = lay_out(model, rows, side)
    before = logits(model, batch)
    for row, line in enumerate(rows):
        for index, item in enumerate(line):
            where = span(rows, row, index, side)
            first = where.stop - len(item.suffix)
            for position in {first, (first + where.stop) // 2, where.stop - 1}:
                ids = batch["input_ids"].clone()
                ids[row, position] = other(int(ids[row, position]))
                change = moved(before, logits(model, {**batch, "input_ids": ids}))
                assert change[row, position] > MOVED
                change[row, position : where.stop] = 0
                assert change.max() < SAME, (row, index, position)


@each_layout
@each_side
@each_case
def test_prefix_sees_itself_in_both_directions(case: Case, side: str, layout: str) -> None:
    """The last prefix token moves the logits at the first position of its sample, whatever the window."""
    model, _ = case.model()
    rows = LAYOUTS[layout]
    batch = lay_out(model, rows, side)
    before = logits(model, batch)
    for row, line in enumerate(rows):
        for index, item in enumerate(line):
            where = span(rows, row, index, side)
            last = where.stop - len(item.suffix) - 1
            ids = batch["input_ids"].clone()
            ids[row, last] = other(int(ids[row, last]))
            change = moved(before, logits(model, {**batch, "input_ids": ids}))
            assert (change[row, where] > MOVED / 10).all(), change[row, where]
            change[row, where] = 0
            assert change.max() < SAME


@each_side
@each_case
def test_the_image_reaches_its_own_sample_only(case: Case, side: str) -> None:
    model, _ = case.model()
    batch = lay_out(model, PACKED, side)
    before = logits(model, batch)
    for image, (row, index) in enumerate([(0, 0), (0, 1), (1, 0)]):
        pixels = batch["pixel_values"].clone()
        pixels[image] = -pixels[image]
        change = moved(before, logits(model, {**batch, "pixel_values": pixels}))
        where = span(PACKED, row, index, side)
        assert (change[row, where] > MOVED / 10).all()
        change[row, where] = 0
        assert change.max() < SAME


@each_layout
@each_side
@each_case
def test_padding_content_is_irrelevant(case: Case, side: str, layout: str) -> None:
    """Ids, token types, positions and sequence ids under the padding change nothing at real tokens."""
    model, _ = case.model()
    batch = lay_out(model, LAYOUTS[layout], side)
    real = batch["attention_mask"].bool()
    assert not real.all()
    before = logits(model, batch)
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][~real] = 77
    changed["token_type_ids"][~real] = 1
    changed["position_ids"][~real] = 3
    if "sequence_ids" in changed:
        changed["sequence_ids"][~real] = 0
    after = logits(model, changed)
    assert torch.isfinite(after).all()
    assert moved(before, after)[real].max() < SAME


@each_layout
@each_case
def test_padding_side_is_irrelevant(case: Case, layout: str) -> None:
    model, _ = case.model()
    rows = LAYOUTS[layout]
    right, left = (logits(model, lay_out(model, rows, side)) for side in ("right", "left"))
    for row in range(len(rows)):
        for index in range(len(rows[row])):
            a, b = right[row, span(rows, row, index)], left[row, span(rows, row, index, "left")]
            assert (a - b).abs().max() < SAME


@each_side
@each_case
def test_batch_of_k_is_k_batches_of_one(case: Case, side: str) -> None:
    model, _ = case.model()
    whole = logits(model, lay_out(model, PLAIN, side))
    for row, line in enumerate(PLAIN):
        alone = logits(model, lay_out(model, [line]))
        assert (whole[row, span(PLAIN, row, 0, side)] - alone[0]).abs().max() < SAME


@each_side
@each_case
def test_packed_samples_do_not_see_each_other(case: Case, side: str) -> None:
    """Each packed sample's logits are those of the sample alone, and stay when a neighbour changes."""
    model, _ = case.model()
    whole = logits(model, lay_out(model, PACKED, side))
    for row, line in enumerate(PACKED):
        for index, item in enumerate(line):
            alone = logits(model, lay_out(model, [[item]]))
            assert (whole[row, span(PACKED, row, index, side)] - alone[0]).abs().max() < SAME, (row, index)
    for index in range(3):
        neighbour = PACKED[0][index]
        changed_line = list(PACKED[0])
        changed_line[index] = replace(
            neighbour,
            prefix=some_ids(len(neighbour.prefix), 50),
            suffix=some_ids(len(neighbour.suffix), 51),
            image=None if neighbour.image is None else 52,
        )
        change = moved(whole, logits(model, lay_out(model, [changed_line, PACKED[1]], side)))
        where = span(PACKED, 0, index, side)
        assert change[0, where].max() > MOVED
        change[0, where] = 0
        assert change.max() < SAME, index


@each_case
def test_position_ids_default_to_counting_real_tokens(case: Case) -> None:
    model, _ = case.model()
    for rows in (PLAIN, PACKED):
        batch = lay_out(model, rows, "left")
        given = logits(model, batch)
        del batch["position_ids"]
        real = batch["attention_mask"].bool()
        assert moved(given, logits(model, batch))[real].max() < SAME


@each_case
def test_loss_does_not_see_the_rest_of_the_batch(case: Case) -> None:
    """Packed or padded, the sum of the samples' losses is the loss of the batch."""
    model, _ = case.model()
    total = sum(model(**lay_out(model, [[item]], labels=True)).loss_sum for line in PACKED for item in line)
    assert torch.allclose(model(**lay_out(model, PACKED, labels=True)).loss_sum, total, rtol=1e-5)
    apart = [[item] for line in PACKED for item in line]
    for side in ("right", "left"):
        assert torch.allclose(model(**lay_out(model, apart, side, labels=True)).loss_sum, total, rtol=1e-5)


@pytest.mark.parametrize("decoder", ["gemma2", "gemma3_text"])
def test_sliding_window_edges(decoder: str) -> None:
    """One sliding layer of window 8: a suffix query sees the 8 keys that end with itself; the prefix is exempt."""
    window = 8
    model, _ = tiny(
        decoder=decoder, num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=window, seed=3
    )
    shake(model)
    rows = [[Sample(some_ids(12, 1), some_ids(14, 2))]]
    batch = lay_out(model, rows)
    before = logits(model, batch)
    for key in (0, 4, 11, 14, 20):
        ids = batch["input_ids"].clone()
        ids[0, key] = other(int(ids[0, key]))
        change = moved(before, logits(model, {**batch, "input_ids": ids}))[0]
        seen_by = [q for q in range(26) if (q < 12 and key < 12) or (key <= q < key + window)]
        for query in range(26):
            if query in seen_by:
                assert change[query] > MOVED / 10, (key, query)
            else:
                assert change[query] < SAME, (key, query)


def test_backends_agree() -> None:
    """sdpa and eager give the same logits on every layout."""
    for decoder in ("gemma", "gemma3_text"):
        models = [case.model()[0] for case in CASES if case.decoder == decoder]
        for rows in (PLAIN, PACKED):
            one, two = (logits(model, lay_out(model, rows)) for model in models)
            real = lay_out(models[0], rows)["attention_mask"].bool()
            assert moved(one, two)[real].max() < SAME


def test_sdpa_is_refused_where_it_would_drop_the_soft_cap() -> None:
    model, _ = tiny(decoder="gemma2")
    for wanted in ("sdpa", {"text_config": "sdpa"}, {"": "sdpa"}, "flash_attention_2"):
        with pytest.raises(ConfigError, match="soft-cap of 50"):
            model.set_attn_implementation(wanted)
    assert model.model.language_model.config._attn_implementation == "eager"
    model.set_attn_implementation({"vision_config": "sdpa"})


def test_the_attention_soft_cap_matters() -> None:
    """Guards the refusal above: with these weights a dropped cap would show."""
    capped, _ = loud("siglip", "gemma2", "eager", sliding_window=8)
    free = copy.deepcopy(capped)
    for layer in free.model.language_model.layers:
        layer.self_attn.attn_logit_softcapping = None
    batch = lay_out(capped, PLAIN)
    assert moved(logits(capped, batch), logits(free, batch)).max() > SAME


@pytest.mark.parametrize("decoder", ["gemma", "gemma2", "gemma3_text"])
def test_bfloat16_has_the_same_mask(decoder: str) -> None:
    """In bfloat16 too a future token and padding change nothing at all, bit for bit."""
    model = copy.deepcopy(loud("siglip", decoder)[0]).bfloat16()
    batch = lay_out(model, PLAIN)
    real = batch["attention_mask"].bool()
    before = logits(model, batch)
    ids = batch["input_ids"].clone()
    ids[~real] = 77
    ids[0, -1] = other(int(ids[0, -1]))
    change = moved(before, logits(model, {**batch, "input_ids": ids}))
    assert change[0, -1] > 0
    change[0, -1] = 0
    assert change[real].max() == 0


def test_rows_hold_what_the_tests_assume() -> None:
    """The layouts mix prefix lengths, exceed the window of 8, and hold images."""
    assert len({len(line[0].prefix) for line in PLAIN}) == 3
    assert max(len(item.ids(0)) for line in PACKED for item in line) > 2 * 8
    assert lay_out(loud("siglip", "gemma")[0], PACKED)["pixel_values"].shape[0] == 3
    assert IMAGE_TOKENS == 4
