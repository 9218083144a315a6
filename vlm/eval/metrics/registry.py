"""Metrics by exact name, and the checks that all of them share.

    from vlm.eval import metrics
    result = metrics.compute("cider", {"1": "a red cat"}, {"1": ("a red cat", "the cat is red")})

A metric is one function `(predictions, references) -> MetricResult`. It never sees a model or an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm.errors import ConfigError, DataError, nearest

from .result import MetricResult

Predictions = Mapping[str, str]
References = Mapping[str, tuple[str, ...]]
MetricFunction = Callable[[Predictions, References], MetricResult]

_LISTED = 10  # ids named in an error; the count of the rest follows


@dataclass(frozen=True)
class Metric:
    """A registered metric."""

    name: str
    function: MetricFunction
    summary: str
    """One line for a list of metrics."""
    reads: Literal["references", "answers"]
    """The field of an example that holds its gold texts: free texts, or the answers that people gave to a question."""
    per_item_is_right: bool
    """Whether a per-item score of 1 means right and 0 wrong, so that a gallery may say so."""


_METRICS: dict[str, Metric] = {}
_LEFT_OUT = {
    "spice": "spice is left out: its Java program needs parser models of 2015 that pycocoevalcap no longer ships; "
    "meteor, cider, rouge_l and bleu are there",
}
_GROUPS: dict[str, tuple[str, ...]] = {"bleu": ("bleu_1", "bleu_2", "bleu_3", "bleu_4")}


def register(
    name: str, *, summary: str, reads: Literal["references", "answers"], per_item_is_right: bool = False
) -> Callable[[MetricFunction], MetricFunction]:
    """Decorator: make a function known under `name`. A name that is taken raises ValueError."""

    if name in _METRICS or name in _GROUPS:
        raise ValueError(f"a metric called {name!r} exists already; choose another name")

    def decorate(function: MetricFunction) -> MetricFunction:
        _METRICS[name] = Metric(name, function, summary, reads, per_item_is_right)
        return function

    return decorate


def names() -> list[str]:
    """Every name that `compute` knows, sorted."""
    return sorted(_METRICS)


def get(name: str) -> Metric:
    """The metric with exactly this name, else ConfigError that lists the known ones and the nearest."""
    if name in _METRICS:
        return _METRICS[name]
    if name in _LEFT_OUT:
        raise ConfigError(_LEFT_OUT[name])
    known = sorted([*_METRICS, *_GROUPS])
    raise ConfigError(f"unknown metric {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def expand(requested: Sequence[str] | str) -> list[Metric]:
    """Names (a list, or one comma-separated string) to metrics: groups such as `bleu` are spelled out, repeats dropped.

    Raises:
        ConfigError: an unknown name, or no name at all.
    """
    asked = requested.split(",") if isinstance(requested, str) else list(requested)
    flat = [member for name in asked if name.strip() for member in _GROUPS.get(name.strip(), (name.strip(),))]
    if not flat:
        raise ConfigError(f"no metric was named; known: {', '.join(sorted([*_METRICS, *_GROUPS]))}")
    return [get(name) for name in dict.fromkeys(flat)]


def compute(name: str, predictions: Predictions, references: References) -> MetricResult:
    """Score `predictions` (id -> text) against `references` (id -> gold texts) with the metric called `name`.

    Every reference needs a prediction (an empty text counts as wrong) and every prediction a reference: the denominator
    is always the number of references.

    Raises:
        ConfigError: unknown metric.
        DataError: the ids differ, an item has no reference, a text is not a string, or the metric refuses the data.
    """
    metric = get(name)
    check_pairs(predictions, references)
    return metric.function(predictions, references)


def check_pairs(predictions: Predictions, references: References) -> None:
    """Raise DataError unless both sides hold the same ids, every item has a reference and every text is a str."""
    if not references:
        raise DataError("nothing to score: there are no references")
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    if missing or extra:
        parts = [f"{len(missing)} without a prediction{_sample(missing)}"] if missing else []
        parts += [f"{len(extra)} predictions without references{_sample(extra)}"] if extra else []
        raise DataError(
            f"predictions and references must hold the same ids; got {'; '.join(parts)}. An item without an answer is"
            " scored as wrong when its prediction is the empty text; leaving it out would change the denominator"
        )
    empty = [key for key, texts in references.items() if not texts]
    if empty:
        raise DataError(f"{len(empty)} of {len(references)} items have no reference text{_sample(empty)}")
    for key, texts in references.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"references of item {key!r} must be a tuple of texts, got {texts!r}")
        if not isinstance(predictions[key], str):
            raise DataError(f"prediction of item {key!r} must be a text, got {predictions[key]!r}")


def _sample(ids: list[str]) -> str:
    shown = ", ".join(map(repr, ids[:_LISTED]))
    return f": {shown}" + (f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else "")
