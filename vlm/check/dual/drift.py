"""How far half precision moves the embeddings: a copy of the model in float32 against one in bfloat16 and float16."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from vlm.check.dual_subject import TEXTS, DualSubject
from vlm.check.report import Finding
from vlm.check.subject import Check

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Largest 1 - cosine. Healthy models measure a tenth of it and less; an overflow gives NaN."""


@torch.no_grad()
def drift(subject: DualSubject, dtype: torch.dtype) -> Finding:
    """Images and texts in float32 and in `dtype`: the largest 1 - cosine, and what it does to a probability."""
    inputs, ids = subject.pixels(), subject.ids(TEXTS)
    found = []
    for kind in (torch.float32, dtype):
        model = _in(subject.model, kind)
        image, text = subject.image(inputs, model=model), subject.text(ids, model=model)
        logits = model.logits(image.to(model.device), text.to(model.device)).float()
        found.append((image, text, model.probabilities(logits).cpu()))
    (image, text, sure), (image_half, text_half, sure_half) = found
    worst = {
        "images": float((1 - (image * image_half).sum(-1)).max()),
        "texts": float((1 - (text * text_half).sum(-1)).max()),
    }
    moved = float((sure - sure_half).abs().max())
    name = str(dtype).removeprefix("torch.")
    shown = f"images {worst['images']:.1e}, texts {worst['texts']:.1e}"
    detail = f"1 - cosine to float32: {shown}; a probability moves {moved:.1e}"
    broken = [key for key, value in worst.items() if not value == value]
    problem = f"{' and '.join(broken)} become NaN in {name}: it overflows; use bfloat16 or float32" if broken else ""
    return Finding(
        measured=float(torch.tensor(list(worst.values())).max()), limit=LIMITS[dtype], detail=detail, problem=problem
    )


def _in(model: Any, dtype: torch.dtype) -> Any:
    """The model itself where it has this dtype, else a copy: the model is left as it was found."""
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)


CHECKS = (
    Check(
        "bfloat16", "embeddings in bfloat16 are those of float32", functools.partial(drift, dtype=torch.bfloat16), 120
    ),
    Check("float16", "embeddings in float16 are those of float32", functools.partial(drift, dtype=torch.float16), 130),
)
