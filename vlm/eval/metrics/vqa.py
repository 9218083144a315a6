"""VQA v2 accuracy, with every habit of the official script (GT-Vision-Lab/VQA, `vqaEval.py`).

Written to give the script's numbers, not to mend them. What surprises people, kept on purpose:

- Normalisation happens only if the answers of a question are not all the same text. Against ten times "yes" the
  prediction "Yes" is wrong.
- A full stop goes unless a digit follows it ("3." -> "3", ".5" stays), and only the first 32 of them, because the
  script passes `re.UNICODE` (32) where `re.sub` expects a count.
- A text that becomes empty still matches: prediction "the" equals answer "a".

OK-VQA is scored by the same script (its five answers are each doubled). Google's evaluator of VQAv2 and TextVQA is this
one without the cap of 32 full stops, and with digits of all scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from vlm.eval.metrics.registry import Info, Predictions, References, refuse_few_answers, register
from vlm.eval.metrics.result import MetricResult, mean_result, means_by

NORMALIZER = "VQA v2 official"
_RULE = (
    "VQA v2 official soft accuracy: mean over the annotators left out one at a time of min(1, matches among the others "
    "/ 3); answers and prediction are normalised (punctuation, number words, articles, contractions) unless all "
    "answers are identical"
)
AGREE = 3  # annotators who must agree for the full score
_REMEMBERED = 1 << 16  # texts whose normal form is kept: the ten answers of a question repeat each other
MAX_PERIODS = int(re.UNICODE)  # 32, see the module docstring

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The script writes (?!<=\d)(\.)(?!\d); its first group is a typo that matches anywhere. Python 2's \d is ASCII only.
_PERIOD = re.compile(r"\.(?!\d)", re.ASCII)
_DIGIT_COMMA = re.compile(r"\d,\d", re.ASCII)
# The same under Python 3, as the scripts of TextVQA, VizWiz and PaliGemma run it: digits of all scripts.
_ANY_PERIOD = re.compile(r"\.(?!\d)")
_ANY_DIGIT_COMMA = re.compile(r"\d,\d")
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


CONTRACTIONS = _contractions()


def process_punctuation(text: str, *, ascii_digits: bool = True, max_periods: int = MAX_PERIODS) -> str:
    """The script's `processPunctuation`: "t-shirt" -> "t shirt", "t- shirt" -> "t shirt", "1,000" -> "1000".

    Args:
        text: the answer as given.
        ascii_digits: only 0-9 are digits, as under Python 2; else the digits of every script.
        max_periods: how many full stops go at most; 0 for no limit.
    """
    out = text
    digit_comma = (_DIGIT_COMMA if ascii_digits else _ANY_DIGIT_COMMA).search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            touches_blank = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if touches_blank or digit_comma else " ")
    return (_PERIOD if ascii_digits else _ANY_PERIOD).sub("", out, count=max_periods)


def process_digit_article(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """The script's `processDigitArticle`: lower case, number words to digits, no articles, contractions spelt."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(_REMEMBERED)
def normalize(text: str) -> str:
    """Both steps, in the script's order: "The two t-shirts." -> "2 t shirts"."""
    return process_digit_article(process_punctuation(text))


@lru_cache(_REMEMBERED)
def normalize_big_vision(text: str) -> str:
    """As `normalize`, the way Google's evaluator has it: no limit on full stops, digits of all scripts."""
    return process_digit_article(process_punctuation(text, ascii_digits=False, max_periods=0))


def flatten(text: str) -> str:
    """Line breaks and tabs as blanks, none at the ends: what the scripts do before anything else."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(matches: int, num_answers: int) -> float:
    """Mean over the answers left out one at a time of min(1, matches among the others / 3).

    `matches` of the answers equal the prediction. Leaving out one of them leaves one match fewer among the others, so
    0, 1, 2, 3, 4 matches of 10 give 0, 0.3, 0.6, 0.9, 1.
    """
    agree, differ = matches, num_answers - matches
    total = agree * min(1.0, (matches - 1) / AGREE) + differ * min(1.0, matches / AGREE)
    return total / num_answers


def accuracy(prediction: str, answers: Sequence[str], form: Callable[[str], str] = normalize) -> float:
    """Official score in [0, 1] of one prediction against the answers that people gave (10 in the official sets)."""
    given = [flatten(answer) for answer in answers]
    said = flatten(prediction)
    if len(set(given)) > 1:
        given = [form(answer) for answer in given]
        said = form(said)
    return leave_one_out(sum(answer == said for answer in given), len(given))


def accuracy_big_vision(prediction: str, answers: Sequence[str]) -> float:
    """As `accuracy`, with `normalize_big_vision`."""
    return accuracy(prediction, answers, normalize_big_vision)


def _score(
    name: str,
    rule: str,
    score: Callable[[str, Sequence[str]], float],
    predictions: Predictions,
    references: References,
    info: Info,
) -> MetricResult:
    refuse_few_answers(name, references, AGREE + 1)
    scores = {key: score(predictions[key], answers) for key, answers in references.items()}
    parts = means_by(scores, info, "answer_type")
    return mean_result(name, scores, rule, normalizer=NORMALIZER, details=parts)


@register("vqa_accuracy", summary="VQA v2 soft accuracy, official rule", reads="answers", uses=("answer_type",))
def vqa_accuracy(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Mean of `accuracy` over the questions; details: the mean of each `answer_type`.

    Raises:
        DataError: a question has fewer than 4 answers, so that no prediction could reach 1 under this rule.
    """
    return _score("vqa_accuracy", _RULE, accuracy, predictions, references, info)


@register(
    "okvqa", summary="OK-VQA soft accuracy, official rule (VQA v2's script)", reads="answers", uses=("answer_type",)
)
def okvqa(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """As `vqa_accuracy`: OK-VQA is scored by the same script on ten answers, five doubled."""
    return _score("okvqa", _RULE, accuracy, predictions, references, info)


_BIG_VISION = f"{_RULE}; as in PaliGemma's transfers, {{}} without the official limit of 32 removed full stops"


@register(
    "vqa_accuracy_paligemma",
    summary="VQA v2 soft accuracy of PaliGemma's evaluator (2 of 482 answers differ)",
    reads="answers",
    uses=("answer_type",),
)
def vqa_accuracy_paligemma(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Google's `vqav2` evaluator: the official rule without the limit of 32 full stops."""
    rule = _BIG_VISION.format("that is the official rule")
    return _score("vqa_accuracy_paligemma", rule, accuracy_big_vision, predictions, references, info)


@register(
    "textvqa_paligemma",
    summary="TextVQA as PaliGemma scores it: VQA v2's rule (31 of 272 answers differ from TextVQA's)",
    reads="answers",
)
def textvqa_paligemma(predictions: Predictions, references: References) -> MetricResult:
    """Google's `vqav2` evaluator on TextVQA: nothing is normalised where all answers agree, commas become blanks."""
    rule = _BIG_VISION.format("that is VQA v2's normaliser and not TextVQA's (EvalAI)")
    return _score(
        "textvqa_paligemma", rule, accuracy_big_vision, predictions, references, {key: {} for key in references}
    )
