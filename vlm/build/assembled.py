"""Tower, projector and decoder put together: the weights of each part are its checkpoint's, or new ones from a random
stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from vlm.build.choice import Choice
from vlm.checkpoints.parts import load_decoder, load_tower
from vlm.checkpoints.streams import seeded
from vlm.checkpoints.tower_head import head_of
from vlm.model import decoder as decoders
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor
from vlm.model.projecting import init_weights
from vlm.text.tokenizer import Tokenizer, add_image_tokens, image_token_id

VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, as in PaliGemma's Hugging Face checkpoints."""


def assemble(
    choice: Choice,
    projector: str | dict[str, Any],
    text_config: PreTrainedConfig,
    tokenizer: Tokenizer,
    *,
    decoder: Path | None = None,
    seed: int = 0,
) -> tuple[VLM, Processor]:
    """A model of these parts.

    Args:
        choice: the vision tower, or towers.
        projector: its kind, or `{"kind": ..., **settings}`.
        text_config: of the decoder; its vocabulary grows to the tokenizer's.
        tokenizer: gets `<loc>`, `<seg>` and `<image>` tokens where they are missing.
        decoder: directory of the decoder's checkpoint; None draws new weights.
        seed: of all new weights.

    Returns:
        (model in float32 and eval mode, processor).
    """
    old_rows = text_config.vocab_size
    add_image_tokens(tokenizer)
    text_config.dtype = None
    text_config.vocab_size = _rows_for(tokenizer, old_rows)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    config = VLMConfig(
        encoder=choice.kind,
        vision_config=choice.config,
        projector_config={"kind": projector} if isinstance(projector, str) else projector,
        text_config=text_config,
        image_token_id=image_token_id(tokenizer),
    )
    with torch.random.fork_rng():  # the weights drawn here are all replaced below, each part from its own stream
        model = VLM(config)
    inner = model.model
    model.tower_head = _fill_towers(inner.vision_tower, choice, seed)
    seeded(seed, "projector", lambda: init_weights(inner.multi_modal_projector))
    if decoder is not None:
        seeded(seed, "vocabulary", lambda: load_decoder(inner.language_model, decoder, old_rows))
    else:
        _load_fresh(inner.language_model, "decoder", lambda: decoders.build(text_config), seed)
    model.tie_weights()
    return model.eval(), Processor(tokenizer, choice.transform, config.projector_config)


def _rows_for(tokenizer: Tokenizer, rows: int) -> int:
    """The decoder's vocabulary: as it is where it holds every token (padding and unused rows stay), else larger."""
    needed = max(tokenizer.get_vocab().values()) + 1
    return rows if needed <= rows else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _fill_towers(tower: Any, choice: Choice, seed: int) -> dict[str, Tensor]:
    """The weights of each tower: its checkpoint's, or new ones from a stream of its own. Returns what the checkpoints
    have beside the towers, for an export (`vlm.checkpoints.tower_head`)."""
    head: dict[str, Tensor] = {}
    alone = len(choice.members) == 1
    towers = [tower] if alone else list(tower.members)
    for number, (module, member) in enumerate(zip(towers, choice.members, strict=True)):
        spec = encoder_spec(member.kind)
        if isinstance(member.source, Path):
            load_tower(module, member.source, resize_positions=member.resized)
            prefix = "" if alone else f"members.{number}."
            transform = choice.transform if alone else choice.transform.members[number]
            beside = head_of(module, spec, transform, member.source)
            head |= {prefix + name: tensor for name, tensor in beside.items()}
            continue
        name = "encoder" if alone else f"encoder {number}"
        build, config = spec.encoder._from_config, member.config
        _load_fresh(module, name, lambda: build(config), seed)  # noqa: B023
    return head


def _load_fresh(module: nn.Module, name: str, build: Callable[[], nn.Module], seed: int) -> None:
    weights: dict[str, Tensor] = {}
    seeded(seed, name, lambda: weights.update(build().state_dict()))
    module.load_state_dict(weights)
