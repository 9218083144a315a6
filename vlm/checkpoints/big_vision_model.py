"""Google's own PaliGemma checkpoints as models: big_vision's arrays, a tokenizer, a `VLM`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoints.big_vision import Arrays, headers, source
from vlm.checkpoints.big_vision_configs import paligemma_config
from vlm.checkpoints.loader import load_model
from vlm.checkpoints.names import EMBEDDING
from vlm.checkpoints.placement import Placement
from vlm.checkpoints.source import Source
from vlm.images.transforms import ImageTransform
from vlm.model.forward import VLM
from vlm.model.processor import Processor
from vlm.text.tokenizer import Tokenizer, image_token_id


def paligemma(
    arrays: Arrays,
    tokenizer: Tokenizer,
    *,
    origin: str = "big_vision parameters",
    llm: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    placement: Placement | None = None,
    allow_nonfinite: bool = False,
) -> tuple[VLM, Processor]:
    """A PaliGemma from big_vision's arrays.

    Args:
        arrays: big_vision name (without `params/`) -> array.
        tokenizer: the tokenizer that belongs to it, with an `<image>` token.
        origin: where the arrays come from, for messages.
        llm, image_size: as `paligemma_config`.

    Returns:
        (model, processor). Images are resized as in big_vision: bilinear with antialias, cut to 8 bit.

    Raises:
        CheckpointError: arrays that are missing, unexpected, mis-shaped or not finite.
    """
    model = paligemma_model(
        arrays,
        image_token_id(tokenizer),
        origin=origin,
        llm=llm,
        image_size=image_size,
        placement=placement,
        allow_nonfinite=allow_nonfinite,
    )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config.text_config, name, getattr(tokenizer, name))
    vision = model.config.vision_config
    return model, Processor(tokenizer, original_transform(vision.image_size, vision.patch_size))


def original_transform(image_size: int, patch_size: int) -> ImageTransform:
    """Resizing as big_vision's transfers do: bilinear with antialias, cut to 8 bit, values in [-1, 1]."""
    return ImageTransform(
        mode="squash", image_size=image_size, patch_size=patch_size, resample="bilinear", rounding="down"
    )


def paligemma_model(
    arrays: Arrays,
    image_token: int,
    *,
    origin: str = "big_vision parameters",
    llm: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    placement: Placement | None = None,
    allow_nonfinite: bool = False,
) -> VLM:
    """The model alone; `image_token` is the id of the `<image>` placeholder. Arguments as `paligemma`."""
    shapes, _ = headers(arrays, origin)
    config = paligemma_config(shapes, image_token, origin=origin, llm=llm, image_size=image_size)
    parameters = _with_placeholder_rows(source(arrays, origin, two_towers=False), config.text_config.vocab_size)
    return load_model(VLM, config, parameters, placement, allow_nonfinite=allow_nonfinite)


def _with_placeholder_rows(stored: Source, vocab: int) -> Source:
    """Rows for `<image>` and up to a multiple of 64, which the original does not have: the mean embedding, as in
    transformers' conversion (there with a little noise). No image or text token ever reads them."""
    rows, width = stored.shapes[EMBEDDING]
    if rows >= vocab:
        return stored

    def read(wanted: str) -> Tensor:
        tensor = stored.read(wanted)
        if wanted != EMBEDDING:
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(vocab - rows, -1)])

    return replace(stored, shapes={**stored.shapes, EMBEDDING: (vocab, width)}, read=read)
