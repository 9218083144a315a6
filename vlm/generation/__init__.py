"""Answers of a model: decoding, the engine, candidates by likelihood, the journal of what was said."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "generate": "models",
    "ModelPredictor": "models",
    "Answer": "predictor",
    "Predictor": "predictor",
    "Decoding": "decoding",
    "choose": "decoding",
    "score_candidates": "likelihood",
    "Engine": "engine",
    "Request": "request",
    "Reply": "request",
    "Batching": "schedule",
    "BatchSize": "schedule",
    "PredictionStore": "predictions",
    "Record": "predictions",
    "Progress": "progress",
    "generate_ids": "text",
    "generation_config": "text",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.generation.decoding import Decoding as Decoding
    from vlm.generation.decoding import choose as choose
    from vlm.generation.engine import Engine as Engine
    from vlm.generation.likelihood import score_candidates as score_candidates
    from vlm.generation.models import ModelPredictor as ModelPredictor
    from vlm.generation.models import generate as generate
    from vlm.generation.predictions import PredictionStore as PredictionStore
    from vlm.generation.predictions import Record as Record
    from vlm.generation.predictor import Answer as Answer
    from vlm.generation.predictor import Predictor as Predictor
    from vlm.generation.progress import Progress as Progress
    from vlm.generation.request import Reply as Reply
    from vlm.generation.request import Request as Request
    from vlm.generation.schedule import Batching as Batching
    from vlm.generation.schedule import BatchSize as BatchSize
    from vlm.generation.text import generate_ids as generate_ids
    from vlm.generation.text import generation_config as generation_config

__getattr__, __dir__ = door(__name__, _HOMES)
