"""Padding and batch mates must not matter: what lies under it, on which side it is, who else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.check.report import Finding, not_applicable
from vlm.check.subject import (
    CONTROL,
    PIXELS,
    Check,
    Subject,
    Tensors,
    deviation,
    largest,
    moved,
    other_ids,
    padded_left,
    text_length,
    text_logits,
)
from vlm.model.modes import in_mode


def content(subject: Subject) -> Finding:
    """Other ids, token types and positions under the padding, and noise in padding patches: real tokens must stay."""
    moves, controls = [], []
    for tensors in (subject.encoded(), padded_left(subject.encoded())):
        hidden, visible = _content_logits(subject, tensors)
        moves.append(hidden)
        controls.append(visible)
    move, control = largest(moves), min(controls)
    if control < CONTROL * subject.nothing and move <= subject.nothing:
        return not_applicable(f"padding made real moves a logit by {control:.1e} only: nothing would be seen")
    patches = _content_patches(subject)
    detail = f"logits of real tokens move {move:.1e} of their deviation ({control:.1e} were padding real)"
    if patches is not None:
        detail += f", features of real patches {patches:.1e}"
    return Finding(measured=largest([move, patches or 0.0]), limit=subject.nothing, detail=detail)


def _content_logits(subject: Subject, tensors: Tensors) -> tuple[float, float]:
    """(largest move at a real token, the same were the padding not masked), in deviations."""
    model, ids = subject.model, tensors["input_ids"]
    real = tensors["attention_mask"].bool()
    length = text_length(model, tensors)
    before = text_logits(model, tensors, length)
    unit = deviation(before, real[:, -length:])

    def move(**changes: Tensor) -> float:
        after = text_logits(model, {**tensors, **changes}, length)
        return float(moved(before, after)[real[:, -length:]].max()) / unit

    moves = []
    for seed, token_type in enumerate((0, 1)):
        types = tensors["token_type_ids"].masked_fill(~real, token_type)
        positions = tensors["position_ids"].masked_fill(~real, 3)
        other = torch.where(real, ids, other_ids(subject, ids, seed))
        moves.append(move(input_ids=other, token_type_ids=types, position_ids=positions))
    visible = move(attention_mask=torch.ones_like(ids), token_type_ids=tensors["token_type_ids"] * real)
    return largest(moves), visible


def _content_patches(subject: Subject) -> float | None:
    """Largest move of a real patch's features when padding patches become noise, in deviations; None without any."""
    tensors = subject.batch()
    mask = tensors.get("pixel_attention_mask")
    if mask is None or bool(mask.bool().all()):
        return None
    pixels = tensors["pixel_values"]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels)
    changed = torch.where(mask.bool()[..., None], pixels, noise)
    before, after = (_features(subject, {**tensors, "pixel_values": values}) for values in (pixels, changed))
    return float((before - after).abs().max()) / deviation(before)


def side(subject: Subject) -> Finding:
    """The same batch padded on the right and on the left."""
    model, right = subject.model, subject.encoded()
    left = padded_left(right)
    logits, masks = [], []
    for tensors in (right, left):
        length = text_length(model, tensors)
        logits.append(text_logits(model, tensors, length))
        is_text = tensors["attention_mask"].bool() & (tensors["input_ids"] != model.config.image_token_id)
        masks.append(is_text[:, -length:])
    # Row by row, both masks list the same tokens in the same order.
    one, two = (values[mask] for values, mask in zip(logits, masks, strict=True))
    measured = float((one - two).abs().max()) / deviation(one)
    detail = "largest difference of a logit between padding right and left, in deviations"
    return Finding(measured=measured, limit=subject.rounding, detail=detail)


def mates(subject: Subject) -> Finding:
    """Each sample alone against the same sample in a batch, from pixels to logits; the tower's features too."""
    model, whole = subject.model, subject.batch()
    length = text_length(model, whole)
    together = text_logits(model, whole, length)
    features = _features(subject, whole)
    worst_logits, worst_features, first = [], [], 0
    for row in range(whole["input_ids"].shape[0]):
        alone = subject.batch((row,))
        own_length = text_length(model, alone)
        real = whole["attention_mask"][row].bool() & (whole["input_ids"][row] != model.config.image_token_id)
        one, two = text_logits(model, alone, own_length)[0], together[row, real[-length:]]
        worst_logits.append(float((one - two).abs().max()) / deviation(one))
        own = _features(subject, alone)
        worst_features.append(float((own - features[first : first + len(own)]).abs().max()) / deviation(own))
        first += len(own)
    logits, images = largest(worst_logits), largest(worst_features)
    detail = f"logits move {logits:.1e} of their deviation, image features {images:.1e}"
    if subject.image_is_blind:
        detail += "; the image does not reach the decoder yet (the projector gives zeros)"
    return Finding(measured=largest([logits, images]), limit=subject.rounding, detail=detail)


@torch.no_grad()
def _features(subject: Subject, tensors: Tensors) -> Tensor:
    """float32[T, E]: the tower's features of the real patches of all images."""
    with in_mode(subject.model):
        encoded = subject.model.encode(tensors["pixel_values"], *(tensors.get(name) for name in PIXELS[1:]))
    features = encoded.features.flatten(0, 1) if encoded.mask is None else encoded.features[encoded.mask]
    return features.float()


CHECKS = (
    Check("pad-content", "what lies under the padding is irrelevant", content, 70),
    Check("pad-side", "padding left and right give the same logits", side, 80),
    Check("batch-mates", "a sample's logits do not depend on the rest of its batch", mates, 90),
)
