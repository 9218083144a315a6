"""The project's public metrics behind plain functions, for a checker of golden values that the official scorers made.

The checker imports this file, calls the functions and compares; nothing is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm.eval import metrics
from vlm.eval.metrics import anls as _anls
from vlm.eval.metrics import aokvqa as _aokvqa
from vlm.eval.metrics import boxes as _boxes
from vlm.eval.metrics import chartqa as _chartqa
from vlm.eval.metrics import choices as _choices
from vlm.eval.metrics import pope as _pope
from vlm.eval.metrics import tallyqa as _tallyqa
from vlm.eval.metrics import textvqa as _textvqa
from vlm.eval.metrics import vizwiz as _vizwiz
from vlm.eval.metrics import vqa as _vqa

CAPTIONS = {
    "Bleu_1": "bleu_1",
    "Bleu_2": "bleu_2",
    "Bleu_3": "bleu_3",
    "Bleu_4": "bleu_4",
    "ROUGE_L": "rouge_l",
    "CIDEr": "cider",
}
# What the official tokenizer takes for the end of a line; a carriage return at the very end belongs to the newline.
_SEVERAL_LINES = re.compile("[\v\f\u2028\u2029]|\r(?!$)")

vqa_v2 = _vqa.accuracy
vqa_v2_normalize = _vqa.normalize
textvqa = _textvqa.accuracy
aokvqa_direct_answer = _aokvqa.direct_answer
vizwiz = _vizwiz.accuracy
anls = _anls.anls
chartqa_relaxed = _chartqa.relaxed_match
pope_answer = _pope.answer
tallyqa = _tallyqa.match_big_vision
science_qa_choice = _choices.science_qa
box_iou = _boxes.box_iou
loc_to_box = _boxes.loc_to_box


def ptb_tokenize(texts: Sequence[str]) -> list[str | None]:
    """Tokens of each text alone. None where the official tool answers with several lines, so that none is "the" answer
    (ours takes the separator for a blank)."""
    return [None if _SEVERAL_LINES.search(text) else metrics.tokenize(text) for text in texts]


def caption_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Scores of the corpus, and of each item in order, by official name."""
    said = {str(at): text for at, text in enumerate(hypotheses)}
    golds = {str(at): tuple(texts) for at, texts in enumerate(references)}
    results = {official: metrics.compute(name, said, golds) for official, name in CAPTIONS.items()}
    items = [{official: result.per_item[key] for official, result in results.items()} for key in said]
    return {official: result.value for official, result in results.items()}, items


def gqa(prediction: str, answer: str) -> bool:
    return metrics.compute("gqa", {"q": prediction}, {"q": (answer,)}).value == 1.0


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    return _pope.scores([_pope.answer(text) for text in predictions], labels)
