"""Metrics that stand alone: predictions and references in, numbers out. Nothing here ever sees a model.

>>> from vlm.eval import metrics
>>> metrics.compute("exact_match", {"q1": "red"}, {"q1": ("red",)}).value
1.0
"""

from . import anls, aokvqa, boxes, captions, chartqa, choices, exact, pope, tallyqa, textvqa, vizwiz, vqa
from .registry import Info, Metric, Predictions, References, compute, expand, get, names, register
from .result import MetricResult, bootstrap
from .tokenizer import tokenize

__all__ = [
    "Info",
    "Metric",
    "MetricResult",
    "Predictions",
    "References",
    "bootstrap",
    "captions",
    "compute",
    "exact",
    "expand",
    "get",
    "names",
    "register",
    "tokenize",
    "vqa",
    "anls",
    "aokvqa",
    "boxes",
    "chartqa",
    "choices",
    "pope",
    "tallyqa",
    "textvqa",
    "vizwiz",
]
