"""Who sees whom: found out by changing an input and watching what moves, in padded batches and without padding.

Both, because transformers has chosen another mask when nothing is padded: then all tokens saw all others and labels
leaked (huggingface/transformers#30967).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlm.check.report import Finding, not_applicable
from vlm.check.subject import (
    CONTROL,
    Check,
    Subject,
    Tensors,
    deviation,
    largest,
    moved,
    other_ids,
    text_length,
    text_logits,
)
from vlm.model.loss import IGNORE
from vlm.model.modes import in_mode

LAYOUTS = ((0,), (0, 1, 2))
"""Rows of the probe batches: one sample without padding, three with."""
SEES = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}
"""Smallest move of a hidden state that counts as seen, in its standard deviations: without attention it is zero."""


def future(subject: Subject) -> Finding:
    """Other suffix tokens from some position on: earlier logits must stay. And in train mode, the gradient of an early
    label's loss must not reach later positions."""
    leaks, gradients, controls = [], [], []
    for rows in LAYOUTS:
        tensors = subject.encoded(rows)
        leak, control = _future_logits(subject, tensors)
        leaks.append(leak)
        controls.append(control)
        gradients.append(_future_gradient(subject, tensors))
    leak, gradient, control = largest(leaks), largest(gradients), min(controls)
    if control < CONTROL * subject.nothing and leak <= subject.nothing:
        return not_applicable(f"attention moves a later logit by {control:.1e} only: a leak would not be seen")
    detail = (
        f"earlier logits move {leak:.1e} of their deviation (later ones {control:.1e}),"
        f" gradient at later tokens in train mode {gradient:.1e} of that at earlier ones"
    )
    return Finding(measured=largest([leak, gradient]), limit=subject.nothing, detail=detail)


def _future_logits(subject: Subject, tensors: Tensors) -> tuple[float, float]:
    """(largest move of an earlier logit, largest move that one changed token causes in the logits after it), in
    deviations."""
    model = subject.model
    ids, suffix = tensors["input_ids"], _suffix(tensors)
    length = text_length(model, tensors)
    real = tensors["attention_mask"][:, -length:].bool()
    before = text_logits(model, tensors, length)
    unit = deviation(before, real)
    first, count = suffix.int().argmax(1), suffix.sum(1)
    index = torch.arange(ids.shape[1], device=ids.device)
    leaks = []
    for seed, share in enumerate((0.0, 0.5, 1.0)):
        start = first + ((count - 1) * share).long()
        changed = suffix & (index >= start[:, None])
        after = text_logits(model, {**tensors, "input_ids": _replace(subject, ids, changed, seed)}, length)
        watched = real & (index < start[:, None])[:, -length:]
        leaks.append(float(moved(before, after)[watched].max()) / unit)
    # The control: one changed token must show in the logits of the unchanged tokens after it.
    single = index == first[:, None]
    after = text_logits(model, {**tensors, "input_ids": _replace(subject, ids, single, 9)}, length)
    later = (suffix & ~single)[:, -length:]
    return largest(leaks), float(moved(before, after)[later].max()) / unit


def _future_gradient(subject: Subject, tensors: Tensors) -> float:
    """Largest gradient at a position that the loss must not see, as a share of the largest at one that it may."""
    model, suffix = subject.model, _suffix(tensors)
    first, count = suffix.int().argmax(1), suffix.sum(1)
    index = torch.arange(suffix.shape[1], device=suffix.device)
    inputs = {name: tensors[name] for name in ("attention_mask", "token_type_ids", "position_ids")}
    worst = []
    for target in (first, first + count // 2):
        labels = torch.where(index == target[:, None], tensors["input_ids"], IGNORE)
        with torch.no_grad():
            embeds, _ = model.model.embed(tensors["input_ids"], tensors["encoded"])
        with in_mode(model, training=True), torch.enable_grad():
            embeds = embeds.detach().clone().requires_grad_()
            loss = model(inputs_embeds=embeds, labels=labels, **inputs).loss
            (gradient,) = torch.autograd.grad(loss, embeds)
        size = gradient.float().norm(dim=-1)
        later = index >= target[:, None]
        worst.append(float(size[later].max() / size[~later].max()))
    return largest(worst)


def prefix(subject: Subject) -> Finding:
    """Another last prefix token: the hidden state of every image and prefix position before it must move."""
    smallest: list[tuple[float, str]] = []
    for rows in LAYOUTS:
        tensors = subject.encoded(rows)
        ids = tensors["input_ids"]
        prefix_mask = (tensors["token_type_ids"] == 0) & tensors["attention_mask"].bool()
        last = prefix_mask.sum(1) - 1  # padding is on the right
        index = torch.arange(ids.shape[1], device=ids.device)
        before = _hidden(subject, tensors)
        unit = deviation(before, prefix_mask)
        change = torch.zeros(ids.shape, device=ids.device)
        for seed in range(2):
            changed = _replace(subject, ids, index == last[:, None], seed)
            change = torch.maximum(change, moved(before, _hidden(subject, {**tensors, "input_ids": changed})))
        earlier = prefix_mask & (index < last[:, None])
        image = ids == subject.model.config.image_token_id
        for where, name in ((earlier & image, "image"), (earlier & ~image, "prefix")):
            if bool(where.any()):
                smallest.append((float(change[where].min()) / unit, name))
    measured, name = min(smallest, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])
    detail = f"the last prefix token moves the hidden state of every earlier position; least at one of the {name}"
    limit = SEES.get(subject.model.dtype, SEES[torch.float32])
    return Finding(measured=measured, limit=limit, relation=">=", detail=detail)


def image(subject: Subject) -> Finding:
    """Another image for one sample: its own text logits must move, those of the other samples stay."""
    if subject.image_is_blind:
        return not_applicable("the image does not reach the decoder yet: the projector gives zeros (it is new)")
    model, tensors = subject.model, subject.batch()
    length = text_length(model, tensors)
    real = tensors["attention_mask"][:, -length:].bool()
    real &= tensors["input_ids"][:, -length:] != model.config.image_token_id
    before = text_logits(model, tensors, length)
    unit = deviation(before, real)
    own, others = [], []
    for row in range(len(real)):
        pixels = tensors["pixel_values"].clone()
        pixels[row] = -pixels[row]
        change = moved(before, text_logits(model, {**tensors, "pixel_values": pixels}, length)) * real / unit
        own.append(float(change[row].max()))
        change[row] = 0
        others.append(float(change.max()))
    seen = min(own)
    detail = f"another image moves logits of other samples by {largest(others):.1e}, of its own by at least {seen:.1e}"
    blind = seen < SEES.get(model.dtype, SEES[torch.float32])
    problem = "an image does not move the logits of its own sample" if blind else ""
    return Finding(measured=largest(others), limit=subject.nothing, detail=detail, problem=problem)


# --- helpers


def _suffix(tensors: Tensors) -> Tensor:
    return (tensors["token_type_ids"] == 1) & tensors["attention_mask"].bool()


def _replace(subject: Subject, ids: Tensor, where: Tensor, seed: int) -> Tensor:
    return torch.where(where, other_ids(subject, ids, seed), ids)


def _hidden(subject: Subject, tensors: Tensors) -> Tensor:
    """float32[B, S, D]: the decoder's last hidden state."""
    seen: list[Any] = []
    decoder = subject.model.model.language_model
    hook = decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.last_hidden_state))
    try:
        text_logits(subject.model, tensors, 1)
    finally:
        hook.remove()
    return seen[0].float()


CHECKS = (
    Check("future", "no token sees a later token of the suffix", future, 40),
    Check("prefix", "image and prefix attend to each other in both directions", prefix, 50),
    Check("image", "an image moves the logits of its own sample only", image, 60),
)
