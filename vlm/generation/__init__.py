"""Answers of a model: decoding, batches, candidates by likelihood, the journal of what was said."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "generate": "engine",
    "Answer": "engine",
    "Predictor": "predictor",
    "Decoding": "predictor",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.generation.engine import Answer as Answer
    from vlm.generation.engine import generate as generate
    from vlm.generation.predictor import Decoding as Decoding
    from vlm.generation.predictor import Predictor as Predictor

__getattr__, __dir__ = door(__name__, _HOMES)
