"""Equality of texts, in two strengths."""

from __future__ import annotations

from collections.abc import Callable

from .registry import Predictions, References, register
from .result import MetricResult, mean_of

_STRICT = "1 if the prediction equals any reference after blanks at both ends are removed; case and punctuation count"
_NORMALIZED = (
    "1 if the prediction equals any reference after case folding, runs of white space made one blank, blanks at both "
    "ends and one final full stop removed"
)


def normalize(text: str) -> str:
    """The form in which `exact_match_normalized` compares: "  A Red  cat. " -> "a red cat"."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _equality(
    name: str, rule: str, form: Callable[[str], str], predictions: Predictions, references: References
) -> MetricResult:
    scores = {key: float(form(predictions[key]) in {form(text) for text in gold}) for key, gold in references.items()}
    value, interval = mean_of(scores)
    return MetricResult(name, value, scores, rule, "1", interval)


@register("exact_match", summary="equality with any reference", reads="references", per_item_is_right=True)
def exact_match(predictions: Predictions, references: References) -> MetricResult:
    """Share of items whose stripped prediction equals one of the stripped references."""
    return _equality("exact_match", _STRICT, str.strip, predictions, references)


@register(
    "exact_match_normalized",
    summary="equality with any reference, ignoring case, blanks and a final full stop",
    reads="references",
    per_item_is_right=True,
)
def exact_match_normalized(predictions: Predictions, references: References) -> MetricResult:
    """As `exact_match`, but after `normalize`."""
    return _equality("exact_match_normalized", _NORMALIZED, normalize, predictions, references)
