"""Metrics that stand alone: predictions and references in, numbers out. Nothing here ever sees a model.

>>> from vlm.eval import metrics
>>> metrics.compute("exact_match", {"q1": "red"}, {"q1": ("red",)}).value
1.0
"""

from . import captions, exact, vqa
from .ptb import tokenize
from .registry import Metric, compute, expand, get, names, register
from .result import MetricResult, bootstrap

__all__ = [
    "Metric",
    "MetricResult",
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
]
