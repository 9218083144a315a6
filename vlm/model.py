"""`VLM`: a vision tower, a projector and a Gemma decoder behind one forward.

Parameter names are those of transformers' PaliGemma for the same parts (`model.vision_tower`,
`model.multi_modal_projector`, `model.language_model`,
`lm_head`), so weights move between the two unchanged. Importing this module registers `VLM` with transformers' Auto
classes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma2Model,
    Gemma3TextModel,
    GemmaModel,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from vlm import loss, masks, projectors
from vlm.config import VLMConfig, part
from vlm.encoders import EncoderOutput, feature_width, square_grid
from vlm.errors import ConfigError, DataError
from vlm.processor import Processor

DECODERS: dict[str, type[PreTrainedModel]] = {
    "gemma": GemmaModel,
    "gemma2": Gemma2Model,
    "gemma3_text": Gemma3TextModel,
}
"""Decoder classes by transformers' `model_type`."""
NAFLEX_INPUTS = ("pixel_attention_mask", "spatial_shapes")
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What transformers calls the decoder's cache in arguments and outputs: `cache` from 5.24 on."""


@dataclass
class VLMOutput(ModelOutput):
    """What a forward returns.

    Attributes:
        loss: float32[], mean over this batch; with labels only.
        loss_sum: float32[], the loss before division; differentiable. Divide gradients by the sum of `loss_weight` over
            micro-batches and ranks.
        loss_weight: float32[], what `loss_sum` is divided by: supervised tokens, or examples.
        logits: float[B, S, V] without labels (or the last `logits_to_keep` positions), None with labels.
        cache: the decoder's cache; called `past_key_values` before transformers 5.24, as in its own outputs.
        hidden_states, attentions: of the decoder, when asked for.
        image_hidden_states: float[T, D], the image tokens that entered the decoder, in placeholder order.
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    loss_weight: Tensor | None = None
    logits: Tensor | None = None
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class VLMPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the architecture."""

    config_class = VLMConfig
    config: VLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "GemmaDecoderLayer",
        "Gemma2DecoderLayer",
        "Gemma3DecoderLayer",
        "SiglipEncoderLayer",
        "Siglip2EncoderLayer",
        "CLIPEncoderLayer",
        "Dinov2Layer",
        "DINOv3ViTLayer",
        "Block",  # timm's, and below
        "EvaBlock",
        "ConvNeXtBlock",
        "SwinTransformerBlock",
        "ResidualAttentionBlock",  # open_clip's
    ]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Towers and decoders are transformers models and initialise themselves; only the projector is ours.
        if isinstance(module, VLMModel):
            projectors.init_weights(module.multi_modal_projector)


class VLMModel(VLMPreTrainedModel):
    """Tower, projector and decoder without the output embedding."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        encoder = part("vlm.encoders", config.encoder).Encoder
        decoder = DECODERS[config.text_config.model_type]
        self.vision_tower = encoder._from_config(config.vision_config)
        self.multi_modal_projector = projectors.build(
            config.projector_config, feature_width(config.vision_config), config.text_config.hidden_size
        )
        if attention_softcap(config) is not None:
            # sdpa has no soft-cap: transformers 5.17 would drop it in silence, later versions refuse.
            config.text_config._attn_implementation = "eager"
        self.language_model = decoder._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def image_tokens(self, pixel_values: Tensor, **naflex: Tensor) -> tuple[Tensor, Tensor]:
        """Images to decoder tokens, padding rows dropped.

        Returns:
            (float[T, D], int64[M]): the tokens of all images one after the other, and how many each image has.
        """
        return self.project(self.vision_tower(pixel_values, **naflex))

    def project(self, encoded: EncoderOutput) -> tuple[Tensor, Tensor]:
        """Tower features to decoder tokens; returns what `image_tokens` returns."""
        tokens, mask = self.multi_modal_projector(encoded.features, encoded.mask, encoded.grid)
        if mask is None:
            return tokens.flatten(0, 1), torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
        return tokens[mask], mask.sum(1)

    def embed(self, input_ids: Tensor, encoded: EncoderOutput | None) -> tuple[Tensor, Tensor | None]:
        """Token embeddings with the image tokens in place of their placeholders.

        Returns:
            (float[B, S, D], float[T, D] or None): embeddings (scaled by sqrt(D) inside the embedding layer; image
            tokens are not scaled) and the image tokens alone.
        """
        embeds = self.get_input_embeddings()(input_ids)
        placeholders = input_ids == torch.tensor(self.config.image_token_id, device=input_ids.device)
        if encoded is None:
            if bool(placeholders.any()):
                raise DataError(
                    f"{int(placeholders.sum())} image placeholders but no pixel_values; pass the processor's whole"
                    f" batch: model(**batch)"
                )
            return embeds, None
        tokens, counts = self.project(encoded)
        images_per_sample(placeholders, counts)
        tokens = tokens.to(embeds.dtype)
        return embeds.masked_scatter(placeholders[..., None], tokens), tokens

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor],
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        sequence_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder with the prefix-LM mask; returns transformers' BaseModelOutputWithPast."""
        if isinstance(attention_mask, dict):
            layer_masks: Any = attention_mask
        else:
            layer_masks = decoder_masks(self.config, inputs_embeds, attention_mask, token_type_ids, sequence_ids, cache)
        if set(layer_masks) == {"full_attention"} and not getattr(self.config.text_config, "layer_types", None):
            layer_masks = layer_masks["full_attention"]
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=layer_masks,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )


class VLM(VLMPreTrainedModel, GenerationMixin):
    """A PaliGemma-style vision-language model: tower -> projector -> Gemma."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = False

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        if config.image_token_id is None:
            raise ConfigError(
                "VLMConfig.image_token_id is not set; take it from the processor: processor.image_token_id"
            )
        self.model = VLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def parts(self) -> dict[str, nn.Module]:
        """The three parts by name; each parameter belongs to exactly one (the output embedding is tied to the
        decoder's)."""
        return {
            "encoder": self.model.vision_tower,
            "projector": self.model.multi_modal_projector,
            "decoder": nn.ModuleDict({"language_model": self.model.language_model, "lm_head": self.lm_head}),
        }

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first parameter that is in memory (parts on disk are on none)."""
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

    # The names are spelled out because generate() checks its arguments against this signature.
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        reduction: loss.Reduction = "token",
        encoded: EncoderOutput | None = None,
        **kwargs: Any,
    ) -> VLMOutput:
        """Loss with labels, logits without. The tensors are those of `vlm.Batch`.

        Args:
            reduction: of the loss, `token` or `example` (see `vlm.loss`).
            encoded: tower features computed before, instead of `pixel_values`.
            cache: of the decoder; `past_key_values` is its name before transformers 5.24, and the same.
            inputs_embeds, use_cache, logits_to_keep: as for any transformers decoder.

        Raises:
            DataError: placeholders and image tokens differ in number; labels without token_type_ids; no supervised
                token.
        """
        self._check_inputs(labels, token_type_ids, inputs_embeds, input_ids)
        cache = past_key_values if cache is None else cache
        image_tokens = None
        if inputs_embeds is None:
            assert input_ids is not None
            if encoded is None and pixel_values is not None:
                encoded = self.encode(pixel_values, pixel_attention_mask, spatial_shapes)
            inputs_embeds, image_tokens = self.model.embed(input_ids, encoded)
        if attention_mask is None:
            attention_mask = no_padding(inputs_embeds, cache)
        if position_ids is None and not isinstance(attention_mask, dict):
            # The end of the row: with a filled cache the attention mask covers the cached tokens too.
            position_ids = masks.position_ids(attention_mask, sequence_ids)[:, -inputs_embeds.shape[1] :]
        out = self.model(
            inputs_embeds,
            attention_mask,
            token_type_ids,
            position_ids,
            sequence_ids=sequence_ids,
            cache=cache,
            use_cache=False if labels is not None else use_cache,
            **kwargs,
        )
        result = VLMOutput(
            **{CACHE: out.get(CACHE)},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=image_tokens,
        )
        if labels is None:
            result.logits = self.logits(keep(out.last_hidden_state, logits_to_keep))
        else:
            self._add_loss(result, out.last_hidden_state, labels, sequence_ids, reduction)
        return result

    def encode(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> EncoderOutput:
        """Run the vision tower on the pixels of a batch."""
        naflex: dict[str, Tensor] = {}
        if pixel_attention_mask is not None and spatial_shapes is not None:
            naflex = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        output: EncoderOutput = self.model.vision_tower(pixel_values, **naflex)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states float[..., D] to logits float[..., V], with the decoder's final soft-cap unless
        `softcap_in_generation` is off."""
        softcap = final_softcap(self.config) if self.config.softcap_in_generation else None
        return loss.apply_softcap(self.lm_head(hidden), softcap)

    def _add_loss(
        self, result: VLMOutput, hidden: Tensor, labels: Tensor, sequence_ids: Tensor | None, reduction: loss.Reduction
    ) -> None:
        rows = loss.supervised_rows(labels, sequence_ids, reduction)
        if rows.target.numel() == 0:
            raise DataError("no token of this batch is supervised: all labels are -100; give each sample a suffix")
        softcap = final_softcap(self.config) if self.config.softcap_in_loss else None
        result.loss_sum = loss.linear_cross_entropy(
            hidden[rows.batch, rows.position], self.lm_head.weight, rows.target, rows.weight, softcap=softcap
        )
        result.loss_weight = rows.total
        result.loss = result.loss_sum / rows.total

    @staticmethod
    def _check_inputs(
        labels: Tensor | None, token_type_ids: Tensor | None, inputs_embeds: Tensor | None, input_ids: Tensor | None
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise DataError("pass exactly one of input_ids and inputs_embeds")
        if labels is not None and token_type_ids is None:
            raise DataError(
                "labels without token_type_ids: the prefix-LM mask cannot be known and the targets would leak;"
                " pass the processor's whole batch: model(**batch)"
            )

    def set_attn_implementation(self, attn_implementation: str | dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Switch the attention backend at run time.

        Raises:
            ConfigError: sdpa for a decoder with an attention soft-cap (Gemma 2), which sdpa would drop.
        """
        wanted: Any = attn_implementation
        if isinstance(wanted, dict):
            wanted = wanted.get("text_config", wanted.get("", None))
        if attention_softcap(self.config) is not None and wanted not in (None, "eager"):
            raise ConfigError(
                f"{wanted!r} attention would drop the decoder's soft-cap of {attention_softcap(self.config)} (Gemma"
                f" 2); use 'eager'"
            )
        return super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: VLMConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Any = None,
        past_key_values: Any = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Masks ahead of a compiled step with a static cache (called by generate())."""
        cache = past_key_values if cache is None else cache
        if attention_mask is None:
            attention_mask = no_padding(inputs_embeds, cache)
        return decoder_masks(config, inputs_embeds, attention_mask, token_type_ids, None, cache)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Copies of each sample for beams. The library repeats each image in place (a a b b), but a sample with two
        images needs them as a group (a b a b)."""
        pixels = {name: model_kwargs.pop(name, None) for name in ("pixel_values", *NAFLEX_INPUTS)}
        if expand_size > 1 and pixels["pixel_values"] is not None:
            if input_ids is None:
                raise DataError("generation with pixel_values needs input_ids, which hold the placeholders")
            groups = images_per_sample(input_ids == self.config.image_token_id, self._image_token_counts(**pixels))
            order = [image for group in groups for _ in range(expand_size) for image in group]
            pixels = {name: None if value is None else value[order] for name, value in pixels.items()}
        parent: Any = super()
        input_ids, expanded = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**expanded, **{name: value for name, value in pixels.items() if value is not None}}

    def _image_token_counts(self, pixel_values: Tensor, spatial_shapes: Tensor | None = None, **_: Any) -> Tensor:
        """int64[M], the decoder tokens that each image will give."""
        if spatial_shapes is None:
            spatial_shapes = torch.tensor([square_grid(self.config.vision_config)] * pixel_values.shape[0])
        num_tokens: Any = self.model.multi_modal_projector.num_tokens
        return torch.tensor([num_tokens((rows, columns)) for rows, columns in spatial_shapes.tolist()])

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


def keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted: the last n (0 = all), or an index."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]


def attention_softcap(config: VLMConfig) -> float | None:
    """Soft-cap of the decoder's attention scores (Gemma 2), or None."""
    return getattr(config.text_config, "attn_logit_softcapping", None)


def final_softcap(config: VLMConfig) -> float | None:
    """Soft-cap of the decoder's logits (Gemma 2), or None."""
    return getattr(config.text_config, "final_logit_softcapping", None)


def decoder_masks(
    config: VLMConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None,
    sequence_ids: Tensor | None,
    cache: Any,
) -> dict[str, Tensor]:
    """The additive mask of each layer type that the decoder has: `full_attention` and, for Gemma 2 and 3,
    `sliding_attention`.

    Args:
        inputs_embeds: float[B, S, D], for its shape, dtype and device.
        attention_mask: int[B, T], for cached and new tokens.
        token_type_ids: int[B, S] or [B, T], of the new tokens at the end; None while decoding one token at a time.

    Raises:
        DataError: a first input without token_type_ids, prefix tokens after a filled cache, or an attention mask that
            leaves the cached tokens out.
    """
    num_new = inputs_embeds.shape[1]
    total = attention_mask.shape[1]
    if total == num_new and cache is not None and int(cache.get_seq_length()):
        raise DataError(
            f"attention_mask covers the {num_new} new tokens only, but the cache holds"
            f" {int(cache.get_seq_length())} more; it must cover cached and new tokens"
        )
    types = layer_types(config)
    window = getattr(config.text_config, "sliding_window", None)
    result: dict[str, Tensor] = {}
    for layer_type, layer in types.items():
        layer_window = window if layer_type == "sliding_attention" else None
        if total == num_new:
            if token_type_ids is None:
                raise DataError(
                    "token_type_ids is missing: without it prefix and suffix cannot be told apart; pass the"
                    " processor's whole batch: model(**batch)"
                )
            allowed = masks.prefix_lm_mask(attention_mask, token_type_ids, sequence_ids, window=layer_window)
            keys, _ = _key_range(cache, layer, total, num_new)
            allowed = _pad_keys(allowed, keys)
        else:
            if token_type_ids is not None and bool((token_type_ids[:, -num_new:] == 0).any()):
                raise DataError(
                    "prefix tokens after a filled cache would not be seen by it; pass the whole prefix at once"
                )
            keys, first = _key_range(cache, layer, total, num_new)
            allowed = masks.decode_mask(attention_mask, num_new, keys, first, window=layer_window)
        result[layer_type] = masks.additive(allowed, inputs_embeds.dtype)
    return result


def no_padding(inputs_embeds: Tensor, cache: Any) -> Tensor:
    """The attention mask of a batch without padding, int64[B, T], for cached and new tokens (generate() drops a mask
    that holds no zero)."""
    held = 0 if cache is None else int(cache.get_seq_length())
    rows, new = inputs_embeds.shape[:2]
    return torch.ones(rows, held + new, dtype=torch.int64, device=inputs_embeds.device)


def layer_types(config: VLMConfig) -> dict[str, int]:
    """Layer types of the decoder, each with the index of its first layer."""
    types = getattr(config.text_config, "layer_types", None) or ["full_attention"]
    return {layer_type: types.index(layer_type) for layer_type in dict.fromkeys(types)}


def _pad_keys(allowed: Tensor, num_keys: int) -> Tensor:
    """Hide the key slots of a static cache that are not written yet."""
    return nn.functional.pad(allowed, (0, num_keys - allowed.shape[-1]))


def _key_range(cache: Any, layer: int, total: int, num_new: int) -> tuple[int, int]:
    """(number of keys, position of the first key) that attention will see in this layer: every token so far without a
    cache, else what the cache will return (all slots of a static one, the last ones of a sliding one)."""
    if cache is None:
        return total, 0
    keys, first = cache.get_mask_sizes(num_new, layer)
    return int(keys), int(first)


def images_per_sample(placeholders: Tensor, counts: Tensor) -> list[list[int]]:
    """Which images belong to which sample: each must have exactly as many placeholders as its images have tokens.

    Args:
        placeholders: bool[B, S].
        counts: int64[M], tokens of each image, in order.

    Returns:
        for each sample the indices of its images.

    Raises:
        DataError: names the first sample that differs, with both numbers.
    """
    tokens = counts.tolist()
    groups: list[list[int]] = []
    image = 0
    for sample, wanted in enumerate(placeholders.sum(1).tolist()):
        group: list[int] = []
        while sum(tokens[i] for i in group) < wanted and image < len(tokens):
            group.append(image)
            image += 1
        have = sum(tokens[i] for i in group)
        if have != wanted:
            raise DataError(
                f"sample {sample} of the batch has {wanted} image placeholders, but its images give {have} tokens;"
                f" placeholders are written by the"
                " processor only, and its image_transform must be the tower's"
            )
        groups.append(group)
    if image != len(tokens):
        raise DataError(
            f"{len(tokens)} images, but the placeholders of the batch take only the first {image}; one image list per"
            f" sample"
        )
    return groups


AutoConfig.register(VLMConfig.model_type, VLMConfig, exist_ok=True)
AutoModel.register(VLMConfig, VLMModel, exist_ok=True)
AutoModelForImageTextToText.register(VLMConfig, VLM, exist_ok=True)
AutoProcessor.register(VLMConfig, Processor, exist_ok=True)
