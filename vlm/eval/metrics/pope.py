"""POPE: does the model say yes about objects that are not there?

The official script (RUCAIBox/POPE, `evaluate.py`) reads an answer generously: "no" if the first sentence holds the word
No, no or not, else "yes". So "NO", "No!", "doesn't" and the empty text all count as yes. Where it divides by zero
(precision when nothing is answered yes, F1 when nothing is right), the value is 0 here.

An item that the model was never asked (the fact `answered` is false: its image could not be decoded) has no answer at
all. It is wrong, and no claim of yes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm.errors import DataError
from vlm.eval.metrics.registry import Info, Predictions, References, only_reference, register
from vlm.eval.metrics.result import MetricResult, bootstrap, groups, mean_result

_NO = frozenset({"No", "not", "no"})
_READING = (
    "POPE official: an answer is 'no' if No, not or no is a word of the text before the first full stop (commas "
    "deleted, split at blanks), else 'yes', an empty answer included (num_empty counts them); positive class yes; "
    "precision, recall and F1 are 0 where the official script divides by zero"
)


_UNANSWERED = "; an item that was not answered, because its image could not be decoded, is wrong and no yes"


def answer(prediction: str) -> str:
    """How the official script reads a prediction, yes or no: "It is not there." -> "no", "NO" -> "yes"."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "yes" if _NO.isdisjoint(words) else "no"


def scores(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, all in [0, 1], of answers "yes"/"no" (positive: yes).

    An answer that is neither is wrong: it is a miss where the label is yes, and no claim where it is no.
    """
    pairs = list(zip(answers, labels, strict=True))
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    claimed = sum(said == "yes" for said, _ in pairs)
    positives = sum(label == "yes" for _, label in pairs)
    precision = hits / claimed if claimed else 0.0
    recall = hits / positives if positives else 0.0
    return {
        "accuracy": sum(said == label for said, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": claimed / len(pairs),
    }


def _labels(name: str, references: References) -> dict[str, str]:
    labels = {key: only_reference(name, key, references) for key in references}
    odd = [f"{key!r}: {label!r}" for key, label in labels.items() if label not in ("yes", "no")]
    if odd:
        raise DataError(f"{name} needs the labels yes and no; {len(odd)} of {len(labels)} are others, {odd[0]} first")
    return labels


def _details(said: dict[str, str], labels: dict[str, str], info: Info) -> dict[str, float]:
    """The scores of all items, then of each split as "random/f1"."""
    details = scores(list(said.values()), list(labels.values()))
    for part, keys in groups(labels, info, "split").items():
        values = scores([said[key] for key in keys], [labels[key] for key in keys])
        details |= {f"{part}/{name}": value for name, value in values.items()}
    return details


def _read(predictions: Predictions, labels: dict[str, str], info: Info) -> dict[str, str]:
    """Every answer as the official script reads it; "" for an item that was not answered."""
    return {key: answer(predictions[key]) if info[key].get("answered", True) else "" for key in labels}


def _reading(info: Info) -> str:
    return _READING + (_UNANSWERED if all("answered" in facts for facts in info.values()) else "")


def _official(
    name: str, predictions: Predictions, references: References, info: Info
) -> tuple[dict[str, str], dict[str, str], dict[str, float]]:
    """Labels and answers (yes or no) by item, and the details: `_details`, with the number of empty answers, which the
    official script reads as yes."""
    labels = _labels(name, references)
    said = _read(predictions, labels, info)
    empty = sum(not text.strip() for text in predictions.values())
    return labels, said, _details(said, labels, info) | {"num_empty": empty}


@register(
    "pope",
    summary="POPE accuracy, official reading of answers; details: precision, recall, F1, yes ratio, each split",
    reads="references",
    per_item_is_right=True,
    uses=("split", "answered"),
)
def pope(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of right answers. Raises DataError for labels other than yes and no."""
    labels, said, details = _official("pope", predictions, references, info)
    right = {key: float(said[key] == label) for key, label in labels.items()}
    return mean_result("pope", right, f"accuracy; {_reading(info)}", normalizer="POPE", details=details)


@register(
    "pope_f1",
    summary="POPE F1 of the class yes, official reading of answers",
    reads="references",
    per_item_is_right=True,
    uses=("split", "answered"),
)
def pope_f1(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """F1 over all items; the per-item score is 1 for a right answer. Raises DataError as `pope`."""
    labels, said, details = _official("pope_f1", predictions, references, info)
    right = {key: float(said[key] == label) for key, label in labels.items()}
    rule = f"F1 of the class yes; {_reading(info)}; the per-item score is 1 for a right answer"
    counts = np.array(
        [(said[key] == labels[key] == "yes", said[key] == "yes", labels[key] == "yes") for key in sorted(labels)], float
    )
    interval = bootstrap(counts, _f1_of)
    return MetricResult("pope_f1", details["f1"], right, rule, "1", interval, normalizer="POPE", details=details)


def _f1_of(means: np.ndarray) -> np.ndarray:
    """float[R, 3] means of hits, claims and positives -> float[R] F1 = 2 hits / (claims + positives)."""
    total = means[:, 1] + means[:, 2]
    return np.divide(2 * means[:, 0], total, out=np.zeros(len(means)), where=total > 0)


@register(
    "pope_paligemma",
    summary="POPE accuracy as PaliGemma scores it: equality with yes or no after lower-casing",
    reads="references",
    per_item_is_right=True,
    uses=("split",),
)
def pope_paligemma(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Google's `pope` evaluator; details: `valid`, the share of predictions that are yes or no. Raises as `pope`."""
    labels = _labels("pope_paligemma", references)
    said = {key: predictions[key].lower() for key in labels}
    right = {key: float(said[key] == label) for key, label in labels.items()}
    details = _details(said, labels, info)
    details["valid"] = sum(text in ("yes", "no") for text in said.values()) / len(said)
    rule = (
        "PaliGemma's transfers on POPE: accuracy by equality with the label after lower-casing, nothing stripped; an "
        "answer that is neither yes nor no is wrong (valid: the share of those that are), where the official script "
        "reads most of them as yes"
    )
    return mean_result("pope_paligemma", right, rule, normalizer="lower case", details=details)
