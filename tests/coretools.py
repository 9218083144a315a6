"""Shared by the core's tests: small models whose weights are large enough to be told apart, and batches laid out by
hand, so that the tests do not rest on the processor."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from vlm.build.presets import tiny
from vlm.model.forward import VLM
from vlm.model.processor import Processor

IMAGE_TOKENS = 4
"""Tokens of an image of the tiny siglip tower: 28 px, patch 14."""


@dataclass(frozen=True)
class Case:
    """A decoder and its attention backend."""

    decoder: str
    attention: str
    window: int | None = None

    def model(self, encoder: str = "siglip") -> tuple[VLM, Processor]:
        settings = {} if self.window is None else {"sliding_window": self.window}
        return loud(encoder, self.decoder, self.attention, **settings)


CASES = [
    Case("gemma", "sdpa"),
    Case("gemma", "eager"),
    Case("gemma2", "eager", window=8),
    Case("gemma2", "eager", window=4096),
    Case("gemma3_text", "sdpa", window=8),
    Case("gemma3_text", "eager", window=8),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.decoder}-{c.attention}-{c.window}")


@functools.cache
def loud(encoder: str, decoder: str, attention: str | None = None, **settings: Any) -> tuple[VLM, Processor]:
    """A tiny model with noise on every weight: its logits depend visibly on every input. Do not change it."""
    model, processor = tiny(encoder, decoder, **settings)
    shake(model)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model, processor


def shake(model: torch.nn.Module, scale: float = 0.3, seed: int = 7) -> None:
    """Add seeded noise to every parameter (a fresh projector is zero: the image would not matter). Less on the tied
    vocabulary: with large embeddings a model repeats its input for ever."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (scale / 6 if "embed_tokens" in name else scale))


def picture(seed: int, size: tuple[int, int] = (28, 28)) -> Image.Image:
    """A (width, height) image of noise."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


@dataclass
class Sample:
    """One example as ids: an optional image, prefix and suffix."""

    prefix: list[int]
    suffix: list[int] = field(default_factory=list)
    image: int | None = None  # seed of its picture

    def ids(self, image_token: int) -> list[int]:
        return [image_token] * (0 if self.image is None else IMAGE_TOKENS) + self.prefix + self.suffix

    def types(self) -> list[int]:
        return [0] * ((0 if self.image is None else IMAGE_TOKENS) + len(self.prefix)) + [1] * len(self.suffix)


def some_ids(count: int, seed: int) -> list[int]:
    """Ordinary token ids (none is a control id or the placeholder)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 250, (count,), generator=generator).tolist()


def sample(prefix: int, suffix: int, seed: int, image: bool = True) -> Sample:
    return Sample(some_ids(prefix, seed), some_ids(suffix, seed + 1000), seed if image else None)


def lay_out(model: VLM, rows: list[list[Sample]], side: str = "right", labels: bool = False) -> dict[str, Tensor]:
    """The tensors of a batch whose rows hold one or more packed samples, written with lists only."""
    length = max(sum(len(s.ids(0)) for s in row) for row in rows)
    image_token = model.config.image_token_id
    assert image_token is not None
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "sequence_ids", "labels")
    table: dict[str, list[list[int]]] = {name: [] for name in names}
    for row in rows:
        line: dict[str, list[int]] = {name: [] for name in names}
        for index, item in enumerate(row):
            ids, types = item.ids(image_token), item.types()
            line["input_ids"] += ids
            line["attention_mask"] += [1] * len(ids)
            line["token_type_ids"] += types
            line["position_ids"] += range(len(ids))
            line["sequence_ids"] += [index] * len(ids)
            line["labels"] += [i if t else -100 for i, t in zip(ids, types, strict=True)]
        padding = {"sequence_ids": -1, "labels": -100}
        for name in names:
            pad = [padding.get(name, 0)] * (length - len(line[name]))
            table[name].append(line[name] + pad if side == "right" else pad + line[name])
    batch = {name: torch.tensor(values) for name, values in table.items()}
    if all(len(row) == 1 for row in rows):
        del batch["sequence_ids"]
    if not labels:
        del batch["labels"]
    seeds = [item.image for row in rows for item in row if item.image is not None]
    if seeds:
        batch["pixel_values"] = torch.stack([pixels(seed) for seed in seeds])
    return batch


def pixels(seed: int) -> Tensor:
    """float[3, 28, 28]."""
    return torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def logits(model: VLM, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).logits


def span(rows: list[list[Sample]], row: int, index: int, side: str = "right") -> slice:
    """Where sample `index` of `row` lies in the batch that `lay_out` makes."""
    lengths = [sum(len(s.ids(0)) for s in line) for line in rows]
    start = sum(len(s.ids(0)) for s in rows[row][:index]) + (max(lengths) - lengths[row] if side == "left" else 0)
    return slice(start, start + len(rows[row][index].ids(0)))
