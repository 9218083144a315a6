"""Both towers from a checkpoint's tensors."""

from __future__ import annotations

from typing import Any

import torch

from vlm.checkpoints.source import FLOATS, Source, place, put
from vlm.model.dtypes import named

SCALARS = ("logit_scale", "logit_bias")


def fill(model: Any, source: Source, *, dtype: str | torch.dtype | None, allow_nonfinite: bool) -> Any:
    """A `DualTower`, built without memory, with the tensors of a source, in eval mode. Scale and bias are in float32.

    Args:
        dtype: of the weights; None: what all the checkpoint's matrices have, or float32.

    Raises:
        CheckpointError: tensors that are missing, unexpected, mis-shaped or not finite.
    """
    place(model.model, source, dtype=_one_dtype(source, dtype), allow_nonfinite=allow_nonfinite)
    for name in SCALARS:
        if name in source.shapes:  # rounded to 16 bits, a temperature of 118 is off by a per cent or two
            put(model.model, name, source.read(name).float())
    return model.eval()


def _one_dtype(source: Source, dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return named(dtype)
    found = {source.dtypes[name] for name, shape in source.shapes.items() if len(shape) > 1}
    return FLOATS[found.pop()] if len(found) == 1 else torch.float32
