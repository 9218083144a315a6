"""Masks from `<seg>` tokens against big_vision's decoder and evaluator (flax) with the same random weights."""

from pathlib import Path

import numpy as np
import pytest

from vlm.errors import CheckpointError, DataError
from vlm.eval import segmentation

GOLDEN = Path(__file__).parent / "data" / "metrics" / "segmentation.npz"
SHAPES = {
    "decoder.0": (128, 512, 1, 1),
    **{f"decoder.{b}.net.{n}": (128, 128, k, k) for b in (2, 3) for n, k in ((0, 3), (2, 3), (4, 1))},
    "decoder.4": (128, 128, 4, 4),
    "decoder.6": (128, 64, 4, 4),
    "decoder.8": (64, 32, 4, 4),
    "decoder.10": (32, 16, 4, 4),
    "decoder.12": (1, 16, 1, 1),
}
TRANSPOSED = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Random weights, the same numbers that the golden masks were made with."""
    rng = np.random.default_rng(0)
    found = {"_vq_vae._embedding": rng.standard_normal((128, 512)).astype(np.float32)}
    for layer, shape in SHAPES.items():
        transposed = layer in TRANSPOSED
        fan_in = shape[0] * 4 if transposed else shape[1] * shape[2] * shape[3]
        found[f"{layer}.weight"] = (rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32)
        found[f"{layer}.bias"] = (rng.standard_normal(shape[1 if transposed else 0]) * 0.1).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def decoder(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> segmentation.MaskDecoder:
    path = tmp_path_factory.mktemp("decoder") / "vae.npz"
    np.savez(path, **weights)  # type: ignore[arg-type]
    return segmentation.MaskDecoder(path)


def ellipse(height: int, width: int, cy: int, cx: int, ry: int, rx: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def answer(box: tuple[int, ...], codes: np.ndarray) -> str:
    return "".join(f"<loc{number:04d}>" for number in box) + "".join(f"<seg{code:03d}>" for code in codes)


def test_masks_equal_big_visions(decoder: segmentation.MaskDecoder) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        masks = decoder.masks(golden["codes"])
        np.testing.assert_allclose(masks, golden["masks"], rtol=1e-4, atol=2e-4)
        assert 0.1 < (masks > 0).mean() < 0.9


def test_iou_equals_big_visions(decoder: segmentation.MaskDecoder) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        texts, gold, expected = {}, {}, {}
        for i, (which, box) in enumerate(zip(golden["case_codes"], golden["boxes"], strict=True)):
            texts[str(i)] = answer(tuple(box), golden["codes"][which])
            gold[str(i)] = ellipse(*map(int, golden["ellipses"][i]))
            expected[str(i)] = float(golden["ious"][i])
    assert max(expected.values()) > 0.1 and expected["2"] == 0  # a box below one pixel
    texts["bad"], gold["bad"], expected["bad"] = "a cat", gold["0"], 0.0
    result = segmentation.mean_mask_iou(texts, gold, decoder)
    assert result.per_item == pytest.approx(expected, abs=1e-3)  # a pixel at 0 may fall to either side
    assert result.value == pytest.approx(sum(expected.values()) / 6, abs=1e-3)
    assert result.details == {"num_invalid": 1}


def test_a_segment_is_complete_or_nothing() -> None:
    codes = np.arange(112, 128)
    good = answer((1, 2, 3, 4), codes)
    assert segmentation.parse(good + " cat") == segmentation.Segment((1, 2, 3, 4), tuple(range(112, 128)))
    broken = (
        good[:-8],
        " " + good,
        answer((1, 2, 3, 1024), codes),
        answer((3, 2, 3, 4), codes),
        answer((1, 4, 3, 2), codes),
        good.replace("127", "128"),
        "",
    )
    assert [segmentation.parse(text) for text in broken] == [None] * len(broken)


def test_what_is_refused(decoder: segmentation.MaskDecoder, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    mask = np.ones((4, 4), bool)
    with pytest.raises(DataError, match="1 masks without a prediction: 'b'"):
        segmentation.mean_mask_iou({"a": ""}, {"a": mask, "b": mask}, decoder)
    with pytest.raises(DataError, match=r"bool\[height, width\]; 1 of 1 are not: 'a'"):
        segmentation.mean_mask_iou({"a": ""}, {"a": mask.astype(np.uint8)}, decoder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        segmentation.MaskDecoder(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(CheckpointError, match="cannot be read"):
        segmentation.MaskDecoder(tmp_path / "text.npz")
    np.savez(tmp_path / "part.npz", **{k: v for k, v in weights.items() if k != "decoder.12.bias"})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="1 arrays of the mask decoder are missing: 'decoder.12.bias'"):
        segmentation.MaskDecoder(tmp_path / "part.npz")
