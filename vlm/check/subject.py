"""What the checks look at: the model with its processor, batches to change, and tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.check.report import Finding
from vlm.data.examples import Example
from vlm.model.forward import VLM
from vlm.model.modes import in_mode
from vlm.model.processor import Processor

NOTHING = {torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Largest move that counts as none, where the same computation runs twice with something else in places that must not
matter. A healthy model gives 0 exactly; a wrong mask gives 1e-2 and more, however small and untrained the model."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 5e-2}
"""Largest difference that counts as rounding, where two computations give the same in exact arithmetic. Healthy models
of random weights were measured at 1e-6 to 1e-5 in float32 and at up to 0.3 in bfloat16; a wrong mask, position or scale
gives 1e-2 and more in float32 and around 1 and more on trained models."""
# Both are shares of the standard deviation of the logits (or features) that are compared.
CONTROL = 10
"""A check that asks whether something has no effect also shows that it would have seen one this many times its
limit."""

SAMPLES = (
    ((56, 40), "caption en", "a small red square left of a big blue circle"),
    ((30, 90), "answer en what color is the square?", "dark green"),
    ((64, 64), "detect square ; circle", "two yellow triangles in a row"),
)
"""(image size, prefix, suffix): mixed lengths and aspect ratios, so that a batch of them is padded."""

Tensors = dict[str, Any]
"""Keyword arguments of the model's forward."""


@dataclass(frozen=True)
class Disk:
    """How a model goes to the disk and comes back, for the checks of files."""

    save: Callable[..., Any]
    """`vlm.save`"""
    load: Callable[..., Any]
    """`vlm.load`"""
    export: Callable[..., Any]
    """`vlm.export`"""


@dataclass
class Subject:
    """A model and what is known about it. `path` is where it came from, `data` what it is trained on."""

    model: VLM
    processor: Processor
    data: Sequence[Example] | None = None
    max_text_length: int | None = None
    path: Path | None = None
    stage_manifest: Path | None = None
    disk: Disk | None = None
    """None: nothing can be written."""

    @property
    def nothing(self) -> float:
        """What counts as no move in this model's dtype."""
        return NOTHING.get(self.model.dtype, NOTHING[torch.float32])

    @property
    def rounding(self) -> float:
        """What counts as rounding in this model's dtype."""
        return ROUNDING.get(self.model.dtype, ROUNDING[torch.float32])

    def batch(self, rows: Sequence[int] = (0, 1, 2), *, suffix: bool = True) -> Tensors:
        """The samples `rows` of `SAMPLES` as the processor lays them out: for training (padding right), or without
        suffixes for generation (padding left)."""
        samples = [SAMPLES[row] for row in rows]
        made = self.processor(
            [picture(row, size) for row, (size, _, _) in zip(rows, samples, strict=True)],
            [prefix for _, prefix, _ in samples],
            [target for _, _, target in samples] if suffix else None,
        ).to(self.model.device)
        return {name: made[name] for name in made.keys() if name != "labels"}

    def encoded(self, rows: Sequence[int] = (0, 1, 2), *, suffix: bool = True) -> Tensors:
        """`batch` with the tower's features instead of pixels: the decoder can be asked often and the tower runs
        once."""
        key = (tuple(rows), suffix)
        if key not in self._encoded:
            tensors = self.batch(rows, suffix=suffix)
            with torch.no_grad():
                pixels = {name: tensors.pop(name) for name in PIXELS if name in tensors}
                features = self.model.encode(**pixels)
            self._encoded[key] = {**tensors, "encoded": features}
        return dict(self._encoded[key])

    @cached_property
    def _encoded(self) -> dict[tuple[tuple[int, ...], bool], Tensors]:
        return {}

    @cached_property
    def ordinary_ids(self) -> Tensor:
        """int64[K]: ids of ordinary text, never a control id or the placeholder."""
        letters = " ".join(chr(code) for code in range(ord("a"), ord("z") + 1))
        text = f"{letters} a red square and a green circle are left of the blue house 0 1 2 3 4 5 6 7 8 9"
        tensors = self.processor(text=[text], suffix=[text])
        ids = tensors.input_ids[0, 1:-1].unique()
        return ids[ids != self.processor.image_token_id].to(self.model.device)

    @cached_property
    def image_is_blind(self) -> bool:
        """The projector gives nothing but zeros, as a fresh one does: no image can matter."""
        with torch.no_grad(), in_mode(self.model):
            tokens, _ = self.model.model.project(self.encoded()["encoded"])
        return not bool(tokens.any())


@dataclass(frozen=True)
class Check:
    """What a file of `vlm.check.checks` or `vlm.check.dual` declares."""

    name: str
    """On the command line."""
    title: str
    """What should hold."""
    function: Callable[[Any], Finding]
    """From a `Subject`, or a `vlm.check.dual_subject.DualSubject`."""
    order: int = 1000
    """Its place in the table; among equals the name decides."""
    runs_tower: bool = True
    """It runs the vision tower, and so says nothing where that one does not keep its contract."""


PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A (width, height) photo-like image: smooth colours with noise on them, darkest and brightest values included."""
    width, height = size
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(corners, size=(height, width), mode="bilinear", align_corners=True)[0]
    noisy = smooth + 0.1 * torch.randn(3, height, width, generator=generator)
    values = (noisy.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


# --- reading the model


@torch.no_grad()
def text_logits(model: VLM, tensors: Tensors, num_last: int) -> Tensor:
    """float32[B, n, V]: the logits of the last n positions (those of image tokens are never needed, and are large)."""
    with in_mode(model):
        logits: Tensor = model(**tensors, use_cache=False, logits_to_keep=num_last).logits
    return logits.float()


def text_length(model: VLM, tensors: Tensors) -> int:
    """How many positions from the end hold all text of a batch."""
    ids, mask = tensors["input_ids"], tensors["attention_mask"].bool()
    text = mask & (ids != model.config.image_token_id)
    return int(ids.shape[1] - text.int().argmax(1).min())


def deviation(logits: Tensor, where: Tensor | None = None) -> float:
    """Standard deviation of logits (at bool[B, n] positions): the unit in which moves are measured."""
    chosen = logits if where is None else logits[where]
    return float(chosen.std()) or 1.0


def moved(before: Tensor, after: Tensor) -> Tensor:
    """float[B, n]: how far each position moved."""
    return (before - after).abs().amax(-1)


def largest(values: list[float]) -> float:
    """The maximum, NaN if any is (Python's `max` may hide one)."""
    return float(torch.tensor(values).max())


def other_ids(subject: Subject, ids: Tensor, seed: int) -> Tensor:
    """Ordinary ids in the shape of `ids`, different from it everywhere."""
    generator = torch.Generator().manual_seed(seed)
    known = subject.ordinary_ids
    index = torch.randint(0, len(known), tuple(ids.shape), generator=generator).to(ids.device)
    index = torch.where(known[index] == ids, (index + 1) % len(known), index)
    return known[index]


def padded_left(tensors: Tensors) -> Tensors:
    """A batch with its padding moved from the right to the left."""
    shifts = (tensors["attention_mask"] == 0).sum(1).tolist()
    rolled = {
        name: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.shape == tensors["input_ids"].shape
    }
    return {**tensors, **rolled}


# --- leaving the model as it was


def attention_backends(model: VLM) -> dict[str, str]:
    """Attention implementation by part, as `set_attn_implementation` takes it; "" is the model's own."""
    config = model.config
    parts = {"": config, "text_config": config.text_config, "vision_config": config.vision_config}
    return {name: str(part._attn_implementation) for name, part in parts.items()}


@contextmanager
def preserved(model: VLM) -> Iterator[None]:
    """The model in eval mode; its modes, attention backends and the random state come back."""
    backends = attention_backends(model)
    try:
        with in_mode(model), torch.random.fork_rng():
            yield
    finally:
        if attention_backends(model) != backends:
            model.set_attn_implementation(backends)
