"""Decoding with a cache against decoding without, and attention backends against each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from vlm.check.report import Finding, not_applicable
from vlm.check.subject import (
    Check,
    Subject,
    Tensors,
    attention_backends,
    deviation,
    largest,
    other_ids,
    padded_left,
    text_length,
    text_logits,
)
from vlm.model import decoder
from vlm.model.modes import in_mode
from vlm.model.outputs import CACHE

STEPS = 10
"""Tokens decoded one by one."""


def cache(subject: Subject) -> Finding:
    """Given tokens, one at a time with a cache, against the whole sequence at once; then greedy decoding both ways."""
    tensors = subject.encoded(suffix=False)
    tokens = other_ids(subject, tensors["input_ids"].new_zeros(len(tensors["input_ids"]), STEPS), 0)
    whole = text_logits(subject.model, _extended(tensors, tokens), STEPS + 1)
    steps = _cached_logits(subject, tensors, tokens)
    unit = deviation(whole)
    measured = float((steps - whole).abs().max()) / unit
    different, compared = _greedy(subject, unit)
    detail = f"largest difference of a logit over {STEPS} steps, in deviations"
    if not different:
        detail += f"; {compared or 'no'} greedy tokens {'equal' if compared else 'decided beyond rounding'}"
    problem = f"{different} of {compared} greedy tokens differ" if different else ""
    return Finding(measured=measured, limit=subject.rounding, detail=detail, problem=problem)


@torch.no_grad()
def _cached_logits(subject: Subject, tensors: Tensors, tokens: Tensor) -> Tensor:
    """float32[B, STEPS + 1, V]: the logits after the prompt and after each token, as generation computes them."""
    model = subject.model
    with in_mode(model):
        out = model(**tensors, use_cache=True, logits_to_keep=1)
        logits = [out.logits]
        mask = tensors["attention_mask"]
        for step in range(tokens.shape[1]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            token = tokens[:, step : step + 1]
            out = model(
                input_ids=token,
                attention_mask=mask,
                token_type_ids=torch.ones_like(token),
                cache=out[CACHE],
                use_cache=True,
            )
            logits.append(out.logits)
    return torch.cat(logits, 1).float()


def _greedy(subject: Subject, unit: float) -> tuple[int, int]:
    """(tokens that differ, tokens compared) between `generate` and a loop that has no cache.

    A row is compared up to EOS, or up to a step where two tokens are equally likely within rounding.
    """
    model: Any = subject.model
    tokenizer, placeholder = subject.processor.tokenizer, subject.processor.image_token_id
    tensors = subject.batch(suffix=False)
    settings = GenerationConfig(
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        suppress_tokens=[placeholder],
    )
    own = model.generation_config
    try:
        # What settings leave open would come from the model's own: penalties, for example, which are not greedy.
        model.generation_config = GenerationConfig()
        with torch.no_grad(), in_mode(model):
            got = model.generate(**tensors, generation_config=settings)[:, tensors["input_ids"].shape[1] :]
    finally:
        model.generation_config = own
    sequence = subject.encoded(suffix=False)
    open_rows = torch.ones(len(got), dtype=torch.bool, device=got.device)
    different = compared = 0
    for step in range(got.shape[1]):
        scores = text_logits(model, sequence, 1)[:, -1]
        scores[:, placeholder] = -torch.inf
        top = scores.topk(2)
        open_rows &= (top.values[:, 0] - top.values[:, 1]) > subject.rounding * unit
        token = top.indices[:, 0]
        compared += int(open_rows.sum())
        different += int((open_rows & (token != got[:, step])).sum())
        open_rows &= (token != tokenizer.eos_token_id) & (token == got[:, step])
        sequence = _extended(sequence, token[:, None])
    return different, compared


def _extended(tensors: Tensors, tokens: Tensor) -> Tensors:
    """A left-padded batch with suffix tokens int64[B, N] after it."""
    ones = torch.ones_like(tokens)
    last = tensors["position_ids"][:, -1:]
    positions = last + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    added = {"input_ids": tokens, "attention_mask": ones, "token_type_ids": ones, "position_ids": positions}
    return {**tensors, **{name: torch.cat([tensors[name], value], 1) for name, value in added.items()}}


def backends(subject: Subject) -> Finding:
    """The logits of a padded batch with sdpa against eager attention, in tower and decoder."""
    model = subject.model
    cap = decoder.facts(model.config.text_config).attention_softcap
    if cap is not None:
        return not_applicable(
            f"the decoder caps attention scores at {cap:g} (Gemma 2), which sdpa cannot do: eager is the only backend"
        )
    was = attention_backends(model)
    right = subject.batch()
    batches = [right, padded_left(right)]
    logits: dict[str, list[Tensor]] = {}
    try:
        for backend in ("sdpa", "eager"):
            model.set_attn_implementation(backend)
            logits[backend] = [text_logits(model, tensors, text_length(model, tensors)) for tensors in batches]
    finally:
        model.set_attn_implementation(was)
    worst = []
    for tensors, one, two in zip(batches, logits["sdpa"], logits["eager"], strict=True):
        real = tensors["attention_mask"][:, -one.shape[1] :].bool()
        worst.append(float((one - two)[real].abs().max()) / deviation(one, real))
    detail = "largest difference of a logit between sdpa and eager, in deviations"
    return Finding(measured=largest(worst), limit=subject.rounding, detail=detail)


CHECKS = (
    Check("cache", "decoding with a cache equals decoding without", cache, 100),
    Check("backends", "sdpa and eager attention agree", backends, 110),
)
