"""Beam search by the rule of big_vision, which PaliGemma's published beam results were decoded with.

Reference: big_vision `trainers/proj/paligemma/predict_fns.py`, `beam_decode`. How it differs from transformers' beams:

- every live beam may end at every step, whether or not EOS is among its likely tokens, and stays live all the same;
- the finished sequence with the highest sum of log-probabilities, EOS included, is the answer: no length normalisation,
  so `length_penalty` has no place here;
- the answer always ends in EOS: within `max_new_tokens` tokens, EOS counted. Unfinished beams are never returned;
- the search of a batch stops when in every sample the best live beam is below its best finished sequence. Sums only
  fall, so stopping earlier or later never changes an answer.

Departures: scores are float32 whatever the model's dtype; suppressed tokens are never chosen (the original has none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm.errors import GenerationError
from vlm.generation.predictor import Network
from vlm.model.batch import Batch


@dataclass
class Beams:
    """Candidates of B samples after t steps.

    Attributes:
        tokens: int64[B, K, t], the live beams, best first; none has ended.
        scores: float32[B, K], their sums of log-probabilities.
        best: int64[B, T], the best finished sequence of each sample so far, padded after EOS.
        best_scores: float32[B], its sum of log-probabilities, EOS included.
    """

    tokens: Tensor
    scores: Tensor
    best: Tensor
    best_scores: Tensor

    @classmethod
    def start(cls, samples: int, length: int, pad: int, device: torch.device | None = None) -> Beams:
        """One empty live beam per sample, and nothing finished."""
        return cls(
            torch.empty(samples, 1, 0, dtype=torch.int64, device=device),
            torch.zeros(samples, 1, device=device),
            torch.full((samples, length), pad, device=device),
            torch.full((samples,), -torch.inf, device=device),
        )

    def done(self) -> bool:
        """No live beam of any sample can still win."""
        return bool((self.scores.amax(1) < self.best_scores).all())


def beam_search(
    model: Network,
    batch: Batch,
    *,
    num_beams: int,
    max_new_tokens: int,
    eos: int,
    pad: int,
    suppress: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Search for a batch made without suffixes (padding left, or none). Call it in inference mode.

    Args:
        suppress: tokens that are never chosen. They keep their share of the probability, so the scores of the other
            tokens are those of the model.

    Returns:
        (int64[B, N], float32[B]): the new tokens, padded after EOS, N the longest, and their sums of log-probabilities.

    Raises:
        GenerationError: more beams than the vocabulary has tokens for.
    """
    choices = model.config.text_config.vocab_size - len(set(suppress))
    if num_beams >= choices:
        raise GenerationError(f"num_beams={num_beams} needs more tokens than the {choices} there are; use fewer beams")
    cache = DynamicCache(config=model.config.text_config)
    attention_mask = batch.attention_mask
    logits = model(**batch, cache=cache, use_cache=True, logits_to_keep=1).logits
    beams = Beams.start(len(batch), max_new_tokens, pad, logits.device)
    for left in reversed(range(max_new_tokens)):
        log_probs = logits[:, -1].float().log_softmax(-1).unflatten(0, beams.scores.shape)
        log_probs[..., list(suppress)] = -torch.inf
        beams, parents = advance(beams, log_probs, num_beams, eos)
        if not left or beams.done():
            break
        cache.reorder_cache(_rows(parents, log_probs.shape[1]))  # type: ignore[arg-type]
        attention_mask = _one_more(attention_mask, len(parents) * num_beams)
        # Embedded here: a generated token is text, also where it has the id of the image placeholder.
        embedded = model.get_input_embeddings()(beams.tokens[:, :, -1].flatten()[:, None])
        logits = model(inputs_embeds=embedded, attention_mask=attention_mask, cache=cache, use_cache=True).logits
    longest = int((beams.best == eos).int().argmax(1).max()) + 1
    return beams.best[:, :longest], beams.best_scores


def advance(beams: Beams, log_probs: Tensor, num_beams: int, eos: int) -> tuple[Beams, Tensor]:
    """One step: end every live beam for once, then continue with the best ones that do not end.

    Args:
        log_probs: float32[B, K, V], of the next token after each live beam.

    Returns:
        (beams with `num_beams` live ones, int64[B, num_beams]: which of the K beams each continues).
    """
    steps = beams.tokens.shape[2]
    # Ties as in the original: the earlier finished sequence, the beam and the token with the lower number.
    ended, which = _top(beams.scores + log_probs[..., eos], 1)
    better = ended[:, 0] > beams.best_scores
    sequence = _take(beams.tokens, which)[:, 0]
    best = beams.best.clone()
    best[better, :steps] = sequence[better]
    best[better, steps] = eos
    best_scores = torch.where(better, ended[:, 0], beams.best_scores)

    going_on = log_probs.clone()
    going_on[..., eos] = -torch.inf
    values, tokens = _top(going_on, num_beams)
    scores, chosen = _top((beams.scores[..., None] + values).flatten(1), num_beams)
    parents = chosen // num_beams
    grown = torch.cat([_take(beams.tokens, parents), tokens.flatten(1).gather(1, chosen)[..., None]], dim=2)
    return Beams(grown, scores, best, best_scores), parents


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of float32[..., V] and their indices, equal values in the order of their index: `torch.topk` leaves
    that open, and bfloat16 logits are often equal."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: one zero, not two
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the numbers
    index = torch.arange(values.shape[-1], device=values.device)
    found = ((ordered << 32) - index).topk(count, dim=-1).indices
    return values.gather(-1, found), found


def _take(tokens: Tensor, beams: Tensor) -> Tensor:
    """int64[B, K, t], int64[B, N] -> int64[B, N, t]."""
    return tokens.gather(1, beams[..., None].expand(-1, -1, tokens.shape[2]))


def _rows(parents: Tensor, num_live: int) -> Tensor:
    """int64[B, N], beam numbers within each sample -> int64[B * N], rows of a cache of B * K rows."""
    first = torch.arange(len(parents), device=parents.device)[:, None] * num_live
    return (first + parents).flatten()


def _one_more(attention_mask: Tensor, rows: int) -> Tensor:
    """The mask of `rows` beams, equal for the beams of a sample, with one token more."""
    spread = attention_mask.repeat_interleave(rows // len(attention_mask), dim=0)
    return torch.cat([spread, spread.new_ones(rows, 1)], dim=1)
