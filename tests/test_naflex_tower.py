"""The packed NaFlex tower against transformers' padded one: values, gradients, and what padding may not do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from coretools import shake
from torch import Tensor
from transformers import Siglip2VisionModel

from vlm.encoders import siglip2_naflex
from vlm.encoders.siglip2_naflex import Encoder, Group, packing, portions

GRIDS = [(2, 8), (3, 4), (8, 2), (1, 5), (3, 4), (2, 6)]
"""Equal grids, equal lengths of different grids, and a length of its own; none of width 1, where transformers errs."""


def towers(attention: str = "sdpa", **settings: Any) -> tuple[Any, Any]:
    """Ours and transformers', with the same weights."""
    config = siglip2_naflex.tiny()
    config.update({"num_hidden_layers": 3, **settings})
    config._attn_implementation = attention
    ours = Encoder(config)
    shake(ours)
    theirs = Siglip2VisionModel._from_config(copy.deepcopy(config))
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def inputs(grids: list[tuple[int, int]] = GRIDS, extra: int = 2) -> dict[str, Tensor]:
    """Noise, in the padding rows too."""
    shapes = torch.tensor(grids)
    longest = int(shapes.prod(1).max()) + extra
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(len(grids), longest, 14 * 14 * 3, generator=generator)
    mask = (torch.arange(longest) < shapes.prod(1)[:, None]).long()
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("head", "together"), [(True, 2048), (False, 2048), (False, 30), (False, 1)])
def test_values_and_gradients_are_transformers(
    attention: str, head: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(siglip2_naflex, "CPU_PATCHES", together)
    ours, theirs = towers(attention, vision_use_head=head)
    batch, real = inputs(), inputs()["pixel_attention_mask"].bool()
    got, wanted = ours(**batch), theirs(**batch).last_hidden_state
    assert relative(got.features[real], wanted[real]) < 1e-5
    assert torch.equal(got.mask, real) and not got.features[~real].any()
    weights = torch.randn(wanted[real].shape, generator=torch.Generator().manual_seed(4))
    for values in (got.features, wanted):
        (values[real] * weights).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert set(found) == set(expected) and len(found) > 50
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # A key bias has no gradient but rounding, because softmax does not see it.
        scale = largest if name.endswith("k_proj.bias") else float(gradient.abs().max())
        assert (found[name] - gradient).abs().max() < 1e-5 * scale, name


def test_each_image_as_if_alone_in_the_order_given() -> None:
    ours, _ = towers()
    with torch.no_grad():
        together = ours(**inputs([*GRIDS, (6, 1)])).features
        batch = inputs([*GRIDS, (6, 1)])
        for i, grid in enumerate([*GRIDS, (6, 1)]):
            length = grid[0] * grid[1]
            alone = ours(batch["pixel_values"][i : i + 1, :length], torch.ones(1, length), torch.tensor([grid]))
            assert relative(together[i, :length], alone.features[0]) < 1e-5


def test_portions() -> None:
    assert portions([0, 2, 1], [4, 6, 4], 8) == [[0, 2], [1]]
    assert portions([1, 0], [9, 5], 8) == [[1], [0]] and portions([0, 1], [3, 5], 8) == [[0, 1]]


def test_packing() -> None:
    assert packing([4, 6, 4]) == ([0, 2, 1], [Group(0, 2, 4), Group(8, 1, 6)])
    assert packing([5]) == ([0], [Group(0, 1, 5)])


def test_only_real_patches_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every linear layer and sizes of every attention; one resize per different grid."""
    ours, _ = towers()
    rows: list[int] = []
    resized: list[tuple[int, int]] = []
    resize = siglip2_naflex.resize_position_grid

    def counted(table: Tensor, row_count: int, column_count: int) -> Tensor:
        resized.append((row_count, column_count))
        return resize(table, row_count, column_count)

    monkeypatch.setattr(siglip2_naflex, "resize_position_grid", counted)
    for module in ours.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[:-1].numel()))
    ours(**inputs())
    assert set(rows) == {sum(r * c for r, c in GRIDS)} and len(rows) > 20
    assert sorted(resized) == sorted(set(GRIDS))


def test_positions_follow_a_table_that_trains() -> None:
    ours, theirs = towers()
    batch, real = inputs(), inputs()["pixel_attention_mask"].bool()
    with torch.no_grad():
        before = ours(**batch).features
        for tower in (ours, theirs):
            tower.embeddings.position_embedding.weight.data.mul_(-2)
        after = ours(**batch).features
        assert relative(after[real], theirs(**batch).last_hidden_state[real]) < 1e-5
    assert (after - before).abs().max() > 0.1


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, _ = towers()
    saving = copy.deepcopy(plain)
    assert Encoder.supports_gradient_checkpointing
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    saving.encoder.layers[0].layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    for tower in (plain, saving):
        tower.train()
        tower(**inputs()).features.square().sum().backward()
    assert len(calls) == 2  # forward, and once more in backward
    for (name, wanted), got in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (wanted.grad is None) == (got.grad is None)
        assert wanted.grad is None or torch.equal(wanted.grad, got.grad), name


def test_bfloat16() -> None:
    ours, theirs = towers()
    batch, real = inputs(), inputs()["pixel_attention_mask"].bool()
    with torch.no_grad():
        wanted = ours(**batch).features[real]
        ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
        got = ours(**batch).features
        other = theirs(**batch).last_hidden_state[real]
    assert got.dtype == torch.bfloat16
    assert relative(got[real].float(), wanted) < 2 * max(relative(other.float(), wanted), 0.01)
