"""NaFlex end to end: the grid rule, the position grid's resize, pad rows, mixed aspect ratios."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from coretools import loud, picture, shake
from torch import Tensor
from transformers import Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

import vlm
from vlm.build.presets import tiny_decoder
from vlm.encoders import siglip2_naflex
from vlm.errors import ConfigError
from vlm.images.patches import resize_float
from vlm.images.transforms import ImageTransform, naflex_grid

WIDE, TALL, SQUARE = (90, 20), (25, 80), (40, 40)


@pytest.mark.parametrize(
    ("height", "width", "budget", "grid"),
    [
        (480, 640, 64, (7, 9)),
        (480, 640, 256, (14, 18)),
        (480, 640, 576, (21, 27)),
        (480, 640, 784, (24, 32)),
        (480, 640, 1024, (27, 36)),
        (1080, 1920, 256, (12, 21)),
        (1080, 1920, 1024, (24, 42)),
        (224, 224, 256, (16, 16)),
        (100, 1000, 256, (5, 50)),
        (1, 1, 256, (7, 7)),
    ],
)
def test_published_grids(height: int, width: int, budget: int, grid: tuple[int, int]) -> None:
    assert naflex_grid(height, width, 16, budget) == grid


def test_grid_equals_transformers_on_random_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        height, width = (int(2 ** (torch.rand(1, generator=generator) * 11)) for _ in range(2))
        budget = int(torch.randint(1, 1025, (1,), generator=generator))
        patch = (14, 16, 32)[int(torch.randint(0, 3, (1,), generator=generator))]
        theirs = get_image_size_for_max_num_patches(height, width, patch, budget)
        ours = naflex_grid(height, width, patch, budget)
        assert tuple(side * patch for side in ours) == tuple(theirs), (height, width, patch, budget)
        assert 1 <= math.prod(ours) <= budget


def test_extreme_grids_fit_the_budget() -> None:
    for height, width in ((1, 100_000), (100_000, 1), (1, 3)):
        for budget in (1, 2, 64):
            rows, columns = naflex_grid(height, width, 16, budget)
            assert rows >= 1 and columns >= 1 and rows * columns <= budget
    with pytest.raises(ConfigError, match="budget 0"):
        naflex_grid(10, 10, 16, 0)


def triangle_weights(source: int, target: int) -> Tensor:
    """float64[target, source]: bilinear resize with antialias and half-pixel centres, written out: a triangle of half
    width max(1, source / target) around each output's centre, cut at the border and normalised."""
    scale = source / target
    support = max(1.0, scale)
    weights = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * scale
        for j in range(source):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / support)
    return weights / weights.sum(1, keepdim=True)


GRIDS = [(1, 1), (4, 4), (2, 3), (7, 1), (1, 7), (16, 1), (1, 16), (3, 1), (1, 2), (2, 8), (9, 5), (40, 3)]


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_position_grid_resize_equals_weight_matrices(rows: int, columns: int) -> None:
    """Also one patch wide, where one call of torch's antialiased resize repeats the first row."""
    table = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1))
    wanted = torch.einsum(
        "ri,cj,ije->rce", triangle_weights(4, rows), triangle_weights(4, columns), table.double()
    ).reshape(rows * columns, 6)
    got = siglip2_naflex.resize_position_grid(table, rows, columns)
    assert got.dtype == table.dtype
    assert torch.allclose(got.double(), wanted, atol=1e-6)
    half = siglip2_naflex.resize_position_grid(table.bfloat16(), rows, columns)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), wanted, atol=0.05)


@pytest.mark.parametrize("size", [(14, 1), (1, 14), (3, 5)])
def test_image_resize_to_one_pixel_wide(size: tuple[int, int]) -> None:
    image = torch.rand(3, 20, 11, generator=torch.Generator().manual_seed(2))
    wanted = torch.einsum(
        "ri,cj,kij->krc", triangle_weights(20, size[0]), triangle_weights(11, size[1]), image.double()
    )
    assert torch.allclose(resize_float(image, size, "bilinear").double(), wanted, atol=1e-6)


def naflex_batch(model: vlm.VLM, sizes: list[tuple[int, int]], budget: int = 16) -> dict[str, Tensor]:
    transform = ImageTransform(mode="naflex", patch_size=14, max_num_patches=budget, resample="bilinear")
    out = transform([picture(i + 1, size) for i, size in enumerate(sizes)])
    assert out.pixel_attention_mask is not None and out.spatial_shapes is not None
    return {
        "pixel_values": out.pixel_values,
        "pixel_attention_mask": out.pixel_attention_mask,
        "spatial_shapes": out.spatial_shapes,
    }


def test_transform_pads_and_normalises() -> None:
    batch = naflex_batch(loud("siglip2_naflex", "gemma")[0], [WIDE, TALL, SQUARE])
    shapes = batch["spatial_shapes"]
    assert shapes.tolist() == [[2, 8], [8, 2], [4, 4]] or shapes.prod(1).max() <= 16
    assert batch["pixel_values"].shape == (3, int(shapes.prod(1).max()), 14 * 14 * 3)
    assert torch.equal(batch["pixel_attention_mask"].sum(1), shapes.prod(1))
    assert batch["pixel_values"].abs().max() <= 1.0001
    assert (batch["pixel_values"][batch["pixel_attention_mask"] == 0] == 0).all()


def test_values_are_the_resized_image_cut_into_patches() -> None:
    """Against weight matrices in float64: normalise, resize in float, no rounding."""
    image = picture(5, (37, 23))
    transform = ImageTransform(mode="naflex", patch_size=14, max_num_patches=12, resample="bilinear")
    out = transform([image])
    (rows, columns), values = out.grids[0], out.pixel_values[0]
    source = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(23, 37, 3).double() / 127.5 - 1
    resized = torch.einsum(
        "ri,cj,ijk->rck", triangle_weights(23, rows * 14), triangle_weights(37, columns * 14), source
    )
    for row in range(rows):
        for column in range(columns):
            patch = resized[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].reshape(-1)
            assert torch.allclose(values[row * columns + column].double(), patch, atol=1e-5)


def test_number_of_image_tokens_follows_the_grid() -> None:
    """Placeholders, features and grids agree, sample by sample; the budget is a setting."""
    model, processor = loud("siglip2_naflex", "gemma")
    images = [picture(i + 1, size) for i, size in enumerate((WIDE, TALL, SQUARE, (14, 300)))]
    counts = set()
    for budget in (4, 16, 30):
        transform = ImageTransform(mode="naflex", patch_size=14, max_num_patches=budget, resample="bilinear")
        batch = vlm.Processor(processor.tokenizer, transform)(images, ["caption en"] * 4, ["a red square"] * 4)
        assert batch.spatial_shapes is not None
        placeholders = (batch.input_ids == processor.image_token_id).sum(1)
        assert torch.equal(placeholders, batch.spatial_shapes.prod(1))
        assert model(**batch).image_hidden_states.shape[0] == int(placeholders.sum())
        counts |= set(placeholders.tolist())
    assert len(counts) > 3


def test_padding_rows_never_reach_the_decoder() -> None:
    """Any content in the pad rows, and more of them, leaves the logits as they were."""
    model, processor = loud("siglip2_naflex", "gemma")
    batch = processor([picture(1, WIDE), picture(2, (70, 70)), picture(3, (20, 20))], ["caption en"] * 3)
    # An image with fewer patches than the others has pad rows.
    small = ImageTransform(mode="naflex", patch_size=14, max_num_patches=5, resample="bilinear")([picture(4, TALL)])
    tensors = {name: batch[name] for name in batch.keys()}
    with torch.no_grad():
        before = model(**tensors).logits
        noisy = dict(tensors)
        extra = 4
        values = torch.randn(3, tensors["pixel_values"].shape[1] + extra, 14 * 14 * 3) * 100
        mask = torch.nn.functional.pad(tensors["pixel_attention_mask"], (0, extra))
        values[mask.bool()] = tensors["pixel_values"][tensors["pixel_attention_mask"].bool()]
        noisy.update(pixel_values=values, pixel_attention_mask=mask)
        assert not mask.bool().all(1).any()
        after = model(**noisy).logits
    assert torch.allclose(before, after, atol=2e-5)
    assert small.pixel_values.shape[1] <= 5


@pytest.mark.parametrize("decoder", ["gemma", "gemma2", "gemma3_text"])
def test_mixed_aspect_ratios_equal_each_alone(decoder: str) -> None:
    model, processor = loud("siglip2_naflex", decoder)
    images = [picture(1, WIDE), picture(2, TALL), picture(3, SQUARE), picture(4, (14, 300)), picture(5, (300, 14))]
    prompts = ["caption en", "no", "answer en what color is the square?", "yes", "detect square"]
    with torch.no_grad():
        together = processor(images, prompts)
        logits = model(**together).logits
        for row in range(5):
            alone = processor([images[row]], [prompts[row]])
            real = together.attention_mask[row].bool()
            assert torch.allclose(logits[row, real], model(**alone).logits[0], atol=3e-5), row
    assert together.spatial_shapes is not None
    assert len({tuple(shape) for shape in together.spatial_shapes.tolist()}) >= 4


def test_the_aspect_ratio_matters() -> None:
    """The same patches on a 2 x 8, an 8 x 2, a 16 x 1 and a 1 x 16 grid give different features, row by row."""
    model, _ = loud("siglip2_naflex", "gemma")
    values = torch.randn(1, 16, 14 * 14 * 3, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 16, dtype=torch.int64)
    seen = []
    with torch.no_grad():
        for grid in ([2, 8], [8, 2], [16, 1], [1, 16]):
            seen.append(model.model.vision_tower(values, mask, torch.tensor([grid])).features)
        same = model.model.vision_tower(values[:, :1].expand(1, 16, -1), mask, torch.tensor([[16, 1]])).features[0]
    for i in range(4):
        for j in range(i):
            assert (seen[i] - seen[j]).abs().max() > 1e-2
    # Identical patches in one column still differ by their position (4 rows of the table become 16).
    assert all((same[i] - same[i + 4]).abs().max() > 1e-3 for i in range(12))


def test_tower_equals_transformers_on_ordinary_grids() -> None:
    model, _ = loud("siglip2_naflex", "gemma")
    tower = model.model.vision_tower
    theirs = Siglip2VisionModel._from_config(copy.deepcopy(model.config.vision_config)).eval()
    theirs.load_state_dict(tower.state_dict())
    batch = naflex_batch(model, [WIDE, TALL, SQUARE, (60, 45)], budget=24)
    assert (batch["spatial_shapes"] > 1).all()
    with torch.no_grad():
        ours = tower(**batch)
        wanted = theirs(**batch).last_hidden_state
    real = batch["pixel_attention_mask"].bool()
    assert torch.equal(ours.mask, real)
    assert (ours.features - wanted)[real].abs().max() < 1e-5


def test_mask_and_grid_must_agree() -> None:
    model, _ = loud("siglip2_naflex", "gemma")
    batch = naflex_batch(model, [WIDE])
    batch["spatial_shapes"] = batch["spatial_shapes"] + 1
    with pytest.raises(ConfigError, match="spatial_shapes give"):
        model.model.vision_tower(**batch)


def test_fixed_tower_read_as_naflex_is_the_same_function(tmp_path: Path) -> None:
    """At its own grid: the patch convolution became the equal linear layer, the position grid needs no resize."""
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=42,
        patch_size=14,
        vision_use_head=False,
    )
    torch.manual_seed(0)
    fixed = SiglipVisionModel(config).eval()
    shake(fixed)
    fixed.save_pretrained(tmp_path)
    _, donor = loud("siglip", "gemma")
    model, processor = vlm.new(
        tmp_path,
        "linear",
        tiny_decoder("gemma"),
        donor.tokenizer,
        encoder_kind="siglip2_naflex",
        image={"max_num_patches": 9},
    )
    image = picture(1, (42, 42))
    out = processor.image_transform([image])
    assert out.grids == [(3, 3)]
    pixels = ImageTransform(mode="squash", patch_size=14, image_size=42)([image]).pixel_values
    with torch.no_grad():
        got = model.model.vision_tower(out.pixel_values, out.pixel_attention_mask, out.spatial_shapes).features
        wanted = fixed(pixels).last_hidden_state
    assert (got - wanted).abs().max() < 1e-5
    assert model.config.encoder == "siglip2_naflex" and processor.image_transform.mode == "naflex"
    model.model.vision_tower.save_pretrained(tmp_path / "naflex")
    with pytest.raises(ConfigError, match="clip"):
        vlm.new(tmp_path / "naflex", "linear", tiny_decoder("gemma"), donor.tokenizer, encoder_kind="clip")
