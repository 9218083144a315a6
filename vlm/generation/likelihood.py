"""Scoring by likelihood: how probable the model finds each candidate answer, and which one it would choose.

For multiple choice and yes/no questions. Nothing is generated, so no answer is lost to its wording:

    candidates = [["yes", "no"]]
    scores = score_candidates(model, processor, ["cat.jpg"], ["answer en is it a cat?"], candidates)
    choose(candidates, scores)                                        # ["yes"]

A score is the log-probability of the candidate as the whole answer, EOS included, given image and prompt. It is made of
the logits that generation sees: Gemma 2's final soft-cap is applied, unless the model's `softcap_in_generation` is off.
Image and prompt pass the model once per item; their cached keys and values serve all candidates, which is exact,
because a prefix never sees what follows it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from vlm.errors import ConfigError, DataError, nearest
from vlm.generation.decoding import Decoding, Normalization
from vlm.generation.predictor import Network
from vlm.model.dtypes import check_dtype
from vlm.model.loss import IGNORE
from vlm.model.modes import in_mode
from vlm.model.processor import ImageSource, Processor

_Total = tuple[float, int]
"""Sum of log-probabilities of a candidate, and how many tokens it has."""


def score_candidates(
    model: Network,
    processor: Processor,
    images: Sequence[ImageSource | Sequence[ImageSource]] | None,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    normalization: Normalization = Decoding.normalization,
    batch_size: int = 16,
    ids: Sequence[str] | None = None,
    force_fp16: bool = False,
) -> list[list[float]]:
    """Log-likelihood of every candidate answer of every item.

    Args:
        images: for each prompt one image or a list of images; None for text only.
        prompts: prefixes, as for `vlm.generate`.
        candidates: for each prompt the answers to compare; items may have different numbers of them.
        normalization: see `Normalization`.
        batch_size: how many items, and then how many of their candidates, pass the model at a time; scores do not
            depend on it beyond floating-point rounding.
        ids: names of the items for error messages. force_fp16: run a float16 model although it may overflow.

    Returns:
        for each item the score of each candidate: natural logarithms, at most 0, the higher the likelier.

    Raises:
        ConfigError: an unknown normalization, or a batch_size below 1.
        DataError: lists of different lengths, an item without candidates, a candidate without text.
        GenerationError: a float16 model. ImageError: an image that cannot be used.
    """
    check_dtype(model.config, model.dtype, force=force_fp16)
    names = [str(i) for i in range(len(prompts))] if ids is None else [str(i) for i in ids]
    _check(images, prompts, candidates, names, normalization, batch_size)
    scores: list[list[float]] = []
    with in_mode(model):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            some = None if images is None else images[part]
            totals = _totals(model, processor, some, prompts[part], candidates[part], names[part], batch_size)
            scores += [
                [_normalized(total, text, normalization) for total, text in zip(row, texts, strict=True)]
                for row, texts in zip(totals, candidates[part], strict=True)
            ]
    return scores


def _check(
    images: Sequence[Any] | None,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    names: list[str],
    normalization: str,
    batch_size: int,
) -> None:
    known = get_args(Normalization)
    if normalization not in known:
        near = nearest(str(normalization), known)
        raise ConfigError(f"unknown normalization {normalization!r}{near}; known: {', '.join(known)}")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    counts = {"prompts": len(prompts), "candidates": len(candidates), "ids": len(names)}
    if images is not None:
        counts["images"] = len(images)
    if len(set(counts.values())) > 1:
        raise DataError(f"each prompt needs one list of candidates, one image and one id, got {counts}")
    for name, texts in zip(names, candidates, strict=True):
        if isinstance(texts, str) or not texts:
            raise DataError(f"item {name!r}: expected a list of candidates to choose from, got {texts!r}")


def _normalized(total: _Total, text: str, normalization: str) -> float:
    value, num_tokens = total
    # An empty candidate (EOS alone) has no byte to divide by.
    divisors = {"none": 1, "token": num_tokens, "byte": max(1, len(text.encode("utf-8", "surrogatepass")))}
    return value / divisors[normalization]


@torch.inference_mode()
def _totals(
    model: Network,
    processor: Processor,
    images: Sequence[Any] | None,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    names: Sequence[str],
    batch_size: int,
) -> list[list[_Total]]:
    """One batch of items: the prefixes once, then their candidates, at most `batch_size` at a time."""
    batch = processor(images, prompts, ids=names).to(model.device)
    prefix = model(**batch, use_cache=True, logits_to_keep=1)
    first = _log_softmax(prefix.logits[:, -1])  # padding is on the left: the last position is the end of the prompt
    pairs = [(item, text) for item, texts in enumerate(candidates) for text in texts]
    totals: list[_Total] = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        items = torch.tensor([item for item, _ in chunk], device=model.device)
        suffixes = _suffixes(processor, [prompts[i] for i, _ in chunk], chunk, names).to(model.device)
        cache = _rows(prefix.past_key_values, items)
        totals += _chunk_totals(model, suffixes, first[items], batch.attention_mask[items], cache)
    ends = iter(totals)
    return [[next(ends) for _ in texts] for texts in candidates]


def _rows(cache: Any, rows: Tensor) -> Any:
    """A cache of its own with these rows of `cache`, which may repeat. Selecting makes new tensors, so the layers are
    copied without theirs: a deep copy would hold the keys and values of the whole batch once more."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def _suffixes(processor: Processor, prompts: list[str], chunk: list[tuple[int, str]], names: Sequence[str]) -> Tensor:
    """int64[P, C]: the tokens of each candidate and EOS, as training has them, then -100."""
    texts = processor(None, prompts, [text for _, text in chunk], ids=[names[item] for item, _ in chunk])
    assert texts.labels is not None
    rows = [labels[labels != IGNORE] for labels in texts.labels]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)


def _chunk_totals(model: Network, suffixes: Tensor, first: Tensor, prefix_mask: Tensor, cache: Any) -> list[_Total]:
    """Sums over the tokens of each candidate.

    Args:
        suffixes: int64[P, C], padded with -100; a candidate ends in EOS, and an empty one is EOS alone.
        first: float32[P, V], log-probabilities of the first token.
        prefix_mask: int64[P, S]. cache: of the prefixes, P rows; it is filled further.
    """
    real = suffixes != IGNORE
    tokens = suffixes.clamp(min=0)
    known = tokens[:, :-1]  # the last token of a row predicts nothing
    if not known.shape[1]:  # empty candidates only
        return [(value, 1) for value in first.gather(1, tokens)[:, 0].double().tolist()]
    out = model(
        input_ids=known,
        attention_mask=torch.cat([prefix_mask, real[:, :-1].to(prefix_mask.dtype)], dim=1),
        token_type_ids=torch.ones_like(known),
        past_key_values=cache,
        use_cache=True,
    )
    rest = _log_softmax(out.logits).gather(2, tokens[:, 1:, None])[..., 0]
    found = torch.cat([first.gather(1, tokens[:, :1]), rest], dim=1)
    sums = found.masked_fill(~real, 0.0).double().sum(1).tolist()
    return list(zip(sums, real.sum(1).tolist(), strict=True))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
