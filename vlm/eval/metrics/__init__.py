"""Metrics that stand alone: predictions and references in, numbers out. Nothing here ever sees a model.

Each file of this folder registers its metrics when it is imported, and all are: a metric is one new file.

>>> from vlm.eval import metrics
>>> metrics.compute("exact_match", {"q1": "red"}, {"q1": ("red",)}).value
1.0
"""

from importlib import import_module
from pkgutil import iter_modules

# Only those that users import by name; a new file needs no line here.
from vlm.eval.metrics import (
    anls,
    aokvqa,
    boxes,
    captions,
    chartqa,
    choices,
    exact,
    official,
    pope,
    tallyqa,
    textvqa,
    vizwiz,
    vqa,
)
from vlm.eval.metrics.official import crosscheck
from vlm.eval.metrics.ptb import tokenize
from vlm.eval.metrics.registry import Info, Metric, Predictions, References, compute, expand, get, names, register
from vlm.eval.metrics.result import MetricResult, bootstrap

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


def find() -> None:
    """Import every file of this folder, so that its metrics are known."""
    for file in iter_modules(__path__):
        import_module(f"{__name__}.{file.name}")


find()
