"""ChartQA relaxed accuracy, as pix2struct computes it (`metrics.relaxed_correctness`), the de-facto reference.

What follows from its `float()`: "50" against "50%" is wrong and "0.5" against "50%" right; "1,000" is text; "nan" is
never right, not even against "nan"; against "0" only the same text is right, so "0.0" is wrong.
"""

from __future__ import annotations

import math

from vlm.eval.metrics.registry import Info, Predictions, References, register
from vlm.eval.metrics.result import MetricResult, mean_result, means_by

TOLERANCE = 0.05
_RULE = (
    "ChartQA relaxed accuracy (pix2struct): numbers (a final % divides by 100) are right within 5 % of the gold "
    "number, everything else, and a gold 0, by equality ignoring case; the best of several gold texts"
)
_PARTS_RULE = "; mean_of_parts is the mean of the human and the augmented part's accuracy"


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction: str, target: str) -> bool:
    """Whether a prediction is right: "9.5" against "10", "Yes" against "yes"."""
    said, gold = _number(prediction), _number(target)
    if said is not None and gold:  # a NaN is true and then fails the comparison, as in the reference code
        return abs(said - gold) / abs(gold) <= TOLERANCE
    return prediction.lower() == target.lower()


def _score(name: str, rule: str, predictions: Predictions, references: References, info: Info) -> MetricResult:
    scores = {
        key: float(any(relaxed_match(predictions[key], target) for target in targets))
        for key, targets in references.items()
    }
    parts = means_by(scores, info, "split")
    if len(parts) > 1:
        parts["mean_of_parts"] = math.fsum(parts.values()) / len(parts)
        rule += _PARTS_RULE
    return mean_result(name, scores, rule, normalizer="lower case", details=parts)


@register(
    "chartqa",
    summary="ChartQA relaxed accuracy; details: human and augmented apart",
    reads="references",
    per_item_is_right=True,
    uses=("split",),
)
def chartqa(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of right predictions; with `split` (human, augmented) also of each part, and the mean of the parts."""
    return _score("chartqa", _RULE, predictions, references, info)


@register(
    "chartqa_paligemma",
    summary="ChartQA as PaliGemma scores it: the same rule after lower-casing",
    reads="references",
    per_item_is_right=True,
    uses=("split",),
)
def chartqa_paligemma(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Google's `chartqa` evaluator: both texts in lower case first, then compared with case, which is the same."""
    rule = f"{_RULE}; PaliGemma's evaluator lower-cases both texts first and then compares with case: the same values"
    return _score("chartqa_paligemma", rule, predictions, references, info)
