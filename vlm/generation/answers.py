"""The two ways to answer an item: write text, or choose the likeliest of some candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlm.data.examples import Example
from vlm.errors import ConfigError
from vlm.generation import batches
from vlm.generation.predict import Answer, Answerer, Pictures
from vlm.generation.predictor import Decoding, Predictor

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
        return [_written(text) for text in texts]

    answer = write if decoding.by == "generate" else _chooser(predictor, decoding, candidates)
    # A predictor of one's own need not have the two that only help to form batches.
    return Answerer(
        answer=answer,
        background=predictor.background,
        device=str(getattr(predictor, "device", "cpu")),
        lengths=_lengths(predictor) if hasattr(predictor, "lengths") else None,
    )


def _written(text: str) -> dict[str, Any]:
    """`finish` too, where the predictor says how its text ended (`vlm.generation.Answer`)."""
    finish = getattr(text, "finish", None)
    return {"prediction": str(text)} if finish is None else {"prediction": str(text), "finish": finish}


def _lengths(predictor: Any) -> Callable[[Sequence[Example]], list[int]]:
    def lengths(examples: Sequence[Example]) -> list[int]:
        sizes = [batches.image_sizes(example) for example in examples]
        found: list[int] = predictor.lengths(sizes, [ex.prefix for ex in examples], ids=[ex.id for ex in examples])
        return found

    return lengths


def _chooser(predictor: Predictor, decoding: Decoding, candidates: Candidates | None) -> Answer:
    """Takes the likeliest candidate, and keeps the scores of all."""
    score = getattr(predictor, "score", None)
    if score is None or candidates is None:
        lacking = (
            f"a {type(predictor).__name__} has no `score`" if score is None else "nothing says what to choose from"
        )
        raise ConfigError(f"answers cannot be chosen by likelihood: {lacking}")
    from vlm.generation.likelihood import choose

    def answer(examples: Sequence[Example], pictures: Sequence[Pictures]) -> list[dict[str, Any]]:
        offered = [list(candidates(example)) for example in examples]
        scores = score(
            [list(images) for images in pictures],
            [example.prefix for example in examples],
            offered,
            ids=[example.id for example in examples],
            normalization=decoding.normalization,
        )
        said = choose(offered, scores)
        return [
            {"prediction": text, "candidates": texts, "log_likelihoods": values}
            for text, texts, values in zip(said, offered, scores, strict=True)
        ]

    return answer
