"""Metrics that stand alone: predictions and references in, numbers out. Nothing here ever sees a model.

>>> from vlm.eval import metrics
>>> metrics.compute("exact_match", {"q1": "red"}, {"q1": ("red",)}).value
1.0
"""

from . import captions, exact, official, vqa
from .official import crosscheck
from .ptb import tokenize
from .registry import Metric, compute, expand, get, names, register
from .result import MetricResult, bootstrap

__all__ = [
    "Metric",
    "MetricResult",
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
]
