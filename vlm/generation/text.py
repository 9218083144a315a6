"""Text of one batch through transformers' `generate`, or PaliGemma's beams, with our masks, positions and padding."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from vlm.errors import GenerationError
from vlm.generation.beam import beam_search as big_vision_beams
from vlm.generation.decoding import BeamSearch, Decoding, check_rule
from vlm.generation.predictor import Network
from vlm.model.batch import Batch
from vlm.model.modes import in_mode
from vlm.model.processor import Processor


@torch.inference_mode()
def generate_ids(
    model: Network, batch: Batch, settings: GenerationConfig, *, beam_search: BeamSearch = Decoding.beam_search
) -> torch.Tensor:
    """Generate for one batch made without suffixes; returns int64[B, N], the new tokens only, padded after EOS.

    Args:
        settings: what `generation_config` returns, or any of transformers'.
        beam_search: the rule when `settings.num_beams` is above 1. `big_vision` reads `num_beams`, `max_new_tokens`,
            `suppress_tokens` and the ids of EOS and padding; the rest belongs to transformers' search, and is refused.

    Raises:
        GenerationError: a batch made for training or with packed samples, or settings that the rule would not read.
    """
    if batch.labels is not None:
        raise GenerationError("this batch was made for training (it has labels, padding right); make it without suffix")
    if batch.sequence_ids is not None:
        raise GenerationError("this batch has packed samples (sequence_ids); generate for samples that are not packed")
    check_rule(beam_search, do_sample=bool(settings.do_sample), length_penalty=settings.length_penalty)
    batch = batch.to(model.device)
    with in_mode(model):
        if beam_search == "big_vision" and (settings.num_beams or 1) > 1:
            return _big_vision(model, batch, settings)
        mixin: Any = model  # transformers types `self` of generate as a class of its own
        output: torch.Tensor = mixin.generate(**batch, generation_config=settings)
    return output[:, batch.input_ids.shape[1] :]


READ_BY_BIG_VISION = {
    *("num_beams", "max_new_tokens", "suppress_tokens", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("do_sample", "length_penalty", "use_cache", "transformers_version"),
}
"""Settings that the original rule reads, that have been checked before, or that change nothing."""


def _big_vision(model: Network, batch: Batch, settings: GenerationConfig) -> torch.Tensor:
    given = settings.to_diff_dict()
    unread = [f"{name}={value}" for name, value in given.items() if name not in READ_BY_BIG_VISION]
    if unread:
        raise GenerationError(
            f"beam_search='big_vision' does not read {', '.join(unread)}; leave it out or use"
            f" beam_search='transformers'"
        )
    eos, limit = settings.eos_token_id, settings.max_new_tokens
    if not isinstance(eos, int) or limit is None:
        raise GenerationError(
            f"big_vision's beam search needs one eos_token_id and max_new_tokens, got eos_token_id={eos!r},"
            f" max_new_tokens={limit!r}; take the settings from vlm.generation.text.generation_config"
        )
    return big_vision_beams(
        model,
        batch,
        num_beams=int(settings.num_beams or 1),
        max_new_tokens=limit,
        eos=eos,
        pad=eos if settings.pad_token_id is None else settings.pad_token_id,
        suppress=settings.suppress_tokens or (),
    )[0]


def generation_config(processor: Processor, decoding: Decoding) -> GenerationConfig:
    """transformers' settings for the processor's tokens."""
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    beams = {"length_penalty": decoding.length_penalty}
    tokenizer = processor.tokenizer
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        do_sample=decoding.do_sample,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # A generated placeholder would ask for an image that is not there.
        suppress_tokens=[processor.image_token_id],
        **(sampling if decoding.do_sample else beams if decoding.num_beams > 1 else {}),
    )
