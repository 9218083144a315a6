"""k nearest neighbours on a tower's embeddings: scikit-learn's handwritten digits, which come with the library.

    python examples/siglip/digits.py [--model google/siglip2-base-patch16-224]

No training: an image gets the label of the images whose embeddings are nearest. The package's own SigLIP has seen
drawn shapes and never a digit, so what it finds is what its features are worth elsewhere; the same classifier on the
raw pixels stands beside it. Two implementations give the neighbours, ours and scikit-learn's, and must agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from vlm import siglip


def images(values: np.ndarray) -> list[Image.Image]:
    """Digits of 8 x 8 numbers from 0 to 16, dark on white."""
    return [Image.fromarray((255 - digit * 15.9).astype(np.uint8)).convert("RGB") for digit in values]


def embeddings(model: siglip.DualTower, processor: siglip.DualProcessor, pictures: Sequence[Image.Image]) -> Tensor:
    """float32[N, D], of length 1."""
    return torch.cat([found.vectors for found in siglip.encode_images(model, processor, enumerate(pictures))])


def accuracies(train: Tensor, test: Tensor, known: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Share of the test images whose nearest neighbour has their label: by inner products, and by scikit-learn."""
    nearest = (test @ train.T).argmax(1).numpy()
    other = KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(train.numpy(), known)
    return float((known[nearest] == wanted).mean()), float(other.score(test.numpy(), wanted))


def main(words: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Print both accuracies, of the tower's embeddings and of the pixels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo-siglip")
    parser.add_argument("--most", type=int, help="so many digits only")
    given = parser.parse_args(words)
    digits = load_digits()
    values, labels = digits.images[: given.most], digits.target[: given.most]
    half = len(values) // 2
    model, processor = siglip.load(given.model)
    of_tower = embeddings(model, processor, images(values))
    of_pixels = torch.nn.functional.normalize(torch.from_numpy(values).flatten(1).float(), dim=1)
    found = {}
    for name, vectors in (("tower", of_tower), ("pixels", of_pixels)):
        found[name] = accuracies(vectors[:half], vectors[half:], labels[:half], labels[half:])
        print(f"{name}: {found[name][0]:.1%} of {len(values) - half} digits (scikit-learn {found[name][1]:.1%})")
    return found


if __name__ == "__main__":
    main()
