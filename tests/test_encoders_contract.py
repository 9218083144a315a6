"""Every file in vlm/encoders and vlm/projectors keeps the contract; a new file is picked up by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from coretools import picture, shake
from torch import Tensor

from vlm.config import kinds, part
from vlm.encoders import EncoderOutput, feature_width
from vlm.transforms import ImageTransform

ENCODERS = kinds("vlm.encoders")
PROJECTORS = kinds("vlm.projectors")
each_encoder = pytest.mark.parametrize("kind", ENCODERS)
SIZES = [(70, 30), (25, 80), (40, 40)]


def build(kind: str) -> tuple[Any, torch.nn.Module, ImageTransform]:
    module = part("vlm.encoders", kind)
    config = module.tiny()
    tower = module.Encoder._from_config(config).eval()
    shake(tower)
    transform = module.transform(config)
    if transform.mode == "naflex":
        transform = replace(transform, max_num_patches=12)
    return config, tower, transform


def inputs(transform: ImageTransform, images: list) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    pixels = transform(images)
    tensors = {name: value for name, value in pixels._asdict().items() if isinstance(value, Tensor)}
    return tensors, pixels.grids


def test_the_known_kinds_are_found() -> None:
    assert {"siglip", "siglip2_naflex"} <= set(ENCODERS) and {"linear", "mlp"} <= set(PROJECTORS)
    for package, names in (("vlm.encoders", ENCODERS), ("vlm.projectors", PROJECTORS)):
        for name in names:
            assert "arXiv" in (part(package, name).__doc__ or ""), f"{name} names no paper"


@each_encoder
def test_output_shapes(kind: str) -> None:
    """float[M, P, E], bool[M, P] or None, int64[M, 2]; the grid is what the transform promised."""
    config, tower, transform = build(kind)
    tensors, grids = inputs(transform, [picture(i, size) for i, size in enumerate(SIZES)])
    out = tower(**tensors)
    assert isinstance(out, EncoderOutput)
    assert out.features.shape[0] == 3 and out.features.shape[2] == feature_width(config)
    assert out.grid.dtype == torch.int64 and [tuple(row) for row in out.grid.tolist()] == grids
    counts = out.grid.prod(1)
    assert out.features.shape[1] == int(counts.max()) <= transform.max_patches
    if out.mask is None:
        assert (counts == out.features.shape[1]).all()
    else:
        assert out.mask.dtype == torch.bool and out.mask.shape == out.features.shape[:2]
        assert torch.equal(out.mask.sum(1), counts)
    assert torch.isfinite(out.features).all()


@each_encoder
def test_each_image_alone_gives_the_same_features(kind: str) -> None:
    _, tower, transform = build(kind)
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    with torch.no_grad():
        together = tower(**inputs(transform, images)[0])
        for i, image in enumerate(images):
            alone = tower(**inputs(transform, [image])[0]).features[0]
            rows = slice(None) if together.mask is None else together.mask[i]
            assert torch.allclose(together.features[i][rows], alone, atol=1e-5)


@each_encoder
def test_gradient_reaches_every_parameter(kind: str) -> None:
    _, tower, transform = build(kind)
    out = tower(**inputs(transform, [picture(i, size) for i, size in enumerate(SIZES)])[0])
    weights = torch.randn(out.features.shape, generator=torch.Generator().manual_seed(0))
    (out.features * weights).sum().backward()
    for name, parameter in tower.named_parameters():
        if name.endswith(("k_proj.bias", "key.bias")):
            continue  # softmax ignores a constant added to every key's score: this gradient is zero by construction
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-6, name


@each_encoder
def test_rows_are_in_row_order(kind: str) -> None:
    """With attention's output projections at zero no patch sees another: brightening one moves its own row only."""
    _, tower, transform = build(kind)
    for name, parameter in tower.named_parameters():
        if any(word in name for word in ("out_proj", "o_proj", "attention.output.dense")):
            torch.nn.init.zeros_(parameter)
    tensors, grids = inputs(transform, [picture(3, (56, 56))])
    rows, columns = grids[0]
    values, side = tensors["pixel_values"], transform.patch_size
    with torch.no_grad():
        before = tower(**tensors).features[0]
        for row in range(rows):
            for column in range(columns):
                changed = values.clone()
                if changed.ndim == 3:
                    changed[0, row * columns + column] += 3
                else:
                    changed[0, :, row * side : (row + 1) * side, column * side : (column + 1) * side] += 3
                moved = (tower(**{**tensors, "pixel_values": changed}).features[0] - before).norm(dim=-1)
                assert int(moved.argmax()) == row * columns + column
                assert int((moved > 1e-4).sum()) == 1


@each_encoder
def test_padding_rows_do_not_matter(kind: str) -> None:
    """Where a tower marks padding, its content changes no real row."""
    _, tower, transform = build(kind)
    tensors, _ = inputs(transform, [picture(i, size) for i, size in enumerate([(70, 30), (14, 14 * 11)])])
    with torch.no_grad():
        before = tower(**tensors)
        if before.mask is None:
            assert tensors.keys() == {"pixel_values"}
            return
        mask = torch.nn.functional.pad(tensors["pixel_attention_mask"], (0, 3))
        values = torch.full((2, mask.shape[1], tensors["pixel_values"].shape[2]), 50.0)
        values[mask.bool()] = tensors["pixel_values"][tensors["pixel_attention_mask"].bool()]
        after = tower(**{**tensors, "pixel_values": values, "pixel_attention_mask": mask})
    assert not after.mask.all(1).any()
    assert torch.allclose(after.features[after.mask], before.features[before.mask], atol=1e-5)


@each_encoder
def test_bfloat16(kind: str) -> None:
    _, tower, transform = build(kind)
    tensors, _ = inputs(transform, [picture(1, (56, 56))])
    with torch.no_grad():
        full = tower(**tensors).features
        half = tower.to(torch.bfloat16)(**tensors).features
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.1 * full.std()
