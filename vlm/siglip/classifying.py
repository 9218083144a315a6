"""Images to labels: probabilities of a dual tower, each label's own (SigLIP) or of one among all (CLIP)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.errors import ImageError
from vlm.siglip.calibration import Calibration
from vlm.siglip.encode import encode_images
from vlm.siglip.processor import DualProcessor


@dataclass(frozen=True)
class Classified:
    """A batch of images.

    Attributes:
        keys: of those that could be read, in the order they came.
        logits, probabilities: float32[n, C] on the CPU; n is `len(keys)`. Calibrated where a calibration was given:
            either can be computed from the other.
        bad: key and reason of those that could not.
    """

    keys: list[Any]
    logits: Tensor
    probabilities: Tensor
    bad: list[tuple[Any, ImageError]]


class Label(NamedTuple):
    """A label of an image."""

    label: str
    probability: float
    logit: float


def classify(
    model: Any,
    processor: DualProcessor,
    images: Iterable[tuple[Any, Any]],
    classes: Tensor,
    *,
    calibration: Calibration | None = None,
    batch_size: int = 32,
) -> Iterator[Classified]:
    """Score images against classes, one batch after the other.

    Args:
        model: a `vlm.model.dual.DualTower`.
        images: (key, source) of each, as for `vlm.siglip.encode.encode_images`.
        classes: float32[C, D] of `vlm.siglip.classes.class_embeddings`.
        calibration: of this model and these templates.

    Yields:
        every image once, in the order given.

    Raises:
        ConfigError, DataError: as `encode_images`.
    """
    texts = classes.to(model.device)
    for batch in encode_images(model, processor, images, batch_size=batch_size):
        with torch.no_grad():
            logits = model.logits(batch.vectors.to(model.device), texts).float()
            logits = logits if calibration is None else calibration.logits(logits)
            probabilities = model.probabilities(logits)
        yield Classified(batch.keys, logits.cpu(), probabilities.cpu(), batch.bad)


def ranked(
    names: Sequence[str], logits: Tensor, probabilities: Tensor, *, top: int | None = None, threshold: float = 0.0
) -> list[Label]:
    """The labels of one image, best first; as many as there are names.

    Args:
        logits, probabilities: float[C].
        top: only the first so many.
        threshold: only those that are at least so probable: none, one or several.
    """
    # By the logits: probabilities of 1.0 hide which was nearer.
    order = logits.argsort(descending=True, stable=True)[:top].tolist()
    found = [Label(names[place], float(probabilities[place]), float(logits[place])) for place in order]
    return [label for label in found if label.probability >= threshold]
