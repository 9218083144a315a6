"""The images and prompts that both sides of an export or import are run on, and what a run gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm.model.modes import in_mode

NEW_TOKENS = 16
"""Greedy tokens per sample."""
Outputs = dict[str, list[Tensor]]
"""Quantity -> one tensor per sample."""
SAMPLES = [
    ("caption en", "a red circle on a slope", (320, 240)),
    ("answer en how many squares are there?", "12", (96, 200)),
    ("detect circle ; square", "<loc0100><loc0200><loc0500><loc1023> circle", (64, 64)),
]
"""(prompt, suffix for the loss, width and height of the picture)."""


def pictures() -> list[Image.Image]:
    """One picture per sample, always the same: a slope with a disc, stripes with noise, a chequerboard in colour."""
    drawn = []
    for index, (_, _, (width, height)) in enumerate(SAMPLES):
        y, x = np.mgrid[0:height, 0:width]
        noise = np.random.default_rng(index).integers(0, 60, (height, width, 3))
        slope = np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], axis=-1)
        disc = ((x - width / 2) ** 2 + (y - height / 3) ** 2 < (min(width, height) / 4) ** 2)[..., None]
        cells = ((x // 8 + y // (8 + index)) % 2)[..., None] * np.array([200, 90, 40])
        values = [np.where(disc, [220, 30, 30], slope), 0.5 * cells + noise, cells + 30][index]
        drawn.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return drawn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; each module's own mode comes back."""
    with in_mode(model), torch.inference_mode():
        yield


def add(out: Outputs, name: str, value: Tensor) -> None:
    """One more sample of a quantity."""
    out.setdefault(name, []).append(value.detach().cpu())
