"""TextVQA accuracy as mmf scores it (`m4c_evaluators.TextVQAAccuracyEvaluator`): the EvalAI answer processor.

It differs from VQA v2's rule in three ways: it always normalises, also where all answers agree; it deletes commas and
question marks first ("one,two" -> "onetwo", VQA v2: "1 2"); and it splits "'s" off.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from vlm.eval.metrics import vqa
from vlm.eval.metrics.registry import Predictions, References, refuse_few_answers, register
from vlm.eval.metrics.result import MetricResult, mean_result

NORMALIZER = "EvalAI"
_RULE = (
    "TextVQA official soft accuracy (mmf): prediction and answers always pass the EvalAI answer processor (lower case, "
    "commas and question marks deleted, 's split off, then VQA v2's punctuation, number, article and contraction "
    "steps); mean over the annotators left out one at a time of min(1, matches among the others / 3)"
)


@lru_cache(1 << 16)
def normalize(text: str) -> str:
    """The EvalAI answer processor: "The Dog's, two" -> "dog 's 2"."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa.process_digit_article(vqa.process_punctuation(vqa.flatten(words), ascii_digits=False))


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official score in [0, 1] of one prediction against the answers that people gave."""
    said = normalize(prediction)
    return vqa.leave_one_out(sum(normalize(answer) == said for answer in answers), len(answers))


@register("textvqa", summary="TextVQA soft accuracy, official rule (EvalAI processor)", reads="answers")
def textvqa(predictions: Predictions, references: References) -> MetricResult:
    """Mean of `accuracy` over the questions. Raises DataError for fewer than 4 answers."""
    refuse_few_answers("textvqa", references, vqa.AGREE + 1)
    scores = {key: accuracy(predictions[key], answers) for key, answers in references.items()}
    return mean_result("textvqa", scores, _RULE, normalizer=NORMALIZER)
