"""VQA v2 accuracy, with every habit of the official script (GT-Vision-Lab/VQA, `vqaEval.py`).

Written to give the script's numbers, not to mend them. What surprises people, kept on purpose:

- Normalisation happens only if the answers of a question are not all the same text. Against ten times "yes" the
  prediction "Yes" is wrong.
- A full stop goes unless a digit follows it ("3." -> "3", ".5" stays), and only the first 32 of them, because the
  script passes `re.UNICODE` (32) where `re.sub` expects a count.
- A text that becomes empty still matches: prediction "the" equals answer "a".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm.errors import DataError

from .registry import Predictions, References, register
from .result import MetricResult, mean_of

_RULE = (
    "VQA v2 official soft accuracy: mean over the annotators left out one at a time of min(1, matches among the others "
    "/ 3); answers and prediction are normalised (punctuation, number words, articles, contractions) unless all "
    "answers are identical"
)
_AGREE = 3  # annotators who must agree for the full score
_MAX_PERIODS = int(re.UNICODE)  # 32, see the module docstring

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The script writes (?!<=\d)(\.)(?!\d); its first group is a typo that matches anywhere. Python 2's \d is ASCII only.
_PERIOD = re.compile(r"\.(?!\d)", re.ASCII)
_DIGIT_COMMA = re.compile(r"\d,\d", re.ASCII)
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}


def _contractions() -> dict[str, str]:
    """The script's table (BSD 2-clause): misspelt -> spelt, for words that are already lower-cased.

    The table is stored as the right spellings, because its keys are those with one apostrophe, or all, left out.
    """
    one_missing = (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
        "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
        "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
        "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
        "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
        "you'd you'll you're you've"
    ).split()
    two_parts = (
        "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
        "something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've"
    ).split()
    table = {word.replace("'", ""): word for word in one_missing}
    for word in two_parts:
        stem, first, second = word.split("'")
        table[f"{stem}{first}'{second}"] = table[f"{stem}'{first}{second}"] = word
    for key in ("ow's'at", "'ows'at", "'ow'sat"):
        table[key] = "'ow's'at"
    table |= {"yall'll": "y'all'll", "y'allll": "y'all'll"}
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table["somebody'd"] = "somebodyd"  # the script has this one the wrong way round
    return table


_CONTRACTIONS = _contractions()


def process_punctuation(text: str) -> str:
    """The script's `processPunctuation`: "t-shirt" -> "t shirt", "t- shirt" -> "t shirt", "1,000" -> "1000"."""
    out = text
    digit_comma = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            touches_blank = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if touches_blank or digit_comma else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def process_digit_article(text: str) -> str:
    """The script's `processDigitArticle`: lower case, number words to digits, no articles, contractions spelt."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize(text: str) -> str:
    """Both steps, in the script's order: "The two t-shirts." -> "2 t shirts"."""
    return process_digit_article(process_punctuation(text))


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official score in [0, 1] of one prediction against the answers that people gave (10 in the official sets)."""
    given = [_flatten(answer) for answer in answers]
    said = _flatten(prediction)
    if len(set(given)) > 1:
        given = [normalize(answer) for answer in given]
        said = normalize(said)
    matches = sum(answer == said for answer in given)
    # Leaving out an annotator who agreed leaves one match fewer among the others.
    agree, differ = matches, len(given) - matches
    total = agree * min(1.0, (matches - 1) / _AGREE) + differ * min(1.0, matches / _AGREE)
    return total / len(given)


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@register("vqa_accuracy", summary="VQA v2 soft accuracy, official rule", reads="answers")
def vqa_accuracy(predictions: Predictions, references: References) -> MetricResult:
    """Mean of `accuracy` over the questions.

    Raises:
        DataError: a question has fewer than 4 answers, so that no prediction could reach 1 under this rule.
    """
    few = [key for key, answers in references.items() if len(answers) <= _AGREE]
    if few:
        raise DataError(
            f"vqa_accuracy leaves one annotator out and wants {_AGREE} others to agree, so each question needs at least"
            f" {_AGREE + 1} answers (the official sets have 10); {len(few)} of {len(references)} questions have fewer,"
            f" first {few[0]!r} with {len(references[few[0]])}. Use exact_match for a single gold answer"
        )
    scores = {key: accuracy(predictions[key], answers) for key, answers in references.items()}
    value, interval = mean_of(scores)
    return MetricResult("vqa_accuracy", value, scores, _RULE, "1", interval)
