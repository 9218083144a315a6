"""Metrics that stand alone: predictions and references in, numbers out. Nothing here ever sees a model.

>>> from vlm.eval import metrics
>>> metrics.compute("exact_match", {"q1": "red"}, {"q1": ("red",)}).value
1.0
"""

from . import anls, aokvqa, boxes, captions, chartqa, choices, exact, official, pope, tallyqa, textvqa, vizwiz, vqa
from .official import crosscheck
from .ptb import tokenize
from .registry import Info, Metric, Predictions, References, compute, expand, get, names, register
from .result import MetricResult, bootstrap

__all__ = [
    "Info",
    "Metric",
    "MetricResult",
    "Predictions",
    "References",
    "bootstrap",
    "captions",
    "compute",
    "crosscheck",
    "exact",
    "expand",
    "get",
    "names",
    "official",
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
