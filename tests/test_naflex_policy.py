"""The NaFlex policies: `fill` and `native`, their grids over all sizes, and what is recorded."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from coretools import picture

import vlm
from vlm.build.presets import tiny
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform, naflex_grid

BUDGETS = (1, 2, 4, 128, 256, 576, 784, 1024, 4096)
EXTREMES = [(65535, 328), (328, 65535), (65535, 65535), (1, 200), (200, 1), (1, 1)]


def random_sizes(count: int) -> list[tuple[int, int]]:
    """(height, width) up to 65535 px, spread evenly over the scales and over the ratios from 1:200 to 200:1."""
    draw = random.Random(0)
    sizes = list(EXTREMES)
    for _ in range(count):
        long = round(65535 ** draw.random())
        short = max(1, math.ceil(long / 200 ** draw.random()))
        sizes.append((long, short) if draw.random() < 0.5 else (short, long))
    return sizes


@pytest.mark.parametrize("budget", BUDGETS)
def test_grids_of_all_sizes(budget: int) -> None:
    """Within the budget, never empty; native is the image's own cover of patches when that fits, else fill."""
    for height, width in random_sizes(150):
        for patch in (14, 16):
            fill, native = (naflex_grid(height, width, patch, budget, policy) for policy in ("fill", "native"))
            own = (-(-height // patch), -(-width // patch))
            assert min(fill) >= 1 and math.prod(fill) <= budget
            assert native == (own if math.prod(own) <= budget else fill), (height, width)
            # Never enlarged by a patch or more, and the longer side gets the longer grid.
            assert native[0] * patch < height + patch and native[1] * patch < width + patch
            assert (native[0] - native[1]) * (height - width) >= 0


def test_native_keeps_the_pixels() -> None:
    """An image of whole patches is cut, not resized; a larger one is what fill makes of it."""
    fill, native = (
        ImageTransform(mode="naflex", patch_size=14, max_num_patches=16, resample="bilinear", naflex=policy)
        for policy in ("fill", "native")
    )
    image = picture(3, (42, 28))
    out = native([image])
    assert out.grids == [(2, 3)] == [native.grid(28, 42)]
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(28, 42, 3).float() / 255
    assert torch.allclose(out.pixel_values[0, 4], (pixels[14:, 14:28].reshape(-1) - 0.5) / 0.5)
    assert fill([image]).grids[0] == (3, 5)
    large = picture(4, (300, 200))
    assert torch.equal(native([large]).pixel_values, fill([large]).pixel_values)
    assert native.effective_resolution(28, 42) == (28, 42)
    assert native.effective_resolution(1, 1) == (14, 14)
    assert fill.effective_resolution(28, 42) == (42, 70)
    assert "keep their size" in native.describe() and "keep their size" not in fill.describe()
    assert ImageTransform(mode="squash", patch_size=14, image_size=30).effective_resolution(480, 640) == (28, 28)


def test_policy_is_recorded_and_older_files_mean_fill(tmp_path: Path) -> None:
    model, processor = tiny("siglip2_naflex", image={"naflex": "native"})
    vlm.save(model, processor, tmp_path)
    config = tmp_path / "processor_config.json"
    assert json.loads(config.read_text())["image_transform"]["naflex"] == "native"
    again = vlm.Processor.from_pretrained(tmp_path)
    small = picture(1, (20, 30))
    assert again.image_transform.naflex == "native"
    assert (again([small], "caption en").input_ids == again.image_token_id).sum() == 6
    older = again.image_transform.to_dict()
    del older["naflex"]
    assert ImageTransform.from_dict(older).naflex == "fill"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unknown naflex policy 'natve' .did you mean 'native'"):
        ImageTransform(mode="naflex", patch_size=14, max_num_patches=4, naflex="natve")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reads squares"):
        ImageTransform(mode="squash", patch_size=14, image_size=28, naflex="native")


def test_the_table_of_the_docs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "naflex.md").read_text()
    rows = re.findall(r"^\| (\d+ x \d+) \| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 8
    for image, budget, cells in rows:
        width, height = map(int, image.split(" x "))
        expected = []
        for policy in ("fill", "native"):
            transform = ImageTransform(
                mode="naflex", patch_size=16, max_num_patches=int(budget), resample="bilinear", naflex=policy
            )
            grid, seen = transform.grid(height, width), transform.effective_resolution(height, width)
            expected += [f"{grid[0]} x {grid[1]}", f"{seen[1]} x {seen[0]}", str(math.prod(grid))]
        assert cells.split(" | ") == expected, image
