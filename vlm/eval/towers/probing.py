"""k nearest neighbours and a linear classifier on vectors that stay as they are, see `vlm.model.classifiers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vlm.errors import DataError
from vlm.eval.towers.data import Sets
from vlm.eval.towers.scored import Rows, Scored, by_probe
from vlm.model.classifiers import knn, linear

RULES = {
    "knn": "accuracy of weighted nearest neighbours by cosine (arXiv 1805.01978; votes exp(s / 0.07))",
    "linear": (
        "accuracy of multinomial logistic regression on standardised features, the penalty chosen on a held-out fifth"
    ),
}


def probe(kind: str, sets: Sets, images: Rows, neighbours: int) -> tuple[Scored, dict[str, Any]]:
    """Fit to the pictures of `train` that could be read, and judge those of `test`.

    Args:
        images: of `test`, then of `train`.

    Returns:
        the outcome, and the settings of the classifier.

    Raises:
        DataError: fewer than two classes are left.
    """
    count = len(sets.test)
    learnt = np.flatnonzero(images.there[count:])
    labels = sorted({sets.train[place].label for place in learnt})
    if len(labels) < 2:
        raise DataError(
            f"of {len(sets.train)} pictures to learn from, those that can be read have fewer than two classes"
        )
    number = {label: place for place, label in enumerate(labels)}
    target = torch.tensor([number[sets.train[place].label] for place in learnt])
    train = torch.from_numpy(images.vectors[count:][learnt])
    test = torch.from_numpy(images.vectors[:count])
    if kind == "knn":
        answers, settings = knn(train, test, target, len(labels), k=neighbours)
    else:
        answers, settings = linear(train, test, target, len(labels))
    unseen = sorted({item.label for item in sets.test} - set(labels))
    both = {str(item.image) for item in sets.train} & {str(item.image) for item in sets.test}
    notes = [f"{len(unseen)} classes are in no picture to learn from; their pictures count as wrong"] if unseen else []
    notes += [f"{len(both)} picture files are in both sets"] if both else []
    said = [labels[place] for place in answers.tolist()]
    scored = by_probe(kind, sets.test, images.there[:count], said, RULES[kind], notes)
    return scored, {**settings, "num_train": len(learnt), "classes": len(labels)}
