"""Who else is in the batch, and how far a batch is padded, must not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.check.dual_subject import SIZES, TEXTS, DualSubject, distance
from vlm.check.report import Finding, not_applicable
from vlm.check.subject import CONTROL, Check, largest

MASK, SHAPES = "pixel_attention_mask", "spatial_shapes"


def distinct(subject: DualSubject) -> Finding:
    """Different images and different texts: the two that are nearest to each other."""
    rows = {"images": subject.image(subject.pixels()), "texts": subject.text(subject.ids(TEXTS))}
    least = {name: _nearest(found) for name, found in rows.items()}
    same = [name for name, value in least.items() if not value >= subject.sees]
    problem = f"different {' and '.join(same)} have one embedding: what is read does not depend on them" if same else ""
    detail = f"the nearest of {len(SIZES)} different images are {least['images']:.1e} apart, texts {least['texts']:.1e}"
    measured = float(torch.tensor(list(least.values())).min())
    return Finding(measured=measured, limit=subject.sees, relation=">=", detail=detail, problem=problem)


def _nearest(rows: Tensor) -> float:
    pairs = torch.cdist(rows, rows)
    return float(pairs[~torch.eye(len(rows), dtype=torch.bool)].min())


def mates(subject: DualSubject) -> Finding:
    """Each image and each text alone against itself among others."""
    together = subject.image(subject.pixels())
    alone = torch.cat([subject.image(subject.pixels((row,))) for row in range(len(SIZES))])
    texts = subject.text(subject.ids(TEXTS))
    single = torch.cat([subject.text(subject.ids([text])) for text in TEXTS])
    moves = {"images": distance(together, alone), "texts": distance(texts, single)}
    detail = f"an image moves by {moves['images']:.1e}, a text by {moves['texts']:.1e}"
    return Finding(measured=largest(list(moves.values())), limit=subject.rounding, detail=detail)


def naflex(subject: DualSubject) -> Finding:
    """More padding after the patches, and noise in it."""
    inputs = subject.pixels()
    if MASK not in inputs:
        return not_applicable("the image tower reads squares, which have no padding")
    before = subject.image(inputs)
    longer = {**inputs, "pixel_values": _more(inputs["pixel_values"]), MASK: _more(inputs[MASK])}
    hidden = ~longer[MASK].bool()[..., None]
    noise = torch.randn(longer["pixel_values"].shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    noisy = {**longer, "pixel_values": torch.where(hidden, noise, longer["pixel_values"])}
    seen = {**noisy, MASK: torch.ones_like(noisy[MASK])}
    moves = [distance(before, subject.image(one)) for one in (longer, noisy)]
    control = distance(before, subject.image(seen))
    if control < CONTROL * subject.nothing:
        return not_applicable(f"noise in patches that are not masked moves an embedding by {control:.1e} only")
    shown = f"16 patches of padding more move an image by {moves[0]:.1e}, noise in them by {moves[1]:.1e}"
    detail = f"{shown} ({control:.1e} unmasked)"
    return Finding(measured=largest(moves), limit=subject.rounding, detail=detail)


def _more(rows: Tensor, count: int = 16) -> Tensor:
    """[B, N, ...] with zeros after the last patch."""
    return torch.cat([rows, rows.new_zeros(rows.shape[0], count, *rows.shape[2:])], 1)


CHECKS = (
    Check("distinct", "different images and texts have different embeddings", distinct, 85),
    Check("batch-mates", "an embedding does not depend on who else is in the batch", mates, 90),
    Check("naflex-padding", "padding patches do not move an embedding", naflex, 110),
)
