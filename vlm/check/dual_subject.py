"""What the checks of an image tower and a text tower look at: both with their processor, probes and tolerances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.check.subject import picture
from vlm.model.modes import in_mode

NOTHING = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Largest distance of two embeddings of length 1 that counts as none, where the same computation runs twice with
something else in places that must not matter. A healthy model gives 0 or rounding of its last bits."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-2}
"""The same where two computations give the same in exact arithmetic, such as batches of another size."""
SEES = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 2e-3}
"""Least distance that counts as an effect, where something must matter."""
SIZES = ((56, 40), (30, 90), (64, 64))
"""(width, height) of the probing images: wide, tall and square."""
TEXTS = ("a red square left of a blue circle", "two dogs", "a photo of a small cat on a wooden chair in the snow")


@dataclass
class DualSubject:
    """A `vlm.model.dual.DualTower` with its `vlm.siglip.processor.DualProcessor`."""

    model: Any
    processor: Any

    @property
    def nothing(self) -> float:
        """What counts as no distance in this model's dtype."""
        return NOTHING.get(self.model.dtype, NOTHING[torch.float32])

    @property
    def rounding(self) -> float:
        """What counts as rounding in this model's dtype."""
        return ROUNDING.get(self.model.dtype, ROUNDING[torch.float32])

    @property
    def sees(self) -> float:
        """What counts as an effect in this model's dtype."""
        return SEES.get(self.model.dtype, SEES[torch.float32])

    def pixels(self, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
        """The probing images `rows` of `SIZES` as the processor gives them to `encode_image`."""
        made = self.processor.images([picture(row, SIZES[row]) for row in rows])
        return {name: value.to(self.model.device) for name, value in made.items()}

    def ids(self, texts: Sequence[str]) -> Tensor:
        """int64[N, L]: texts as the processor gives them to `encode_text`."""
        ids: Tensor = self.processor.texts(list(texts)).input_ids
        return ids.to(self.model.device)

    @torch.no_grad()
    def image(self, inputs: dict[str, Tensor], *, model: Any = None) -> Tensor:
        """float32[B, D] of length 1 on the CPU, whatever `encode_image` does about the length itself."""
        chosen = self.model if model is None else model
        with in_mode(chosen):
            return unit(chosen.encode_image(**inputs))

    @torch.no_grad()
    def text(self, ids: Tensor, *, model: Any = None) -> Tensor:
        """float32[C, D] of length 1 on the CPU, whatever `encode_text` does about the length itself."""
        chosen = self.model if model is None else model
        with in_mode(chosen):
            return unit(chosen.encode_text(ids))


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1 in float32, on the CPU."""
    return torch.nn.functional.normalize(rows.float().cpu(), dim=-1)


def distance(one: Tensor, two: Tensor) -> float:
    """The largest distance of two rows; NaN where a row is."""
    return float((one - two).norm(dim=-1).max())


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """The model in eval mode; its modes and the random state come back."""
    with in_mode(model), torch.random.fork_rng():
        yield
