"""Image transforms: values, filters, modes, grids, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coretools import picture
from PIL import Image
from torch.nn import functional as F

from vlm.errors import ConfigError
from vlm.images.patches import patch_coordinates, patchify, resize_float
from vlm.images.resize import resize_bilinear
from vlm.images.transforms import ImageTransform

GOLDEN = Path(__file__).parent / "data" / "big_vision_resize"
SQUASH: dict[str, Any] = {"mode": "squash", "patch_size": 14, "image_size": 28, "resample": "bilinear"}


def test_squash_is_pillows_resize_normalised() -> None:
    image = picture(1, (50, 33))
    out = ImageTransform(**SQUASH)([image])
    array = np.asarray(image.resize((28, 28), Image.Resampling.BILINEAR), dtype=np.float32)
    wanted = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    assert out.pixel_values.shape == (1, 3, 28, 28) and out.pixel_values.dtype == torch.float32
    assert torch.allclose(out.pixel_values[0], wanted, atol=1e-6)
    assert out.grids == [(2, 2)] and out.pixel_attention_mask is None and out.spatial_shapes is None


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = picture(2)
    for resample in ("nearest", "bilinear", "bicubic", "lanczos"):
        out = ImageTransform(**{**SQUASH, "resample": resample})([image]).pixel_values[0]
        back = ((out + 1) * 127.5).round().permute(1, 2, 0).byte().numpy()
        assert np.array_equal(back, np.asarray(image))


def test_black_and_white_are_minus_one_and_one() -> None:
    for colour, value in (("black", -1.0), ("white", 1.0)):
        out = ImageTransform(**SQUASH)([Image.new("RGB", (9, 70), colour)]).pixel_values
        assert torch.all(out == value)


def steps(values: torch.Tensor) -> np.ndarray:
    """float[1, 3, H, W] in [-1, 1] -> float[H, W, 3] in 8-bit steps."""
    return ((values[0] + 1) * 127.5).permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("image", ["1", "2", "3"])
@pytest.mark.parametrize(("antialias", "kind"), [(True, "antialias"), (False, "plain")])
def test_rounding_down_is_big_visions_resize(image: str, antialias: bool, kind: str) -> None:
    """Pixels made by running the original, every one; rounding to nearest is within a step, half a step brighter."""
    source, wanted = Image.open(GOLDEN / f"{image}.png"), np.asarray(Image.open(GOLDEN / f"{image}_{kind}.png"))
    settings: dict[str, Any] = {**SQUASH, "image_size": 56, "antialias": antialias}
    down = steps(ImageTransform(**settings, rounding="down")([source]).pixel_values) - wanted
    assert abs(down).max() < 0.01
    near = steps(ImageTransform(**settings)([source]).pixel_values) - wanted
    assert near.min() > -0.01 and near.max() < 1.01 and near.mean() > 0.1
    settings["antialias"] = not antialias
    other = steps(ImageTransform(**settings, rounding="down")([source]).pixel_values)
    assert (abs(other - wanted) > 0.5).mean() > 0.1


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_float_resize_is_pillows_but_for_the_rounding(resample: str) -> None:
    """Antialiased and rounded down: Pillow's value or the one below, shrinking and growing, overshoot clipped."""
    for size in ((50, 33), (9, 70), (1, 40)):
        image = picture(3, size)
        settings = {**SQUASH, "resample": resample}
        pillow = steps(ImageTransform(**settings)([image]).pixel_values)
        down = steps(ImageTransform(**settings, rounding="down")([image]).pixel_values)
        # Pillow also rounds and clips between the axes, which a bicubic overshoot shows in a few pixels.
        assert (abs(pillow - down) < 1.01).mean() > (0.99 if resample == "bicubic" else 0.9999)
        assert 0.3 < (pillow - down).mean() < 0.7
        assert down.min() >= 0 and abs(down - down.round()).max() < 1e-4


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(5, 9), (40, 30), (20, 16), (3, 40), (1, 1), (20, 1), (1, 64), (77, 2)])
def test_tensorflows_bilinear_is_torchs_but_for_rounding(size: tuple[int, int], antialias: bool) -> None:
    for seed, shape in enumerate([(20, 16), (1, 16), (20, 1), (50, 3), (1, 1)]):
        array = np.asarray(picture(seed, shape[::-1]))
        got = resize_bilinear(array, size, antialias=antialias)
        floats = torch.from_numpy(array.copy()).permute(2, 0, 1).float()
        wanted = resize_float(floats, size, "bilinear", antialias=antialias).permute(1, 2, 0).numpy()
        assert got.shape == wanted.shape and got.dtype == np.float32 and abs(got - wanted).max() < 1e-3


def test_letterbox_rounds_down_too() -> None:
    image = picture(4, (50, 33))
    settings: dict[str, Any] = {**SQUASH, "mode": "letterbox"}
    near = steps(ImageTransform(**settings)([image]).pixel_values)
    down = steps(ImageTransform(**settings, rounding="down")([image]).pixel_values)
    assert 0 < (near - down).mean() < 1 and abs(near - down).max() < 1.01


def test_naflex_without_antialias() -> None:
    image = picture(5, (112, 112))
    naflex: dict[str, Any] = {"mode": "naflex", "patch_size": 14, "max_num_patches": 4, "resample": "bilinear"}
    got = ImageTransform(**naflex, antialias=False)([image]).pixel_values[0]
    whole = ImageTransform(**{**SQUASH, "image_size": 112})([image]).pixel_values
    wanted = F.interpolate(whole, size=(28, 28), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(got, patchify(wanted, 14), atol=1e-5)
    assert not torch.allclose(got, ImageTransform(**naflex)([image]).pixel_values[0], atol=0.1)


def test_mean_and_std_are_per_channel() -> None:
    transform = ImageTransform(**SQUASH, mean=(0.0, 0.25, 0.5), std=(1.0, 0.5, 0.25))
    out = transform([Image.new("RGB", (28, 28), (255, 0, 255))]).pixel_values[0, :, 0, 0]
    assert torch.allclose(out, torch.tensor([1.0, -0.5, 2.0]))


@pytest.mark.parametrize(("size", "box"), [((56, 28), (0, 7, 28, 21)), ((10, 40), (10, 0, 17, 28))])
def test_letterbox_keeps_the_aspect_ratio(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """A blue image on a red background: blue exactly in the expected box."""
    transform = ImageTransform(**{**SQUASH, "mode": "letterbox"}, background=(255, 0, 0))
    out = transform([Image.new("RGB", size, (0, 0, 255))]).pixel_values[0]
    left, top, right, bottom = box
    blue = torch.zeros(28, 28, dtype=torch.bool)
    blue[top:bottom, left:right] = True
    assert torch.equal(out[2] == 1, blue) and torch.equal(out[0] == 1, ~blue)


@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1), (1, 1)])
def test_extreme_shapes(width: int, height: int) -> None:
    for mode in ("squash", "letterbox"):
        out = ImageTransform(**{**SQUASH, "mode": mode})([Image.new("RGB", (width, height))])
        assert out.pixel_values.shape == (1, 3, 28, 28) and torch.isfinite(out.pixel_values).all()


def test_patchify_layout() -> None:
    """Row-major patches; inside a patch (y, x, channel)."""
    image = torch.arange(3 * 4 * 6).float().view(3, 4, 6)
    out = patchify(image, 2)
    assert out.shape == (6, 12)
    for row in range(2):
        for column in range(3):
            patch = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(1, 2, 0).flatten()
            assert torch.equal(out[row * 3 + column], patch)


@pytest.mark.parametrize("antialias", [True, False])
def test_width_one_is_resized_like_height_one(antialias: bool) -> None:
    """torch's own antialiased call repeats the first row there (CPU); a transposed image must give a transposed one."""
    image = torch.rand(3, 40, 1, generator=torch.Generator().manual_seed(0))
    for size in ((28, 1), (28, 5), (60, 28), (1, 1)):
        got = resize_float(image, size, "bilinear", antialias=antialias)
        wanted = resize_float(image.mT.contiguous(), size[::-1], "bilinear", antialias=antialias).mT
        assert torch.allclose(got, wanted, atol=1e-6)
        assert size == (1, 1) or not torch.allclose(got[:, 0], got[:, 1])
    column = F.interpolate(image.mT, size=(28,), mode="linear", align_corners=False)  # no antialias
    assert antialias or torch.allclose(resize_float(image, (28, 1), "bilinear", antialias=False), column.mT, atol=1e-6)


def test_patch_coordinates_are_in_the_order_of_patches() -> None:
    """An image that holds its own row and column numbers, cut into patches of one pixel."""
    image = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij"))
    rows, columns = patch_coordinates(3, 5)
    assert rows.dtype == columns.dtype == torch.int64
    assert torch.equal(torch.stack([rows, columns], 1), patchify(image, 1))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(5, 9), (40, 30), (20, 16), (3, 40)])
def test_two_axis_resize_equals_one_call(mode: str, size: tuple[int, int]) -> None:
    """Where torch's own call is right (no output of width 1) the separable form gives the same numbers."""
    image = torch.rand(3, 20, 16, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(image[None], size=size, mode=mode, align_corners=False, antialias=True)[0]
    assert torch.allclose(resize_float(image, size, mode), wanted, atol=1e-5)
    assert torch.allclose(resize_float(image[None], size, mode)[0], wanted, atol=1e-5)


def test_round_trip_of_the_numbers() -> None:
    for transform in (
        ImageTransform(**SQUASH, mean=(0.1, 0.2, 0.3)),
        ImageTransform(**SQUASH, antialias=False, rounding="down"),
        ImageTransform(mode="naflex", patch_size=16, max_num_patches=77, resample="bilinear", background=(1, 2, 3)),
    ):
        assert ImageTransform.from_dict(transform.to_dict()) == transform


def test_settings_written_before_antialias_and_rounding_existed() -> None:
    values = {**SQUASH, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "background": [255, 255, 255]}
    assert ImageTransform.from_dict(values) == ImageTransform(**SQUASH, antialias=True, rounding="nearest")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "squahs"}, "did you mean 'squash'"),
        ({"resample": "cubic"}, "unknown resample filter 'cubic'"),
        ({"image_size": None}, "needs image_size"),
        ({"image_size": 0}, "needs image_size"),
        ({"patch_size": -1}, "needs patch_size"),
        ({"patch_size": 14.0}, "needs patch_size"),
        ({"mode": "naflex"}, "needs max_num_patches"),
        ({"rounding": "dwn"}, "unknown rounding 'dwn'.*did you mean 'down'"),
        ({"antialias": "no"}, "antialias must be true or false, got 'no'"),
        ({"resample": "lanczos", "antialias": False}, "needs resample bilinear or bicubic, got 'lanczos'"),
        ({"resample": "nearest", "rounding": "down"}, "needs resample bilinear or bicubic, got 'nearest'"),
        ({"mode": "naflex", "max_num_patches": 4, "rounding": "down"}, "naflex never rounds"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageTransform(**{**SQUASH, **changes})


def test_bad_keys() -> None:
    with pytest.raises(ConfigError, match="did you mean 'image_size'"):
        ImageTransform.from_dict({**SQUASH, "imagesize": 28})
    with pytest.raises(ConfigError, match="no 'mode'"):
        ImageTransform.from_dict({"patch_size": 14, "image_size": 28})


def test_naflex_refuses_a_filter_it_cannot_apply() -> None:
    transform = ImageTransform(mode="naflex", patch_size=14, max_num_patches=4, resample="lanczos")
    with pytest.raises(ConfigError, match="lanczos"):
        transform([picture(1)])


def test_describe_names_unseen_pixels() -> None:
    assert "the last 6 px" in ImageTransform(mode="squash", patch_size=14, image_size=384).describe()
    assert "never seen" not in ImageTransform(mode="squash", patch_size=14, image_size=378).describe()
    naflex = ImageTransform(mode="naflex", patch_size=16, max_num_patches=256)
    assert "256 patches" in naflex.describe() and "256x256" in naflex.describe() and naflex.max_patches == 256


EACH_WAY: list[dict[str, Any]] = [
    {"mode": "squash", "image_size": 56},
    {"mode": "letterbox", "image_size": 60},
    {"mode": "crop", "image_size": 56, "resize_shortest": 64},
    {"mode": "naflex", "max_num_patches": 12, "resample": "bilinear"},
]


@pytest.mark.parametrize("settings", EACH_WAY, ids=lambda settings: settings["mode"])
def test_every_way_answers_the_same_questions(settings: dict[str, Any]) -> None:
    """Nobody has to know the mode: the most patches, the widest grids, the setting that makes a square image so many
    patches, other settings, another size."""
    transform = ImageTransform(patch_size=14, **settings)
    kept = {"resize_shortest": None} if transform.crops else {}
    widest = transform.widest_grids()
    assert max(rows * columns for rows, columns in widest) == transform.max_patches
    for size in ((500, 500), (1, 4000), (4000, 1), (30, 90)):
        rows, columns = transform.grid(*size)
        assert any(rows <= most and columns <= wide for most, wide in widest)
    for rows in (1, 3, 5):
        setting = transform.size_of(rows)
        # An image size is the tower's, and the transform follows it; a budget is the transform's own.
        larger = transform.at_size(setting.pop("image_size", None)).changed({**kept, **setting})
        assert larger.grid(1 << 12, 1 << 12) == (rows, rows) and larger.square_side == rows * 14
    assert transform.each == (transform,) and transform.members == ()
    assert transform.any_aspect == (transform([picture(0, (20, 20))]).spatial_shapes is not None)
    assert str(transform.max_patches) in transform.describe() and "14 px" in transform.short()
    assert transform.changed({"mean": (0.1, 0.2, 0.3)}) == replace(transform, mean=(0.1, 0.2, 0.3))
    assert transform.at_size(None) is transform
    doubled = transform.at_size(112)
    if transform.any_aspect:
        assert doubled is transform
    else:
        assert doubled.image_size == 112 and transform.at_size(transform.image_size) is transform
    if transform.crops:
        assert doubled.resize_shortest == 128
        assert transform.changed({"mode": "squash"}).resize_shortest is None
