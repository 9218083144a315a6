"""Equality of texts: two rules of our own, and the benchmarks whose rule is equality.

GQA's script, and PaliGemma's evaluator for GQA, OCR-VQA, AI2D and NLVR2, compare texts as they are. Other harnesses
clean one side or both: on one mixed set of answers the same predictions are 26 % right officially, 40 % for a harness
that cleans the prediction, 41 % and 50 % for two that clean both sides.
"""

from __future__ import annotations

from collections.abc import Callable

from vlm.errors import DataError
from vlm.eval.metrics.registry import Info, Predictions, References, only_reference, register
from vlm.eval.metrics.result import MetricResult, mean_result, means_by

_LABELS = ("true", "false")
_STRICT = "1 if the prediction equals any reference after blanks at both ends are removed; case and punctuation count"
_NORMALIZED = (
    "1 if the prediction equals any reference after case folding, runs of white space made one blank, blanks at both "
    "ends and one final full stop removed"
)


def normalize(text: str) -> str:
    """The form in which `exact_match_normalized` compares: "  A Red  cat. " -> "a red cat"."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _equality(
    name: str, rule: str, form: Callable[[str], str], normalizer: str, predictions: Predictions, references: References
) -> MetricResult:
    scores = {key: float(form(predictions[key]) in {form(text) for text in gold}) for key, gold in references.items()}
    return mean_result(name, scores, rule, normalizer=normalizer)


@register("exact_match", summary="equality with any reference", reads="references", per_item_is_right=True)
def exact_match(predictions: Predictions, references: References) -> MetricResult:
    """Share of items whose stripped prediction equals one of the stripped references."""
    return _equality("exact_match", _STRICT, str.strip, "outer blanks", predictions, references)


@register(
    "exact_match_normalized",
    summary="equality with any reference, ignoring case, blanks and a final full stop",
    reads="references",
    per_item_is_right=True,
)
def exact_match_normalized(predictions: Predictions, references: References) -> MetricResult:
    """As `exact_match`, but after `normalize`."""
    normalizer = "case, white space, final full stop"
    return _equality("exact_match_normalized", _NORMALIZED, normalize, normalizer, predictions, references)


# --- Benchmarks -------------------------------------------------------------------------------------------------------


def _raw_equality(name: str, predictions: Predictions, references: References) -> dict[str, float]:
    return {key: float(predictions[key] == only_reference(name, key, references)) for key in references}


@register(
    "gqa",
    summary="GQA accuracy, official rule: equality of texts; details: binary and open questions",
    reads="references",
    per_item_is_right=True,
    uses=("structural",),
)
def gqa(predictions: Predictions, references: References, info: Info) -> MetricResult:
    """Share of predictions equal to the answer; with `structural` (choose, query, ...) also of each kind."""
    scores = _raw_equality("gqa", predictions, references)
    details = means_by(scores, info, "structural")
    kinds = {key: {"kind": "open" if info[key]["structural"] == "query" else "binary"} for key in scores if details}
    details |= means_by(scores, kinds, "kind") if kinds else {}
    rule = "GQA official: 1 if the prediction equals the answer, nothing is normalised; PaliGemma's evaluator agrees"
    return mean_result("gqa", scores, rule, details=details)


@register("ocrvqa", summary="OCR-VQA accuracy: equality of texts", reads="references", per_item_is_right=True)
def ocrvqa(predictions: Predictions, references: References) -> MetricResult:
    """Share of predictions equal to the answer."""
    rule = "OCR-VQA: 1 if the prediction equals the answer, nothing is normalised, as PaliGemma's transfers score it"
    return mean_result("ocrvqa", _raw_equality("ocrvqa", predictions, references), rule)


@register(
    "ai2d", summary="AI2D accuracy: equality with the right choice's text", reads="references", per_item_is_right=True
)
def ai2d(predictions: Predictions, references: References) -> MetricResult:
    """Share of predictions equal to the text of the right choice; AI2D has no official script."""
    rule = (
        "AI2D as PaliGemma's transfers score it: 1 if the prediction equals the text of the right choice, case "
        "included (there is no official script; harnesses that ask for letters need multiple_choice)"
    )
    return mean_result("ai2d", _raw_equality("ai2d", predictions, references), rule)


@register(
    "nlvr2",
    summary="NLVR2 accuracy, official rule: True or False, any case; details: consistency",
    reads="references",
    per_item_is_right=True,
)
def nlvr2(predictions: Predictions, references: References) -> MetricResult:
    """Share of predictions equal to the label ignoring case; the share of sentences right on all their image pairs.

    Consistency is there if all ids are NLVR2's identifiers (split-set-pair-sentence), which tell the sentence.

    Raises:
        DataError: a label is neither True nor False.
    """
    scores: dict[str, float] = {}
    for key in references:
        label = only_reference("nlvr2", key, references).lower()
        if label not in _LABELS:
            raise DataError(f"nlvr2 needs the labels True and False; that of item {key!r} is {references[key][0]!r}")
        scores[key] = float(predictions[key].lower() == label)
    details: dict[str, float] = {
        "num_not_true_or_false": sum(text.lower() not in _LABELS for text in predictions.values())
    }
    sentences: dict[tuple[str, ...], list[float]] = {}
    for key, score in scores.items():
        sentences.setdefault(_nlvr2_sentence(key), []).append(score)
    if () not in sentences:
        details["consistency"] = sum(all(right) for right in sentences.values()) / len(sentences)
    rule = (
        "NLVR2 official: 1 if the prediction is the label True or False, ignoring case (PaliGemma's evaluator does not "
        "ignore it); consistency is the share of sentences with all their image pairs right"
    )
    return mean_result("nlvr2", scores, rule, normalizer="lower case", details=details)


def _nlvr2_sentence(identifier: str) -> tuple[str, ...]:
    """What the items of one sentence share: "dev-850-2-1" -> ("dev", "850", "1"); () for other ids."""
    parts = identifier.split("-")
    return (*parts[:2], *parts[3:]) if len(parts) == 4 else ()
