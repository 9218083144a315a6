"""TallyQA: counting, simple and complex questions apart.

The official figures are accuracy over whole numbers, and the root of the mean squared error. How a generated text
becomes a number is not part of them: `tallyqa` has a rule of its own, `tallyqa_paligemma` is Google's.
"""

from __future__ import annotations

import math
import re

from vlm.errors import DataError
from vlm.eval.metrics.registry import Info, Predictions, References, only_reference, register
from vlm.eval.metrics.result import MetricResult, mean_result, means_by

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_NUMERALS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}
_WHOLE = re.compile(r"[+-]?[0-9]{1,15}")


def to_numeral(text: str) -> str:
    """A whole text that is a number word, none and zero to twenty, as digits: "Three" -> "3"; others unchanged."""
    return _NUMERALS.get(text.lower(), text)


def match_big_vision(prediction: str, answer: str) -> bool:
    """big_vision's rule: both through `to_numeral`, then equality; "3." and " 3" are wrong."""
    return to_numeral(prediction) == to_numeral(answer)


def count(text: str) -> int | None:
    """The number that a text as a whole denotes: " 3." and "Three" -> 3; None for "3 dogs" or ""."""
    word = to_numeral(text.strip().removesuffix("."))
    return int(word) if _WHOLE.fullmatch(word) else None


@register(
    "tallyqa",
    summary="TallyQA accuracy over whole numbers; details: RMSE, simple and complex apart",
    reads="references",
    per_item_is_right=True,
    uses=("split",),
)
def tallyqa(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of predictions that denote the gold number.

    Raises:
        DataError: a gold answer is not a whole number.
    """
    said = {key: count(predictions[key]) for key in references}
    gold = {key: _gold(key, references) for key in references}
    scores = {key: float(said[key] == gold[key]) for key in references}
    errors = [(number - gold[key]) ** 2 for key, number in said.items() if number is not None]
    details: dict[str, float] = means_by(scores, info, "split")
    details["num_not_a_number"] = len(said) - len(errors)
    if errors:
        details["rmse_of_numbers"] = math.sqrt(sum(errors) / len(errors))
    rule = (
        "TallyQA: 1 if the prediction as a whole, outer blanks and a final full stop removed, is the gold number in "
        "digits or as a word (none, zero to twenty); other texts are wrong and counted (num_not_a_number), and "
        "rmse_of_numbers is over the numbers only"
    )
    return mean_result("tallyqa", scores, rule, normalizer="whole number", details=details)


def _gold(key: str, references: References) -> int:
    text = only_reference("tallyqa", key, references)
    number = count(text)
    if number is None:
        raise DataError(f"tallyqa compares whole numbers; the gold answer of item {key!r} is {text!r}")
    return number


@register(
    "tallyqa_paligemma",
    summary="TallyQA accuracy as PaliGemma scores it: equality of texts after number words become digits",
    reads="references",
    per_item_is_right=True,
    uses=("split",),
)
def tallyqa_paligemma(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Mean of `match_big_vision`."""
    scores = {
        key: float(match_big_vision(predictions[key], only_reference("tallyqa_paligemma", key, references)))
        for key in references
    }
    rule = (
        "PaliGemma's transfers on TallyQA: equality after a text that is one number word (none, zero to twenty) has "
        "become digits; nothing is stripped, so '3.' is wrong"
    )
    details = means_by(scores, info, "split")
    return mean_result("tallyqa_paligemma", scores, rule, normalizer="number words", details=details)
