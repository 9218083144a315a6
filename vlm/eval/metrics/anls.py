"""ANLS, the average normalised Levenshtein similarity of DocVQA, InfographicVQA and ST-VQA, in three traditions.

They agree on most answers and differ at the edges: what is cleaned away, by which length the distance is divided, and
whether a similarity of exactly 0.5 counts. "abc" against "abcdef" is 0.5 by the first two and 0 by the third.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from vlm.eval.metrics.registry import Predictions, References, register
from vlm.eval.metrics.result import MetricResult, mean_result

THRESHOLD = 0.5
_RULE = "mean over questions of the best answer's 1 - Levenshtein distance / length of the longer text"


def anls(prediction: str, answers: Sequence[str]) -> float:
    """The server script of the Robust Reading Competition (`infographicsvqa_eval.py`), score in [0, 1].

    The distance is taken between cleaned texts, the length from the original ones in capitals, outer blanks included:
    "x" and ten blanks against "xy" is 1 - 1/11.
    """
    said = _fold(prediction)
    nearest = min(
        _ratio(Levenshtein.distance(_fold(answer), said), max(len(answer.upper()), len(prediction.upper())))
        for answer in answers
    )
    return 1 - nearest if 1 - nearest >= THRESHOLD else 0.0


def anls_stvqa(prediction: str, answers: Sequence[str]) -> float:
    """mmf's `STVQAANLSEvaluator`; it divides by zero for "" against "", which is 1 here."""
    return max(_stvqa_similarity(prediction.lower().strip(), answer.lower().strip()) for answer in answers)


def anls_big_vision(prediction: str, answers: Sequence[str]) -> float:
    """big_vision's `vqa` evaluator with `to_lower`, as PaliGemma's transfers use it."""
    return max(_big_vision_similarity(prediction.lower(), answer.lower()) for answer in answers)


def _fold(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _ratio(distance: int, length: int) -> float:
    return distance / length if length else 0.0


def _stvqa_similarity(said: str, gold: str) -> float:
    similarity = 1 - _ratio(Levenshtein.distance(said, gold), max(len(said), len(gold)))
    return similarity if similarity >= THRESHOLD else 0.0


def _big_vision_similarity(said: str, gold: str) -> float:
    if not gold:
        return float(not said)
    distance = Levenshtein.distance(said, gold) / max(len(said), len(gold))
    return 1 - distance if distance < THRESHOLD else 0.0


def _score(
    name: str,
    rule: str,
    normalizer: str,
    score: Callable[[str, Sequence[str]], float],
    predictions: Predictions,
    references: References,
) -> MetricResult:
    scores = {key: score(predictions[key], answers) for key, answers in references.items()}
    return mean_result(name, scores, f"{_RULE}; {rule}", normalizer=normalizer)


@register("anls", summary="ANLS of DocVQA and InfographicVQA, the official server's rule", reads="answers")
def anls_metric(predictions: Predictions, references: References) -> MetricResult:
    """Mean of `anls` over the questions."""
    rule = (
        "as the Robust Reading Competition's server computes it: lower case, runs of white space made one blank, "
        "length of the original texts, 0 below 0.5 (exactly 0.5 counts)"
    )
    return _score("anls", rule, "lower case and white space", anls, predictions, references)


@register("stvqa_anls", summary="ANLS of ST-VQA as mmf computes it", reads="answers")
def stvqa_anls(predictions: Predictions, references: References) -> MetricResult:
    """Mean of `anls_stvqa` over the questions."""
    rule = "as mmf computes it for ST-VQA: lower case, outer blanks removed, length of these texts, 0 below 0.5"
    return _score("stvqa_anls", rule, "lower case and outer blanks", anls_stvqa, predictions, references)


@register(
    "anls_paligemma",
    summary="ANLS of PaliGemma's transfers (38 of 198 answers differ from the server's)",
    reads="answers",
)
def anls_paligemma(predictions: Predictions, references: References) -> MetricResult:
    """Mean of `anls_big_vision` over the questions."""
    rule = (
        "as PaliGemma's transfers compute it: lower case and no other cleaning, 0 at 0.5 and below (the official "
        "server counts exactly 0.5, folds white space and takes the original lengths)"
    )
    return _score("anls_paligemma", rule, "lower case", anls_big_vision, predictions, references)
