"""`DualProcessor`: images and texts to what a `DualTower` reads, by the rule of its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform
from vlm.siglip.reading import pixels
from vlm.siglip.rules import TextRule
from vlm.siglip.tokens import Specials, specials
from vlm.text.tokenizer import TextEncoder


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
        vocabulary: rows of its embedding table; None where nobody checks.
    """

    transform: ImageTransform
    tokenizer: Any
    rule: TextRule
    context: int
    vocabulary: int | None = None

    def images(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """RGB images (`vlm.images.load.load_image`) as keyword arguments of `DualTower.encode_image`."""
        return pixels(self.transform, images)

    def texts(self, texts: Sequence[str]) -> Texts:
        """Texts as token ids, each padded or cut to the whole context; a text that is cut keeps its end token.

        No text can give a special token: `<pad>` typed by someone is the pieces of its characters, as in the original.

        Raises:
            ConfigError: there is no tokenizer, it has no end or padding token, or its ids are beyond the text tower's.
            DataError: a text of more than 100,000 characters, or one that is not valid Unicode.
        """
        bos, eos, pad = self.specials
        room = self.context - len(bos) - 1
        rows = torch.full((len(texts), self.context), pad, dtype=torch.int64)
        cut = []
        for number, text in enumerate(texts):
            tokens = self.cutter(self.rule.clean(text))
            if len(tokens) > room:
                cut.append(number)
            row = [*bos, *tokens[:room], eos]
            rows[number, : len(row)] = torch.tensor(row)
        if self.vocabulary is not None and rows.numel() and int(rows.max()) >= self.vocabulary:
            raise ConfigError(
                f"the tokenizer gives token {int(rows.max())}, the text tower has {self.vocabulary}: it is not this"
                f" checkpoint's, or it was given more tokens; pass the tokenizer of the checkpoint"
            )
        return Texts(rows, tuple(cut))

    @cached_property
    def specials(self) -> Specials:
        """Ids of what stands around a text. Raises as `texts`."""
        return specials(self._own(), self.rule)

    @cached_property
    def cutter(self) -> TextEncoder:
        """Texts to pieces."""
        return TextEncoder(self._own())

    def _own(self) -> Any:
        if self.tokenizer is None:
            raise ConfigError(
                "this checkpoint has no tokenizer, so it can read images only; load it with tokenizer=..., a folder"
                " with tokenizer.json or a sentencepiece model; `vlm import FILE.npz --tokenizer T --out DIR` makes a"
                " directory that has one"
            )
        return self.tokenizer
