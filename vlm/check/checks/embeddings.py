"""The scale of what enters the decoder, and the tie between input and output embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlm.check.report import Finding, not_applicable
from vlm.check.subject import Check, Subject, text_logits
from vlm.model import decoder
from vlm.model.modes import in_mode

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest relative error of the scale: the dtype's rounding, a few times over."""


@torch.no_grad()
def scale(subject: Subject) -> Finding:
    """Embedding output over embedding rows, and the merged input of the decoder over text and image tokens.

    The projector's output is replaced by noise, so that a fresh projector (zero) hides nothing.
    """
    model = subject.model
    wanted = decoder.facts(model.config.text_config).embedding_scale
    tensors = subject.batch()
    ids, image = tensors["input_ids"], tensors["input_ids"] == model.config.image_token_id
    table: Any = model.get_input_embeddings()
    if not _plain(table, nn.Embedding):
        return not_applicable(f"the embedding is a {type(table).__name__}, which adapts or quantises its rows")
    if table.weight.device.type == "meta":
        return not_applicable("the embedding is offloaded to the disk; open the model whole to check this")
    rows = table.weight[ids].float()
    with _noise_for_projector(subject) as tokens, _seen_by_decoder(subject) as seen, in_mode(model):
        direct = table(ids).float()
        text_logits(model, tensors, 1)
    merged = seen[0].float()
    text = tensors["attention_mask"].bool() & ~image
    factors = {
        "embedding layer": _factor(direct[text], rows[text]) / wanted,
        "text in the decoder": _factor(merged[text], rows[text]) / wanted,
        "image tokens in the decoder": _factor(merged[image], torch.cat(tokens).float()),
    }
    worst = max(factors, key=lambda name: abs(factors[name] - 1) if factors[name] == factors[name] else math.inf)
    error = abs(factors[worst] - 1)
    limit = LIMITS.get(model.dtype, LIMITS[torch.float32])
    width = model.config.text_config.hidden_size
    root = f"sqrt({width}) = " if wanted == width**0.5 else ""
    shown = f"text enters times {root}{wanted:.4g}, image tokens times 1"
    problem = "" if error <= limit else f"{worst}: {factors[worst]:.4g} times what it should be"
    return Finding(measured=error, limit=limit, detail=f"relative error of the scale; {shown}", problem=problem)


def tied(subject: Subject) -> Finding:
    """Whether `lm_head` and `embed_tokens` share their storage."""
    model = subject.model
    if not model.config.tie_word_embeddings:
        return not_applicable("tie_word_embeddings is false: this model has an output embedding of its own")
    table: Any = model.get_input_embeddings()
    for layer, kind in ((table, nn.Embedding), (model.lm_head, nn.Linear)):
        if not _plain(layer, kind):
            return not_applicable(f"a {type(layer).__name__} adapts or quantises the embedding")
    one, two = table.weight, model.lm_head.weight
    if one.device.type == "meta" or two.device.type == "meta":
        return not_applicable("the embedding is offloaded to the disk; open the model whole to check this")
    shared = one is two or (one.device == two.device and one.data_ptr() == two.data_ptr())
    problem = "" if shared else "lm_head.weight and embed_tokens.weight are two tensors; training would part them"
    return Finding(measured=1 if shared else 2, limit=1, detail="storages of the vocabulary", problem=problem)


def _plain(layer: Any, kind: type[nn.Module]) -> bool:
    """Whether a layer's weight is a matrix of numbers, and all that it computes with."""
    return isinstance(layer, kind) and isinstance(layer.weight, Tensor) and layer.weight.is_floating_point()


def _factor(output: Tensor, base: Tensor) -> float:
    """The number by which `base` was multiplied, NaN when `output` is no multiple of it."""
    if output.shape != base.shape:
        return math.nan
    factor = float((output * base).sum() / (base * base).sum())
    residual = float((output - factor * base).abs().max() / output.abs().max())
    return factor if residual < 0.02 else math.nan


@contextmanager
def _noise_for_projector(subject: Subject) -> Iterator[list[Tensor]]:
    """The projector gives noise of unit size; yields the list of what real rows got."""
    given: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def replace(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        tokens, mask = output
        noise = torch.randn(tokens.shape, generator=generator).to(tokens)
        given.append(noise.flatten(0, 1) if mask is None else noise[mask])
        return noise, mask

    hook = subject.model.model.multi_modal_projector.register_forward_hook(replace)
    try:
        yield given
    finally:
        hook.remove()


@contextmanager
def _seen_by_decoder(subject: Subject) -> Iterator[list[Tensor]]:
    """Yields the list of hidden states float[B, S, D] that enter the decoder's first layer: after whatever the decoder
    itself does to its input (transformers before 5.4 scaled there)."""
    seen: list[Tensor] = []

    def look(_module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen.append(inputs[0] if inputs else named["hidden_states"])

    layers: Any = subject.model.model.language_model.layers
    hook = layers[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


CHECKS = (
    Check("embedding-scale", "text enters the decoder times sqrt(width), image tokens unscaled", scale, 120),
    Check("tied-weights", "input and output embedding are one tensor", tied, 130, runs_tower=False),
)
