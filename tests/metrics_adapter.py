"""The project's public metrics behind plain functions, for a checker of golden values that the official scorers made.

The checker imports this file, calls the functions and compares; nothing is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm.eval import metrics

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
