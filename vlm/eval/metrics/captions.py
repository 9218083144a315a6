"""BLEU, ROUGE-L and CIDEr-D as pycocoevalcap 1.2 computes them, on captions that are tokenised already.

The functions `bleu`, `rouge_l` and `cider_d` take token texts (tokens joined by one blank), so that they can be
compared with the official code apart from the tokenizer; the registered metrics tokenise first. What pycocoevalcap
calls CIDEr is CIDEr-D: clipped counts, a length penalty with sigma 6, times 10.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.errors import DataError
from vlm.eval.metrics import ptb
from vlm.eval.metrics.registry import MetricFunction, Predictions, References, register
from vlm.eval.metrics.result import MetricResult, bootstrap, mean_of

MAX_N = 4
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against 0/0; they show in the last digits, so they are kept
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0

NGram = tuple[str, ...]


def count_ngrams(tokens: str, max_n: int = MAX_N) -> Counter[NGram]:
    """Counts of all n-grams of 1 to `max_n` words: "a b a" -> {(a,): 2, (b,): 1, (a, b): 1, (b, a): 1, ...}."""
    words = tokens.split()
    return Counter(tuple(words[start : start + n]) for n in range(1, max_n + 1) for start in range(len(words) - n + 1))


# --- BLEU -----------------------------------------------------------------------------------------------------------


def bleu_statistics(hypothesis: str, references: Sequence[str]) -> np.ndarray:
    """float[10]: clipped matches (n = 1..4), n-grams said (n = 1..4), words said, length of the closest reference."""
    said = count_ngrams(hypothesis)
    num_said = len(hypothesis.split())
    allowed: Counter[NGram] = Counter()
    for reference in references:
        allowed |= count_ngrams(reference)
    correct = [0] * MAX_N
    for ngram, count in said.items():
        correct[len(ngram) - 1] += min(count, allowed[ngram])
    guesses = [max(0, num_said - n) for n in range(MAX_N)]
    lengths = (len(reference.split()) for reference in references)
    closest = min((abs(length - num_said), length) for length in lengths)[1]  # a tie goes to the shorter
    return np.array([*correct, *guesses, num_said, closest], dtype=np.float64)


def bleu_of(statistics: np.ndarray) -> np.ndarray:
    """BLEU-1..4, float[..., 4], of summed statistics float[..., 10]."""
    correct, guesses = statistics[..., :MAX_N], statistics[..., MAX_N : 2 * MAX_N]
    num_said, num_reference = statistics[..., -2:-1], statistics[..., -1:]
    precision = np.cumprod((correct + _TINY) / (guesses + _SMALL), axis=-1)
    score = precision ** (1.0 / np.arange(1, MAX_N + 1))
    ratio = (num_said + _TINY) / (num_reference + _SMALL)
    return score * np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1..4 of the corpus, float[4], and of each of N items alone, float[N, 4]."""
    statistics = np.stack([bleu_statistics(said, gold) for said, gold in zip(hypotheses, references, strict=True)])
    return bleu_of(statistics.sum(axis=0)), bleu_of(statistics)


# --- ROUGE-L --------------------------------------------------------------------------------------------------------


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel: one big-integer step per word of `second`."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full  # a zero bit at i: the best length grows by one at word i of `first`
    for word in second:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(first) - row.bit_count()


def rouge_l(hypothesis: str, references: Sequence[str]) -> float:
    """ROUGE-L of one caption; best precision and best recall may come from different references."""
    # split(" "), not split(): pycocoevalcap's ROUGE sees one empty word in an empty caption, so "" against "" scores 1.
    said = hypothesis.split(" ")
    golds = [reference.split(" ") for reference in references]
    common = [longest_common_subsequence(gold, said) for gold in golds]
    precision = max(length / len(said) for length in common)
    recall = max(length / len(gold) for length, gold in zip(common, golds, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


# --- CIDEr-D --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vector:
    """tf-idf weights of one caption, apart for n = 1..4, with their norms and the number of bigrams."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    num_bigrams: int


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each of N items, 0 to 10; the corpus score is their mean.

    Document frequencies come from these references, so every subset of a corpus gives other scores, and a single item
    gives 0. Raises DataError if no reference holds a word.
    """
    gold_counts = [[count_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(ngram for counts in gold_counts for ngram in set().union(*counts))
    if not frequency:
        raise DataError("CIDEr needs document frequencies, but no reference holds a single word after tokenisation")
    log_items = math.log(len(references))
    idf = {ngram: log_items - math.log(count) for ngram, count in frequency.items()}
    scores = []
    for said, golds in zip(hypotheses, gold_counts, strict=True):
        vector = _vector(count_ngrams(said), idf, log_items)
        total = sum(_similarity(vector, _vector(gold, idf, log_items)) for gold in golds)
        scores.append(10.0 * total / len(golds))
    return scores


def _vector(counts: Counter[NGram], idf: dict[NGram, float], unseen: float) -> _Vector:
    weights: list[dict[NGram, float]] = [{} for _ in range(MAX_N)]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
    norms = [math.sqrt(sum(weight * weight for weight in level.values())) for level in weights]
    return _Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(said: _Vector, gold: _Vector) -> float:
    """Mean over n of the clipped cosine, times the penalty on the difference of lengths (counted in bigrams)."""
    total = 0.0
    for said_n, gold_n, said_norm, gold_norm in zip(said.weights, gold.weights, said.norms, gold.norms, strict=True):
        product = sum(min(weight, gold_n[ngram]) * gold_n[ngram] for ngram, weight in said_n.items() if ngram in gold_n)
        total += product / (said_norm * gold_norm) if said_norm and gold_norm else product
    difference = float(said.num_bigrams - gold.num_bigrams)
    return total / MAX_N * math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))


# --- Registered metrics ---------------------------------------------------------------------------------------------

_TOKENS = f"tokenizer {ptb.VERSION} (the official PTBTokenizer 3.4.1 and punctuation list, each caption alone)"
_VERSION = f"1+{ptb.VERSION}"
NORMALIZER = "PTB tokens"


def _tokenised(predictions: Predictions, references: References) -> tuple[list[str], list[list[str]]]:
    said = [ptb.tokenize(predictions[key]) for key in references]
    return said, [[ptb.tokenize(text) for text in texts] for texts in references.values()]


def _bleu_metric(n: int, predictions: Predictions, references: References) -> MetricResult:
    said, golds = _tokenised(predictions, references)
    rows = {key: bleu_statistics(text, gold) for key, text, gold in zip(references, said, golds, strict=True)}
    statistics = np.stack([rows[key] for key in sorted(rows)])
    num_items = len(rows)
    interval = bootstrap(statistics, lambda means: bleu_of(means * num_items)[:, n - 1])
    per_item = {key: float(bleu_of(row)[n - 1]) for key, row in rows.items()}
    rule = (
        f"corpus BLEU-{n} of pycocoevalcap 1.2 (clipped counts summed over the corpus, closest reference length, "
        f"brevity penalty); {_TOKENS}; the interval resamples items and recomputes the corpus score"
    )
    value = float(bleu_of(statistics.sum(axis=0))[n - 1])
    return MetricResult(f"bleu_{n}", value, per_item, rule, _VERSION, interval, normalizer=NORMALIZER)


@register("bleu_1", summary="corpus BLEU-1 of pycocoevalcap", reads="references")
def bleu_1(predictions: Predictions, references: References) -> MetricResult:
    """Corpus BLEU with unigrams."""
    return _bleu_metric(1, predictions, references)


@register("bleu_2", summary="corpus BLEU-2 of pycocoevalcap", reads="references")
def bleu_2(predictions: Predictions, references: References) -> MetricResult:
    """Corpus BLEU with n-grams up to 2."""
    return _bleu_metric(2, predictions, references)


@register("bleu_3", summary="corpus BLEU-3 of pycocoevalcap", reads="references")
def bleu_3(predictions: Predictions, references: References) -> MetricResult:
    """Corpus BLEU with n-grams up to 3."""
    return _bleu_metric(3, predictions, references)


@register("bleu_4", summary="corpus BLEU-4 of pycocoevalcap", reads="references")
def bleu_4(predictions: Predictions, references: References) -> MetricResult:
    """Corpus BLEU with n-grams up to 4."""
    return _bleu_metric(4, predictions, references)


@register("rouge_l", summary="ROUGE-L of pycocoevalcap", reads="references")
def rouge_l_metric(predictions: Predictions, references: References) -> MetricResult:
    """Mean of `rouge_l` over the items."""
    said, golds = _tokenised(predictions, references)
    scores = {key: rouge_l(text, gold) for key, text, gold in zip(references, said, golds, strict=True)}
    value, interval = mean_of(scores)
    rule = f"ROUGE-L of pycocoevalcap 1.2 (beta 1.2, best precision and best recall over references); {_TOKENS}"
    return MetricResult("rouge_l", value, scores, rule, _VERSION, interval, normalizer=NORMALIZER)


@register("cider", summary="CIDEr-D of pycocoevalcap, 0 to 10", reads="references")
def cider(predictions: Predictions, references: References) -> MetricResult:
    """Mean of CIDEr-D over the items, document frequencies from these references. Raises DataError as `cider_d`."""
    said, golds = _tokenised(predictions, references)
    scores = dict(zip(references, cider_d(said, golds), strict=True))
    value, interval = mean_of(scores)
    rule = (
        "CIDEr-D of pycocoevalcap 1.2 (n = 1..4, sigma 6, times 10; document frequencies from the references of these "
        f"{len(scores)} items, so it must not be averaged over parts); {_TOKENS}; "
        "the interval keeps the frequencies fixed"
    )
    alike = len({frozenset(gold) for gold in golds}) == 1
    notes = (_NO_FREQUENCIES,) if alike else ()
    return MetricResult(
        "cider", value, scores, rule, _VERSION, interval, maximum=10.0, normalizer=NORMALIZER, notes=notes
    )


_NO_FREQUENCIES = (
    "CIDEr is 0 here whatever the captions say: a word weighs log(images / images that have it), and with one image, or"
    " images with the same references, every weight is log(1) = 0; score several different images together"
)


METRICS: dict[str, MetricFunction] = {
    "bleu_1": bleu_1,
    "bleu_2": bleu_2,
    "bleu_3": bleu_3,
    "bleu_4": bleu_4,
    "rouge_l": rouge_l_metric,
    "cider": cider,
}
