"""What needs the official caption scorer itself (pycocoevalcap, the extra `coco`) and Java: METEOR, and a cross-check.

BLEU, ROUGE-L and CIDEr need neither: `captions` computes them. `crosscheck` runs both on the same captions and says
where they differ. SPICE is left out: it needs model files of 2015 that are no longer part of the package.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from typing import Any

from vlm.errors import ConfigError, DataError
from vlm.eval.metrics import captions, ptb
from vlm.eval.metrics.registry import Predictions, References, check_pairs, register
from vlm.eval.metrics.result import MetricResult

_COMPARED = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def missing() -> str | None:
    """What METEOR and `crosscheck` lack on this machine, as the end of a sentence; None if they can run."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed: pip install 'vlm-backbone[coco]'"
    if shutil.which("java") is None:
        return "there is no `java` command: install a Java runtime (11 or newer)"
    return None


def require(wanted_for: str) -> None:
    """Raise ConfigError that says what is missing, unless the official scorer can run here."""
    lack = missing()
    if lack:
        raise ConfigError(f"{wanted_for} runs the official scorer, but {lack}")


def _meteor_process() -> Any:
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


@register("meteor", summary="METEOR 1.5 of pycocoevalcap; needs the extra `coco` and Java", reads="references")
def meteor(predictions: Predictions, references: References) -> MetricResult:
    """METEOR of pycocoevalcap: the corpus value is METEOR's own aggregate, not the mean of the items.

    Raises:
        ConfigError: pycocoevalcap or Java is missing.
        DataError: METEOR gave no answer.
    """
    require("meteor")
    scorer = _meteor_process()
    said = _our_tokens({key: [predictions[key]] for key in references})
    golds = _our_tokens({key: list(texts) for key, texts in references.items()})
    try:
        value, scores = scorer.compute_score(golds, said)
    except (ValueError, BrokenPipeError) as error:  # the Java process ended: an empty line where a number was due
        scorer.lock = _NoLock()  # still held after an error, and the scorer waits for it when it is deleted
        raise DataError(
            f"METEOR's Java process stopped before it had scored all {len(said)} items ({error}); check that `java`"
            " runs and may take 2 GB of memory"
        ) from error
    rule = (
        "METEOR 1.5 as pycocoevalcap 1.2 runs it (-l en -norm; Java); the value is METEOR's aggregate over the corpus, "
        f"not the mean of the items, so it has no interval; tokenizer {ptb.VERSION}"
    )
    per_item = dict(zip(references, scores, strict=True))
    return MetricResult("meteor", float(value), per_item, rule, "1", None, normalizer=captions.NORMALIZER)


class _NoLock:
    def acquire(self) -> None: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Crosscheck:
    """One metric, computed by us and by the official scorer."""

    name: str
    ours: float
    official: float
    """The official run from start to end, its neighbours' influence on the tokens included."""
    same_tokens: float
    """The official formula on our tokens."""
    largest_difference: float
    """The largest absolute difference of one item's scores, ours against the official formula on our tokens."""


@dataclass(frozen=True)
class CrosscheckReport:
    """What `crosscheck` found."""

    metrics: tuple[Crosscheck, ...]
    num_captions: int
    other_tokens: dict[str, tuple[str, str]]
    """Captions that the official run tokenised otherwise -> (our tokens, its tokens). It puts all captions into one
    file, where a caption can change the one before it, so a few among thousands are normal."""


def crosscheck(predictions: Predictions, references: References) -> CrosscheckReport:
    """Score the same captions with our code and with pycocoevalcap, its Java tokenizer included.

    The official tokenizer writes a temporary file beside its own code, so its folder must be writable.

    Raises:
        ConfigError: pycocoevalcap or Java is missing.
        DataError: the ids differ, an item has no reference, or no reference holds a word.
    """
    require("crosscheck")
    check_pairs(predictions, references)
    ours = {name: captions.METRICS[name](predictions, references) for name in _COMPARED}
    said = {key: [predictions[key]] for key in references}
    golds = {key: list(texts) for key, texts in references.items()}
    official_said, official_golds = _official_tokens(said), _official_tokens(golds)
    other: dict[str, tuple[str, str]] = {}
    for texts, tokenised in ((said, official_said), (golds, official_golds)):
        for key in texts:
            pairs = zip(texts[key], tokenised[key], strict=True)
            other |= {text: (ptb.tokenize(text), theirs) for text, theirs in pairs if ptb.tokenize(text) != theirs}
    official = _official_scores(official_golds, official_said)
    same_tokens = _official_scores(_our_tokens(golds), _our_tokens(said))
    rows = [_compare(ours[name], official[name][0], *same_tokens[name]) for name in _COMPARED]
    return CrosscheckReport(tuple(rows), sum(map(len, golds.values())) + len(said), other)


def _our_tokens(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    return {key: [ptb.tokenize(text) for text in group] for key, group in texts.items()}


def _official_tokens(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line separator inside a caption would shift all captions that follow, so it is a blank here, as it is for ours.
    captions_of = {key: [{"caption": ptb.one_line(text)} for text in group] for key, group in texts.items()}
    tokenised: dict[str, list[str]] = PTBTokenizer().tokenize(captions_of)
    return tokenised


def _official_scores(
    golds: dict[str, list[str]], said: dict[str, list[str]]
) -> dict[str, tuple[float, dict[str, float]]]:
    """Metric name -> (corpus value, id -> score), for the six metrics that we compute, too."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scores: dict[str, tuple[float, dict[str, float]]] = {}
    bleu_of_n, bleu_items = Bleu(4).compute_score(golds, said, verbose=0)
    for n, (value, items) in enumerate(zip(bleu_of_n, bleu_items, strict=True), start=1):
        scores[f"bleu_{n}"] = value, dict(zip(golds, map(float, items), strict=True))
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        value, items = scorer.compute_score(golds, said)
        scores[name] = float(value), dict(zip(golds, map(float, items), strict=True))
    return scores


def _compare(ours: MetricResult, official: float, same_tokens: float, items: dict[str, float]) -> Crosscheck:
    largest = max(abs(ours.per_item[key] - score) for key, score in items.items())
    return Crosscheck(ours.name, ours.value, official, same_tokens, largest)
