"""What transformers' `generate()` asks of a model: inputs of each step, masks ahead of it, copies for beams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from vlm.errors import DataError
from vlm.model import decoder
from vlm.model.inputs import NAFLEX, PIXELS, Inputs
from vlm.model.layer_masks import decoder_masks, no_padding
from vlm.model.merge import images_per_sample


class Generating(GenerationMixin):
    """`VLM` as transformers' `generate()` sees it."""

    config: Any
    image_token_counts: Callable[..., Tensor]
    """The decoder tokens of each image, int64[M], from the pixels' tensors."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' own; what belongs to the pixels goes where they go, to the first step only."""
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if prepared.get("pixel_values") is None:
            prepared = {name: value for name, value in prepared.items() if name not in NAFLEX}
        return prepared

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Any = None,
        past_key_values: Any = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Masks ahead of a compiled step with a static cache (called by generate())."""
        given = Inputs(token_type_ids=token_type_ids, cache=past_key_values if cache is None else cache)
        if attention_mask is None:
            attention_mask = no_padding(inputs_embeds, given.cache)
        return decoder_masks(decoder.facts(config.text_config), given, inputs_embeds, attention_mask)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Copies of each sample for beams. The library repeats each image in place (a a b b), but a sample with two
        images needs them as a group (a b a b)."""
        pixels = {name: model_kwargs.pop(name, None) for name in PIXELS}
        if expand_size > 1 and pixels["pixel_values"] is not None:
            if input_ids is None:
                raise DataError("generation with pixel_values needs input_ids, which hold the placeholders")
            groups = images_per_sample(input_ids == self.config.image_token_id, self.image_token_counts(**pixels))
            order = [image for group in groups for _ in range(expand_size) for image in group]
            pixels = {name: None if value is None else value[order] for name, value in pixels.items()}
        parent: Any = super()
        input_ids, expanded = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**expanded, **{name: value for name, value in pixels.items() if value is not None}}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        types = model_kwargs.get("token_type_ids")
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if types is not None:
            # Generated tokens are suffix; the library would repeat the prefix's type.
            new = types.new_ones((types.shape[0], num_new_tokens))
            updated["token_type_ids"] = torch.cat([types, new], dim=-1)
        return updated
