"""Masks from PaliGemma's `<seg>` tokens, and the mean mask IoU of its RefCOCO results.

    decoder = MaskDecoder("vae-oid.npz")
    result = mean_mask_iou({"1": "<loc0010>...<seg127>"}, {"1": mask}, decoder)
    segment = parse("<loc0010>...<seg127>")
    image_mask(segment.box, decoder.masks(np.array([segment.codes]))[0], height=480, width=640)

An answer is four `<loc>` and sixteen `<seg>` tokens. The sixteen name entries of a code book, a 4 x 4 grid of vectors
that the decoder of a VQ-VAE turns into a 64 x 64 mask; resized into the box it is the mask of the object. The decoder's
weights are a file of Google's (`gs://big_vision/paligemma/vae-oid.npz`), which is not part of this package.

Architecture, tokens and score follow big_vision's `evaluators/proj/paligemma/transfers/segmentation.py`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.errors import CheckpointError, DataError
from vlm.eval.metrics.result import MetricResult, mean_result
from vlm.text.locations import BINS, NUM_CODES, first_segment
from vlm.words import listed

_GRID = 4
_AT_ONCE = 64  # masks decoded together: some 40 MB of activations
_CODE_BOOK = "_vq_vae._embedding"
_RESIDUAL = ("decoder.2.net", "decoder.3.net")
_UPSAMPLING = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")
_LAYERS = (
    "decoder.0",
    *(f"{block}.{layer}" for block in _RESIDUAL for layer in (0, 2, 4)),
    *_UPSAMPLING,
    "decoder.12",
)


@dataclass(frozen=True)
class Segment:
    """What an answer says: the box in tokens (y0, x0, y1, x1) from 0 to 1023, and sixteen codes from 0 to 127."""

    box: tuple[int, int, int, int]
    codes: tuple[int, ...]


def parse(answer: str) -> Segment | None:
    """The segment that an answer starts with; None unless it is complete, in range, and its box has an area."""
    segment = first_segment(answer)
    if segment is None:
        return None
    (y0, x0, y1, x1), codes = segment
    return Segment((y0, x0, y1, x1), codes)


class MaskDecoder:
    """The VQ-VAE's decoder in NumPy: a 1 x 1 convolution, two residual blocks, four transposed convolutions, 1 x 1.

    Raises CheckpointError for a file that is not these weights.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self._weights = {name: file[name].astype(np.float32) for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: cannot be read as the mask decoder's .npz: {error}") from error
        needed = [_CODE_BOOK, *(f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias"))]
        missing = [name for name in needed if name not in self._weights]
        if missing:
            raise CheckpointError(f"{path}: {len(missing)} arrays of the mask decoder are missing: {_named(missing)}")
        if len(self._weights[_CODE_BOOK]) != NUM_CODES:
            shape = self._weights[_CODE_BOOK].shape
            raise CheckpointError(f"{path}: {_CODE_BOOK} should have {NUM_CODES} rows, got the shape {shape}")

    def masks(self, codes: np.ndarray) -> np.ndarray:
        """int[N, 16] codes, row by row of the grid -> float32[N, 64, 64]; above 0 is the object."""
        book = self._weights[_CODE_BOOK]
        x = book[codes].reshape(len(codes), _GRID, _GRID, -1).transpose(0, 3, 1, 2)
        x = _relu(self._conv(x, "decoder.0"))
        for block in _RESIDUAL:
            y = _relu(self._conv(x, f"{block}.0"))
            y = _relu(self._conv(y, f"{block}.2"))
            x = x + self._conv(y, f"{block}.4")
        for layer in _UPSAMPLING:
            x = _relu(self._double(x, layer))
        return self._conv(x, "decoder.12")[:, 0]

    def _conv(self, x: np.ndarray, layer: str) -> np.ndarray:
        """float32[N, C, H, W] -> [N, O, H, W]: stride 1, zeros around; weight [O, C, k, k], k odd."""
        weight, bias = self._weights[f"{layer}.weight"], self._weights[f"{layer}.bias"]
        size = weight.shape[-1]
        around = size // 2
        padded = np.pad(x, ((0, 0), (0, 0), (around, around), (around, around)))
        height, width = x.shape[2:]
        windows = (
            np.einsum("oc,nchw->nohw", weight[:, :, i, j], padded[:, :, i : i + height, j : j + width], optimize=True)
            for i in range(size)
            for j in range(size)
        )
        return sum(windows, start=bias[:, None, None])

    def _double(self, x: np.ndarray, layer: str) -> np.ndarray:
        """float32[N, C, H, W] -> [N, O, 2H, 2W]: transposed convolution, stride 2, padding 1; weight [C, O, 4, 4]."""
        weight, bias = self._weights[f"{layer}.weight"], self._weights[f"{layer}.bias"]
        num, _, height, width = x.shape
        out = np.zeros((num, weight.shape[1], 2 * height + 2, 2 * width + 2), np.float32)
        for i in range(4):
            for j in range(4):
                step = np.einsum("co,nchw->nohw", weight[:, :, i, j], x, optimize=True)
                out[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2] += step
        return out[:, :, 1:-1, 1:-1] + bias[:, None, None]


def _named(names: Sequence[str]) -> str:
    return listed(names, show=repr)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def image_mask(box: tuple[int, int, int, int], mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool[height, width]: a decoded mask float32[64, 64] resized into its box, tokens y0, x0, y1, x1 of an image.

    Nowhere true where the box is smaller than a pixel.
    """
    whole = np.zeros((height, width), bool)
    y0, y1 = (int(token / (BINS - 1) * height) for token in box[::2])
    x0, x1 = (int(token / (BINS - 1) * width) for token in box[1::2])
    if y1 > y0 and x1 > x0:
        resized = Image.fromarray(mask).resize((x1 - x0, y1 - y0), resample=Image.Resampling.BILINEAR)
        whole[y0:y1, x0:x1] = np.asarray(resized) > 0
    return whole


def mask_iou(box: tuple[int, int, int, int], mask: np.ndarray, gold: np.ndarray) -> float:
    """IoU of a decoded mask float32[64, 64], resized into its box, with the gold mask bool[H, W] of the image.

    0 where the box is smaller than a pixel.
    """
    said = image_mask(box, mask, *gold.shape)
    common, union = int((gold & said).sum()), int((gold | said).sum())
    return common / union if said.any() and union else 0.0


def mean_mask_iou(predictions: Mapping[str, str], gold: Mapping[str, np.ndarray], decoder: MaskDecoder) -> MetricResult:
    """The `miou` that PaliGemma reports for RefCOCO, RefCOCO+ and RefCOCOg.

    Args:
        predictions: id -> answer; an answer that is no complete segment scores 0 and is counted.
        gold: id -> bool[H, W], the object's mask at the full size of the image.
        decoder: with Google's weights.

    Raises:
        DataError: the ids differ (listed), or a mask is not two-dimensional and bool.
    """
    for ids, others, what in ((gold, predictions, "masks without a prediction"), (predictions, gold, "predictions")):
        alone = [key for key in ids if key not in others]
        if alone:
            raise DataError(f"predictions and gold masks must hold the same ids; {len(alone)} {what}: {_named(alone)}")
    odd = [key for key, mask in gold.items() if mask.ndim != 2 or mask.dtype != bool]
    if odd or not gold:
        raise DataError(f"gold masks must be bool[height, width]; {len(odd)} of {len(gold)} are not: {_named(odd)}")
    segments = {key: parse(predictions[key]) for key in gold}
    scores = dict.fromkeys(gold, 0.0)
    valid = [(key, segment) for key, segment in segments.items() if segment is not None]
    for start in range(0, len(valid), _AT_ONCE):
        batch = valid[start : start + _AT_ONCE]
        masks = decoder.masks(np.array([segment.codes for _, segment in batch]))
        for (key, segment), mask in zip(batch, masks, strict=True):
            scores[key] = mask_iou(segment.box, mask, gold[key])
    rule = (
        "PaliGemma's transfers on RefCOCO segmentation: mean IoU of the mask decoded from sixteen <seg> tokens, "
        "resized into the box of four <loc> tokens, with the gold mask; an answer that is no complete segment scores "
        "0 and is counted (num_invalid)"
    )
    details: dict[str, float] = {"num_invalid": len(segments) - len(valid)}
    return mean_result("refcoco_miou_paligemma", scores, rule, details=details)
