"""What a forward returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What transformers calls the decoder's cache in arguments and outputs: `cache` from 5.24 on."""


@dataclass
class VLMModelOutput(ModelOutput):
    """What a forward of the model without its output layer returns.

    Attributes:
        last_hidden_state: float[B, S, D].
        cache: the decoder's cache; called `past_key_values` before transformers 5.24, as in its own outputs.
        hidden_states, attentions: of the decoder, when asked for.
        image_hidden_states: float[T, D], the image tokens that entered the decoder, in placeholder order.
    """

    last_hidden_state: Tensor | None = None
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class VLMOutput(ModelOutput):
    """What a forward returns, in transformers' order; what only this library has comes last.

    Attributes:
        loss: float32[], mean over this batch, or `loss_sum` divided by `num_items_in_batch`; with labels only.
        logits: float[B, S, V] (or the positions of `logits_to_keep`). With labels only where no gradient is recorded,
            or where they are asked for: a step of training never needs them.
        cache, hidden_states, attentions, image_hidden_states: as in `VLMModelOutput`.
        loss_sum: float32[], the loss before division; differentiable. Divide gradients by the sum of `loss_weight` over
            micro-batches and ranks.
        loss_weight: float32[], what `loss_sum` is divided by: supervised tokens, or examples.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    loss_sum: Tensor | None = None
    loss_weight: Tensor | None = None
