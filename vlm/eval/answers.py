"""The two ways to answer an item: write text, or choose the likeliest of some candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlm.data import Example

from .predict import Answerer, Pictures
from .predictor import Decoding, Predictor

Candidates = Callable[[Example], Sequence[str]]


def answerer(predictor: Predictor, decoding: Decoding, candidates: Candidates | None) -> Answerer:
    """Who answers. Raises ConfigError: `likelihood` with a predictor that only writes text, or without candidates."""

    def write(examples: Sequence[Example], pictures: Sequence[Pictures]) -> list[dict[str, Any]]:
        texts = predictor.predict(
            [images[0] if len(images) == 1 else images for images in pictures],
            [example.prefix for example in examples],
            ids=[example.id for example in examples],
            decoding=decoding,
        )
        return [{"prediction": text} for text in texts]

    answer = write
    device = getattr(predictor, "device", "cpu")  # a predictor of one's own need not have one
    return Answerer(answer=answer, background=predictor.background, device=str(device))
