"""A-OKVQA as its authors score it (allenai/aokvqa, `eval_predictions.py`): plain equality of texts.

PaliGemma's transfers use the direct-answer rule for OK-VQA and VizWiz too, where the official scripts normalise and
leave annotators out; so 2 of 10 matches give 0.667 there and 0.6 officially.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm.eval.metrics.registry import Info, Predictions, References, only_reference, refuse_few_answers, register
from vlm.eval.metrics.result import MetricResult, mean_result

_AGREE = 3
_RULE = "min(1, number of answers that equal the prediction / 3); nothing is normalised, no annotator is left out"


def direct_answer(prediction: str, answers: Sequence[str]) -> float:
    """Score in [0, 1] of one prediction: min(1, matches / 3)."""
    return min(1.0, sum(answer == prediction for answer in answers) / _AGREE)


def _scores(name: str, predictions: Predictions, references: References) -> dict[str, float]:
    refuse_few_answers(name, references, _AGREE)
    return {key: direct_answer(predictions[key], answers) for key, answers in references.items()}


@register("aokvqa_da", summary="A-OKVQA direct answer, official rule", reads="answers")
def aokvqa_da(predictions: Predictions, references: References) -> MetricResult:
    """Mean of `direct_answer`. The official script does not score questions marked `difficult_direct_answer`.

    Which questions are scored is for the caller to say: what reads the official file leaves those out.

    Raises:
        DataError: fewer than 3 answers.
    """
    rule = f"A-OKVQA official, direct answer: {_RULE} (questions marked difficult_direct_answer do not belong here)"
    return mean_result("aokvqa_da", _scores("aokvqa_da", predictions, references), rule)


@register(
    "aokvqa_mc",
    summary="A-OKVQA multiple choice, official rule: the choice's text",
    reads="references",
    per_item_is_right=True,
    uses=("choices",),
)
def aokvqa_mc(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of predictions that equal the right choice's text; with `choices`, counts predictions that are none."""
    scores = {key: float(predictions[key] == only_reference("aokvqa_mc", key, references)) for key in references}
    details: dict[str, float] = {}
    rule = "A-OKVQA official, multiple choice: 1 if the prediction equals the text of the right choice"
    if all(info[key].get("choices") is not None for key in references):
        details["num_not_a_choice"] = sum(predictions[key] not in info[key]["choices"] for key in references)
        rule += "; a prediction that is no choice, which the official script refuses, is wrong and counted"
    return mean_result("aokvqa_mc", scores, rule, details=details)


@register(
    "okvqa_paligemma",
    summary="OK-VQA as PaliGemma scores it: equality, min(1, n/3)",
    reads="answers",
)
def okvqa_paligemma(predictions: Predictions, references: References) -> MetricResult:
    """Google's `vqa` evaluator on OK-VQA: A-OKVQA's rule."""
    rule = f"PaliGemma's transfers on OK-VQA: {_RULE}; the official OK-VQA rule does both (2 of 10 matches: 0.6 there)"
    return mean_result("okvqa_paligemma", _scores("okvqa_paligemma", predictions, references), rule)


@register(
    "vizwiz_paligemma",
    summary="VizWiz as PaliGemma scores it: equality, min(1, n/3) (121 of 212 answers differ)",
    reads="answers",
)
def vizwiz_paligemma(predictions: Predictions, references: References) -> MetricResult:
    """Google's `vqa` evaluator on VizWiz: A-OKVQA's rule."""
    rule = f"PaliGemma's transfers on VizWiz: {_RULE}; the official VizWiz rule does both (to the prediction)"
    return mean_result("vizwiz_paligemma", _scores("vizwiz_paligemma", predictions, references), rule)
