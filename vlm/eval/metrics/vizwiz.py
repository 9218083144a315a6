"""VizWiz-VQA accuracy and unanswerability, with the habits of the official script (Qing Li's `VQAEval`).

Only the prediction is normalised, never the answers: "two" against ten times "two" becomes "2" and is wrong. Most of
the script's contractions are spelt with a back-tick by accident ("dont" -> "don`t"), which no answer contains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm.errors import DataError
from vlm.eval.metrics import vqa
from vlm.eval.metrics.registry import Info, Predictions, References, refuse_few_answers, register
from vlm.eval.metrics.result import MetricResult, mean_result, means_by

UNANSWERABLE = "unanswerable"
NORMALIZER = "VQA v2's on the prediction only, contractions with back-ticks"
_RULE = (
    "VizWiz official soft accuracy: the prediction is normalised as in VQA v2 (contractions come out with back-ticks), "
    "the answers are not; mean over the annotators left out one at a time of min(1, matches among the others / 3)"
)
_UNANSWERABLE_RULE = (
    "; unanswerable_ap and unanswerable_f1: average precision and F1 of saying 'unanswerable' for the questions that "
    "are marked so, 0 where undefined"
)
_APOSTROPHE_KEPT = frozenset({"aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"})


def _contractions() -> dict[str, str]:
    """The script's table, as far as it can fire: by then a prediction holds no back-tick, so keys with one never do."""
    table = {
        key: value if key in _APOSTROPHE_KEPT else value.replace("'", "`")
        for key, value in vqa.CONTRACTIONS.items()
        if "'" not in key
    }
    return table | {"couldn'tve": "couldn`t`ve", "hadn'tve": "hadn`t`ve"}


CONTRACTIONS = _contractions()


def normalize(text: str) -> str:
    """What the script does to a prediction: "They dont know." -> "they don`t know"."""
    plain = vqa.process_punctuation(vqa.flatten(text), ascii_digits=False)
    return vqa.process_digit_article(plain, CONTRACTIONS)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official score in [0, 1] of one prediction against the answers that people gave (10 in the official set)."""
    said = normalize(prediction)
    return vqa.leave_one_out(sum(answer == said for answer in answers), len(answers))


def unanswerability(said: Sequence[bool], gold: Sequence[bool]) -> tuple[float, float]:
    """(average precision, F1) of yes/no judgements that a question is unanswerable; 0 where nothing is.

    With two scores only, scikit-learn's average precision has two steps: the items said to be unanswerable at their
    precision, then all the others at the share of unanswerable ones.
    """
    positives = sum(gold)
    hits = sum(a and b for a, b in zip(said, gold, strict=True))
    claimed = sum(said)
    if not positives:
        return 0.0, 0.0
    recall = hits / positives
    average = (recall * hits / claimed if claimed else 0.0) + (1 - recall) * positives / len(gold)
    return average, 2 * hits / (claimed + positives)


def _is_answerable(key: str, facts: Mapping[str, Any]) -> bool:
    value = facts["answerable"]
    if value not in (0, 1):
        raise DataError(f"'answerable' of item {key!r} must be 0 or 1, got {value!r}")
    return bool(value)


@register(
    "vizwiz",
    summary="VizWiz soft accuracy, official rule; details: unanswerability",
    reads="answers",
    uses=("answerable", "answer_type"),
)
def vizwiz(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Mean of `accuracy` over the questions; with `answerable` (0 or 1) of all items also AP and F1.

    Raises:
        DataError: fewer than 4 answers, or `answerable` is neither 0 nor 1.
    """
    refuse_few_answers("vizwiz", references, vqa.AGREE + 1)
    scores = {key: accuracy(predictions[key], answers) for key, answers in references.items()}
    details = means_by(scores, info, "answer_type")
    rule = _RULE
    if all(info[key].get("answerable") is not None for key in references):
        said = [normalize(predictions[key]) == UNANSWERABLE for key in references]
        gold = [not _is_answerable(key, info[key]) for key in references]
        details["unanswerable_ap"], details["unanswerable_f1"] = unanswerability(said, gold)
        rule += _UNANSWERABLE_RULE
    return mean_result("vizwiz", scores, rule, normalizer=NORMALIZER, details=details)
