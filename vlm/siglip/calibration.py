"""Probabilities that mean what they say: a temperature and a bias, fitted on labelled images. The weights stay.

    sigmoid (SigLIP)   logit / temperature + bias
    softmax (CLIP)     logit / temperature; a bias would be the same for all labels and change nothing

Fitted by maximum likelihood: of every pair of image and label (sigmoid), or of each image's label (softmax). Source of
temperature scaling: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599; with a bias it is Platt's.

The expected calibration error (there, equation 3) parts predictions into `BINS` equal intervals of confidence and
averages |how often they are right - how sure they are|, weighted by how many fall into each. `ece_top` is theirs: the
best label of each image, and whether it is one of the image's. `ece_pairs` takes every pair of image and label, as the
probabilities of a sigmoid are meant; most pairs are negative, so that it is small where the negatives are right.

What is said of the calibrated probabilities is measured on images that the fit has not seen: the images are dealt into
`FOLDS` parts, each is measured with what was fitted on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlm.errors import DataError

BINS, FOLDS = 15, 5
COLDEST, WARMEST = 0.02, 50.0
"""Temperatures stay between these: labels that the scores part without an error have no likeliest one."""
Objective = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class Calibration:
    """What turns a model's logits into calibrated ones.

    Attributes:
        objective: of the model.
        temperature, bias: as above; `bias` is 0 for softmax.
        bounded: why the temperature is no maximum of the likelihood, in a sentence; "" where it is one.
    """

    objective: Objective
    temperature: float
    bias: float = 0.0
    bounded: str = ""

    def logits(self, logits: Any) -> Any:
        """Calibrated logits of an array or a tensor, any shape; their order stays."""
        return logits / self.temperature + self.bias


@dataclass(frozen=True)
class Quality:
    """How far probabilities are from what comes true; see the top of this file.

    Attributes:
        ece_top, ece_pairs: expected calibration errors, 0 to 1.
        nll: mean negative log likelihood, in nats: of a pair (sigmoid), of an image's label (softmax).
    """

    ece_top: float
    ece_pairs: float
    nll: float


@dataclass(frozen=True)
class Report:
    """A calibration, and what it changes.

    Attributes:
        before: of the model's own probabilities.
        after: of calibrated ones, on images that their fit has not seen where `folds` says so.
        in_sample: of calibrated ones on the images of the fit, which flatters.
        folds: parts of the images in `after`; 0: too few images to deal, `after` is `in_sample`.
        num_images, num_labels, num_positive: images, labels, and pairs of both that belong together.
    """

    calibration: Calibration
    before: Quality
    after: Quality
    in_sample: Quality
    folds: int
    num_images: int
    num_labels: int
    num_positive: int


def calibrate(logits: np.ndarray, truth: np.ndarray, objective: Objective) -> Report:
    """Fit, and measure what it changes. The same data give the same numbers.

    Args:
        logits: float[N, C], of a model without calibration.
        truth: bool[N, C], which labels each image has; exactly one of them for softmax.

    Raises:
        DataError: as `fit`.
    """
    calibration = fit(logits, truth, objective)
    parts = _folds(truth)
    seen = calibration.logits(logits.astype(np.float64))
    unseen = seen.copy()
    for held in parts:
        unseen[held] = fit(logits[~held], truth[~held], objective).logits(logits[held].astype(np.float64))
    return Report(
        calibration=calibration,
        before=quality(logits, truth, objective),
        after=quality(unseen, truth, objective),
        in_sample=quality(seen, truth, objective),
        folds=len(parts),
        num_images=len(truth),
        num_labels=truth.shape[1],
        num_positive=int(truth.sum()),
    )


def _folds(truth: np.ndarray) -> list[np.ndarray]:
    """Masks bool[N] of the images of each part, every label spread over all parts; none where a fit would lack pairs of
    one kind."""
    count = min(FOLDS, len(truth))
    order = np.lexsort((np.arange(len(truth)), truth.argmax(1)))
    part = np.empty(len(truth), dtype=np.int64)
    part[order] = np.arange(len(truth)) % count
    masks = [part == number for number in range(count)]
    return masks if count > 1 and all(_both(truth[~mask]) for mask in masks) else []


def _both(truth: np.ndarray) -> bool:
    return bool(truth.any()) and not truth.all()


# --- how good probabilities are ---------------------------------------------------------------------------------------


def quality(logits: np.ndarray, truth: np.ndarray, objective: Objective) -> Quality:
    """Errors of calibration and the likelihood. Args as `calibrate`."""
    logits = logits.astype(np.float64)
    if objective == "softmax":
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        nll = float(-logs[truth].mean())
    else:
        logs = -np.logaddexp(0, -logits)
        nll = float(np.logaddexp(0, np.where(truth, -logits, logits)).mean())
    chances = np.exp(logs)
    best = chances.argmax(1)[:, None]
    top, right = np.take_along_axis(chances, best, 1)[:, 0], np.take_along_axis(truth, best, 1)[:, 0]
    return Quality(
        ece_top=expected_calibration_error(top, right),
        ece_pairs=expected_calibration_error(chances.ravel(), truth.ravel()),
        nll=nll,
    )


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Sum over bins of |share of right ones - mean confidence|, weighted by the share of predictions in the bin.

    Args:
        confidence: float[N], 0 to 1; a bin holds its upper end and not its lower one, the first holds 0 too.
        right: bool[N].
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    sure = np.bincount(place, confidence, bins)
    true = np.bincount(place, right.astype(np.float64), bins)
    return float(np.abs(true - sure).sum() / len(confidence))


# --- the fit ----------------------------------------------------------------------------------------------------------


def fit(logits: np.ndarray, truth: np.ndarray, objective: Objective) -> Calibration:
    """The temperature and bias of the greatest likelihood, by Newton's method in float64. Args as `calibrate`.

    Raises:
        DataError: logits that are not finite, pairs of one kind only, or (softmax) images without exactly one label.
    """
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        raise DataError("the model gives NaN or infinity for some of these images")
    if objective == "softmax" and (truth.sum(1) != 1).any():
        raise DataError(
            "softmax probabilities (CLIP) are of one label among all: each image needs exactly one label to calibrate"
        )
    if not _both(truth):
        kind = "every label" if truth.all() else "no label"
        raise DataError(
            f"every image has {kind}: a calibration needs images that have a label and images that lack one"
        )
    return _of_softmax(logits, truth) if objective == "softmax" else _of_sigmoid(logits.ravel(), truth.ravel())


_SHARP = (
    f"the scores part these labels without an error, so that any lower temperature is likelier; held at {COLDEST}: give"
    f" more images, and harder ones"
)
_FLAT = (
    f"the scores say nothing about these labels, or the opposite; the temperature is held at {WARMEST:.0f}: look at the"
    f" labels and the templates"
)
_SHARPEST, _FLATTEST = 1 / COLDEST, 1 / WARMEST


def _held(inverse: float) -> tuple[float, str]:
    """1 / temperature within its bounds, and why it was moved."""
    if inverse > _SHARPEST:
        return _SHARPEST, _SHARP
    return (_FLATTEST, _FLAT) if inverse < _FLATTEST else (inverse, "")


def _of_sigmoid(logits: np.ndarray, truth: np.ndarray) -> Calibration:
    """Logistic regression on one number: pairs [P] to temperature and bias."""
    positive, negative = logits[truth], logits[~truth]
    ones = np.ones(len(logits))
    if positive.min() >= negative.max() or positive.max() <= negative.min():  # no finite one is the likeliest
        slope, bias = np.inf if positive.min() > negative.min() else -np.inf, 0.0
    else:
        middle, width = logits.mean(), logits.std()  # standardised, so that both directions are as steep
        slope, bias = _newton(np.stack([(logits - middle) / width, ones]), 0 * ones, truth)
        slope, bias = slope / width, bias - middle * slope / width
    inverse, bounded = _held(float(slope))
    if bounded:  # the likeliest bias of that slope, from where the middle between the two kinds is as likely as not
        start = -inverse * (positive.mean() + negative.mean()) / 2
        bias = start + _newton(ones[None], logits * inverse + start, truth)[0]
    return Calibration("sigmoid", 1 / inverse, float(bias), bounded)


def _newton(rows: np.ndarray, offset: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Weights float64[K] of the rows [K, P] that make bool[P] likeliest by the sigmoid of `offset` + weights @ rows."""

    def loss(scores: np.ndarray) -> float:  # mean of log(1 + exp(score)) - truth * score
        return float((np.maximum(scores, 0) + np.log1p(np.exp(-np.abs(scores))) - truth * scores).mean())

    weights, scores = np.zeros(len(rows)), offset
    lowest, gain = loss(scores), np.inf
    while gain > _CLOSE:
        chances = 0.5 * (1 + np.tanh(scores / 2))
        gradient = rows @ (chances - truth) / len(truth)
        curvature = (rows * (chances * (1 - chances))) @ rows.T / len(truth)
        step = np.linalg.solve(curvature + 1e-15 * np.eye(len(weights)), gradient)
        length, gain = 1.0, float(gradient @ step)
        scores = offset + (weights - step) @ rows
        while gain > _CLOSE and loss(scores) > lowest:  # too far: the loss is convex, a shorter step lowers it
            length /= 2
            scores = offset + (weights - length * step) @ rows
        weights, lowest = weights - length * step, loss(scores)
    return weights


_CLOSE = 1e-13
"""Newton's method squares its error: whoever gains less than this by a step is, after it, as near as float64 gets."""


def _of_softmax(logits: np.ndarray, truth: np.ndarray) -> Calibration:
    """One number, 1 / temperature: the loss is convex in it, so that halving finds where its derivative is zero."""
    right = logits[truth]

    def slope(inverse: float) -> float:
        scaled = logits * inverse
        chances = np.exp(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))
        return float(((chances * logits).sum(1) - right).mean())

    low, high = _FLATTEST, _SHARPEST
    if slope(low) >= 0:
        return Calibration("softmax", 1 / low, bounded=_FLAT)
    if slope(high) <= 0:
        return Calibration("softmax", 1 / high, bounded=_SHARP)
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return Calibration("softmax", 2 / (low + high))
