"""How much a vision tower knows of classes, measured without changing it: k nearest neighbours and a linear classifier
on the mean of its patch features.

    train, test = read_labelled("train.jsonl"), read_labelled("test.jsonl")
    found = probe(model.model.vision_tower, processor.image_transform, train, test)
    found["knn"].accuracy, found["linear"].accuracy

`zero_shot` needs no training images, but the text tower of the SigLIP checkpoint that the tower came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm.data.examples import Labelled
from vlm.data.reading import read_labelled
from vlm.model.classifiers import knn, linear
from vlm.siglip.features import ProbeResult, features
from vlm.siglip.sets import check_sets, images_in_both
from vlm.siglip.zero_shot import why_no_zero_shot, zero_shot

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlm.images.transforms import ImageTransform

__all__ = [
    "Labelled",
    "ProbeResult",
    "features",
    "knn",
    "linear",
    "probe",
    "read_labelled",
    "why_no_zero_shot",
    "zero_shot",
]


def probe(
    encoder: nn.Module,
    transform: ImageTransform,
    train: Sequence[Labelled],
    test: Sequence[Labelled],
    *,
    batch_size: int = 64,
    k: int = 20,
    device: torch.device | str | None = None,
) -> dict[str, ProbeResult]:
    """Fit both classifiers on the features of `train` and try them on `test`. Nothing is random.

    Test images of a class that never occurs in `train` count as wrong; `settings` says how many there are, and how many
    image files are in both sets.

    Args:
        encoder, transform, batch_size, device: as for `features`.
        k: neighbours of `knn`, at most the number of training images.

    Returns:
        `knn` and `linear`.

    Raises:
        DataError: no images, fewer than two classes, an id that occurs twice in `test`, or as `features`.
    """
    check_sets(train, test, k)
    given = features(encoder, transform, [item.image for item in (*train, *test)], batch_size, device)
    vectors = given[: len(train)], given[len(train) :]
    classes = sorted({item.label for item in train})
    numbers = {name: number for number, name in enumerate(classes)}
    import torch

    labels = torch.tensor([numbers[item.label] for item in train])
    notes = _notes(train, test, numbers)
    answers = {
        "knn": knn(*vectors, labels, len(classes), k=k),
        "linear": linear(*vectors, labels, len(classes)),
    }
    results = {}
    for name, (chosen, settings) in answers.items():
        right = [classes[number] == item.label for number, item in zip(chosen.tolist(), test, strict=True)]
        per_item = {item.id: ok for item, ok in zip(test, right, strict=True)}
        accuracy = sum(right) / len(test)
        results[name] = ProbeResult(
            accuracy, per_item, len(train), len(test), len(classes), {"features": FEATURES, **settings, **notes}
        )
    return results


FEATURES = "mean of the real patches' features"


def _notes(train: Sequence[Labelled], test: Sequence[Labelled], numbers: dict[str, int]) -> dict[str, Any]:
    """What a reader of the accuracy has to know of the data."""
    unseen = Counter(item.label for item in test if item.label not in numbers)
    return {
        "unseen_labels": sorted(unseen),
        "unseen_items": sum(unseen.values()),
        "images_in_both": images_in_both(train, test),
    }
