"""`DualProcessor`: images and texts to what a `DualTower` reads, by the rule of its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform
from vlm.siglip.rules import TextRule


class Texts(NamedTuple):
    """Texts as the text tower reads them.

    Attributes:
        input_ids: int64[N, L]; L is always the whole context.
        cut: indexes of the texts that were longer, which are read without their end.
    """

    input_ids: Tensor
    cut: tuple[int, ...]


@dataclass(frozen=True)
class DualProcessor:
    """What stands before both towers.

    Attributes:
        transform: how images become pixels.
        tokenizer: a transformers tokenizer; only its cutting into tokens is used, no other setting of it. None where
            the checkpoint has none: images alone can be read.
        rule: how the family reads texts.
        context: positions of the text tower, as its position table has.
    """

    transform: ImageTransform
    tokenizer: Any
    rule: TextRule
    context: int

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """RGB images (`vlm.images.load.load_image`) as keyword arguments of `DualTower.encode_image`."""
        pixels = self.transform(images)
        if pixels.pixel_attention_mask is None or pixels.spatial_shapes is None:
            return {"pixel_values": pixels.pixel_values}
        return {
            "pixel_values": pixels.pixel_values,
            "pixel_attention_mask": pixels.pixel_attention_mask,
            "spatial_shapes": pixels.spatial_shapes,
        }

    def texts(self, texts: Sequence[str]) -> Texts:
        """Texts as token ids, each padded or cut to the whole context; a text that is cut keeps its end token.

        Raises:
            ConfigError: the checkpoint has no tokenizer, or it has no end or padding token.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "this checkpoint has no tokenizer, so it can read images only; load it with tokenizer=..., a folder"
                " with tokenizer.json or a sentencepiece model"
            )
        start, end, pad = self._special()
        room = self.context - len(start) - 1
        rows = torch.full((len(texts), self.context), pad, dtype=torch.int64)
        cut = []
        for number, text in enumerate(texts):
            tokens = self.tokenizer(self.rule.clean(text), add_special_tokens=False)["input_ids"]
            if len(tokens) > room:
                cut.append(number)
            row = [*start, *tokens[:room], end]
            rows[number, : len(row)] = torch.tensor(row)
        return Texts(rows, tuple(cut))

    def _special(self) -> tuple[list[int], int, int]:
        """(what stands before a text, its end, the padding)."""
        end, pad, start = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, self.tokenizer.bos_token_id
        if self.rule.pad == "eos":
            pad = end
        needed = {"eos_token": end, "pad_token": pad} | ({"bos_token": start} if self.rule.bos else {})
        absent = [name for name, value in needed.items() if value is None]
        if absent:
            raise ConfigError(f"the tokenizer has no {' and no '.join(absent)}, which {self.rule.title} needs")
        return ([start] if self.rule.bos else []), end, pad
