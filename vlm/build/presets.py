"""Ready-made small models, offline."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from vlm.build.assembled import assemble
from vlm.build.towers import choose
from vlm.model.decoder import small
from vlm.model.forward import VLM
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor
from vlm.text import tokenizer as tokenizers

TINY_CORPUS = [
    "caption en",
    "answer en what color is the square?",
    "a red square",
    "a green circle left of a blue triangle",
    "detect square ; circle",
    "yes",
    "no",
    "0123456789",
]


def tiny_decoder(kind: str, **settings: Any) -> PreTrainedConfig:
    """A two-layer decoder configuration: `gemma`, `gemma2` (soft-caps, sliding window 8) or `gemma3_text` (sliding
    window 8).

    Raises:
        ConfigError: unknown kind.
    """
    return small(kind, **settings)


def tiny(
    encoder: str = "siglip",
    decoder: str = "gemma",
    projector: str | dict[str, Any] = "linear",
    *,
    seed: int = 0,
    image: dict[str, Any] | None = None,
    **decoder_settings: Any,
) -> tuple[VLM, Processor]:
    """A random model of about 0.1 M parameters with its own tokenizer, for tests and for trying things out.

    Args:
        encoder: an encoder kind.
        decoder: `gemma`, `gemma2` or `gemma3_text`; `decoder_settings` change its configuration.
        image: settings of the image transform; a NaFlex tower gets a budget of 16 patches unless told otherwise.
    """
    spec = encoder_spec(encoder)
    vision = spec.tiny()
    if spec.any_aspect:
        image = {"max_num_patches": 16, **(image or {})}
    tokenizer = tokenizers.build(TINY_CORPUS * 20, vocab_size=400)
    text_config = tiny_decoder(decoder, **decoder_settings)
    return assemble(choose(vision, image=image), projector, text_config, tokenizer, seed=seed)
