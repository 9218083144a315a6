"""Multiple choice: whose reading of the answer decides what is right.

Each rule is a function `(prediction, choices) -> index or -1`. The official scripts of ScienceQA and MMMU answer at
random where they cannot read a prediction; here such a prediction is wrong and counted, and
`official_value_on_average` says what the official figure would be over many runs of that guessing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlm.errors import DataError
from vlm.eval.metrics.registry import Constants, Info, Predictions, References, only_reference, register
from vlm.eval.metrics.result import MetricResult, mean_result, means_by

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SCIENCE_QA_LETTERS = LETTERS[:5]
FAILED = -1
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in the official script
_LETTER_FIRST = re.compile(r"([A-Za-z])(?:[.:)]?|[.:)]\s.*)", re.DOTALL)
_BRACKETED = re.compile(r"[(\[]([A-Za-z])[)\]][.:,]?(?:\s.*)?", re.DOTALL)
_MARKUP = str.maketrans("", "", "*`$")
# A letter that is followed by a word is one only if it is no word itself, as "a" and "I" are.
_LETTER = r"([B-HJ-Zb-hj-z](?![\w'])|[AaIi](?=\s*(?:$|[^\w\s'])|\s+(?:because|since|as|is|for|and|due)\b))"
_LETTER_REASON = re.compile(r"([A-Z])(?=\s*[,;]|\s+(?:-|because|since|as|is|for)\b)")
_STATED = (
    r"\b(?:answer|option|choice|alternative|letter|boxed)\b['\"]?\s*(?:[:=-]\s*)?"
    r"(?:(?:is|would be|should be|must be)\b\s*:?\s*)?"
)
_STATED_LETTER = re.compile(_STATED + r"(?:(?:the\s+)?(?:option|choice|letter)\s+)?[(\[{\"']?" + _LETTER, re.IGNORECASE)
_STATED_TEXT = re.compile(_STATED + r"(?:(?:a|an|the)\s+)?[\"']?([^.\n\"']+)", re.IGNORECASE)
_UNREAD = (
    "; a prediction that cannot be read is wrong and counted (num_unparsed), where the official script guesses one of"
    " the choices at random (official_value_on_average: its mean value over such guesses)"
)


# --- Readings ---------------------------------------------------------------------------------------------------------


def _index(letter: str, num_choices: int, letters: str) -> int:
    return letters[:num_choices].find(letter)


def _found_once(prediction: str) -> str:
    found = _THE_ANSWER_IS.findall(prediction)
    return found[0] if len(found) == 1 else ""


def science_qa(prediction: str, num_choices: int) -> int:
    """ScienceQA's official reading: exactly one "The answer is X." with X among the choices (at most A to E).

    The full stop stands for any character: "The answer is Bat." is B, and "The answer is B" at the end cannot be read.
    """
    letter = _found_once(prediction)
    return _index(letter, num_choices, _SCIENCE_QA_LETTERS) if letter else FAILED


def science_qa_llava(prediction: str, num_choices: int) -> int:
    """LLaVA's reading: a letter alone, or "B. ...", else the official one."""
    if len(prediction) == 1 and prediction in _SCIENCE_QA_LETTERS:
        letter = prediction
    elif len(prediction) >= 3 and prediction[0] in _SCIENCE_QA_LETTERS and prediction[1:3] == ". ":
        letter = prediction[0]
    else:
        letter = _found_once(prediction)
    return _index(letter, num_choices, _SCIENCE_QA_LETTERS) if letter else FAILED


def science_qa_big_vision(prediction: str, num_choices: int) -> int:
    """big_vision's reading: "the answer is b." at the start, in any case."""
    match = re.match(r"the answer is ([a-z])\.", prediction.lower())
    return _index(match[1].upper(), num_choices, LETTERS) if match else FAILED


def mmmu(prediction: str, choices: Sequence[str]) -> int:
    """MMMU's reading (`parse_multi_choice_response`): the last "(B)", else the last lone "B", else a quoted choice.

    A choice's text counts only in predictions of more than five words.
    """
    text = prediction
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(choices)]
    for form in ("({})", " {} "):
        places = [text.rfind(form.format(letter)) for letter in letters]
        if max(places) >= 0:
            return places.index(max(places))
    if len(text.split()) <= 5:
        return FAILED
    places = [text.lower().rfind(choice.lower()) for choice in choices]
    return places.index(max(places)) if max(places) >= 0 else FAILED


def by_name(prediction: str, choices: Sequence[str]) -> int:
    """Our own reading: a choice's text, else its letter, alone, first or stated.

    The text may stand alone or after "the answer is" and the like, ignoring case, outer blanks, an article and a final
    full stop. The letter may stand alone ("B", "b.", "(B)"), come first ("B) a cat", "B because ...") or be stated
    ("The answer is B.", "Answer: (b)", "Option B is right"). What fits two choices fits none. "A cat" is no letter.
    """
    stated = _STATED_TEXT.search(prediction)
    for said in (prediction, prediction.partition("\n")[0], stated[1] if stated else ""):
        equal = [index for index, choice in enumerate(choices) if said.strip() and _plain(choice) == _plain(said)]
        if equal:
            return equal[0] if len(equal) == 1 else FAILED
    text = prediction.strip().translate(_MARKUP)
    line = text.partition("\n")[0].rstrip()
    first = _LETTER_FIRST.fullmatch(line) or _BRACKETED.fullmatch(line) or _LETTER_REASON.match(line)
    letters = {first[1].upper()} if first else {found[1].upper() for found in _STATED_LETTER.finditer(text)}
    return _index(letters.pop(), len(choices), LETTERS) if len(letters) == 1 else FAILED


def _plain(text: str) -> str:
    return text.translate(_MARKUP).strip().removesuffix(".").rstrip().casefold()


# --- The right choice -------------------------------------------------------------------------------------------------


def right_choice(name: str, key: str, references: References, info: Info) -> int:
    """Index of the right choice of an item: `answer_index`, else from the gold text.

    The gold text is the choice's text, its letter, or "The answer is B.".

    Raises:
        DataError: the choices are no list of texts, or the gold text names none or several of them.
    """
    choices = _choices(name, key, info)
    index: Any = info[key].get("answer_index")
    if index is not None:
        if type(index) is not int or not 0 <= index < len(choices):
            raise DataError(f"{name}: 'answer_index' of item {key!r} is {index!r}, and it has {len(choices)} choices")
        return int(index)
    gold = only_reference(name, key, references)
    letters = LETTERS[: len(choices)]
    meant = {place for place, choice in enumerate(choices) if choice == gold}
    meant |= {letters.index(gold)} if len(gold) == 1 and gold in letters else set()
    if len(meant) > 1:
        raise DataError(f"{name}: the gold answer {gold!r} of item {key!r} fits several choices; give 'answer_index'")
    if meant:
        return meant.pop()
    match = re.fullmatch(r"The answer is ([A-Z])\.", gold)
    if match and match[1] in letters:
        return letters.index(match[1])
    raise DataError(f"{name}: the gold answer {gold!r} of item {key!r} is none of its choices: {', '.join(choices)}")


def _choices(name: str, key: str, info: Info) -> list[str]:
    choices = info[key]["choices"]
    texts = list(choices) if isinstance(choices, list | tuple) else []
    if not texts or len(texts) > len(LETTERS) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{name}: 'choices' of item {key!r} must be a list of 1 to 26 texts, got {choices!r}")
    return texts


# --- Registered metrics -----------------------------------------------------------------------------------------------


Reading = Callable[[str, Sequence[str]], int]


def _counting(read: Callable[[str, int], int]) -> Reading:
    """A reading that only asks how many choices there are."""
    return lambda prediction, choices: read(prediction, len(choices))


def _score(
    name: str,
    rule: str,
    read: Reading,
    predictions: Predictions,
    references: References,
    info: Info,
    *,
    guesses: bool,
) -> MetricResult:
    scores: dict[str, float] = {}
    guess, unread = 0.0, 0
    for key in references:
        right = right_choice(name, key, references, info)
        choices = _choices(name, key, info)
        said = read(predictions[key], choices)
        scores[key] = float(said == right)
        if said == FAILED:
            unread += 1
            guess += 1 / len(choices) if info[key].get("answered", True) else 0.0
    details: dict[str, float] = means_by(scores, info, "subject")
    details["num_unparsed"] = unread
    if guesses:
        details["official_value_on_average"] = (sum(scores.values()) + guess) / len(scores)
    notes = [f"{unread} of {len(scores)} answers could not be read as a choice and count as wrong"] if unread else []
    return mean_result(name, scores, rule, normalizer="choice", details=details, notes=notes)


def _letters(form: str) -> Constants:
    """The first letter for every item, the second, ... as `form` says it."""

    def constants(references: References, info: Info) -> list[str]:
        longest = max(len(_choices("", key, info)) for key in references)
        return [form.format(letter) for letter in LETTERS[:longest]]

    return constants


@register(
    "scienceqa",
    summary="ScienceQA accuracy, official reading ('The answer is B.')",
    reads="references",
    per_item_is_right=True,
    needs=("choices",),
    constants=_letters("The answer is {}."),
    uses=("answer_index", "subject", "answered"),
)
def scienceqa(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of right choices under `science_qa`. Raises DataError as `right_choice`."""
    rule = f"ScienceQA official: the prediction holds exactly one 'The answer is X.'{_UNREAD}"
    return _score("scienceqa", rule, _counting(science_qa), predictions, references, info, guesses=True)


@register(
    "scienceqa_llava",
    summary="ScienceQA accuracy with LLaVA's reading ('B', 'B. cat' or 'The answer is B.')",
    reads="references",
    per_item_is_right=True,
    needs=("choices",),
    constants=_letters("{}"),
    uses=("answer_index", "subject"),
)
def scienceqa_llava(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of right choices under `science_qa_llava`. Raises DataError as `right_choice`."""
    rule = (
        "ScienceQA as LLaVA scores it: a letter alone, 'B. ...' or one 'The answer is B.'; what cannot be read is wrong"
    )
    return _score("scienceqa_llava", rule, _counting(science_qa_llava), predictions, references, info, guesses=False)


@register(
    "scienceqa_paligemma",
    summary="ScienceQA accuracy as PaliGemma scores it ('the answer is b.' at the start, any case)",
    reads="references",
    per_item_is_right=True,
    needs=("choices",),
    constants=_letters("The answer is {}."),
    uses=("answer_index", "subject"),
)
def scienceqa_paligemma(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of right choices under `science_qa_big_vision`. Raises DataError as `right_choice`."""
    rule = (
        "ScienceQA as PaliGemma's transfers score it: the prediction starts with 'the answer is b.', in any case and "
        "with a true full stop; what cannot be read is wrong (the official script looks anywhere, wants one match, "
        "and guesses where it finds none)"
    )
    return _score(
        "scienceqa_paligemma", rule, _counting(science_qa_big_vision), predictions, references, info, guesses=False
    )


@register(
    "mmmu",
    summary="multiple choice of MMMU, official reading",
    reads="references",
    per_item_is_right=True,
    needs=("choices",),
    constants=_letters("{}"),
    uses=("answer_index", "subject", "answered"),
)
def mmmu_metric(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of right choices under `mmmu`. Raises DataError as `right_choice`."""
    rule = (
        "MMMU official reading of multiple choice: the last '(B)', else the last lone 'B', else, in predictions of "
        f"more than five words, the last quoted choice{_UNREAD}"
    )
    return _score("mmmu", rule, mmmu, predictions, references, info, guesses=True)


@register(
    "multiple_choice",
    summary="multiple choice by the choice's text or letter (our own reading)",
    reads="references",
    per_item_is_right=True,
    needs=("choices",),
    constants=_letters("{}"),
    uses=("answer_index", "subject"),
)
def multiple_choice(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of right choices under `by_name`. Raises DataError as `right_choice`."""
    rule = (
        "our own reading: the prediction is a choice's text (ignoring case, outer blanks, a final full stop), alone or "
        "after 'the answer is', else its letter, alone ('B', 'b.', '(B)'), first ('B) a cat', 'B because ...') or "
        "stated ('The answer is B.', 'Answer: B'); what cannot be read, or names several, is wrong and counted "
        "(num_unparsed)"
    )
    result = _score("multiple_choice", rule, by_name, predictions, references, info, guesses=False)
    return replace(result, version="2")
