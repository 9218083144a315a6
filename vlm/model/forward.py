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
from transformers.utils import ModelOutput, can_return_tuple

from vlm import projectors
from vlm.encoders._layers import feature_width
from vlm.encoders.contract import EncoderOutput, check_output, square_grid
from vlm.errors import ConfigError, DataError
from vlm.model import attention as backends
from vlm.model import dtypes, inputs, loss, masks
from vlm.model.attention import attention_softcap
from vlm.model.config import VLMConfig
from vlm.model.processor import Processor
from vlm.registry import part

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

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # Asked for in a configuration: transformers calls this when the model is built. The parts check their own.
        backends.check_name(attn_implementation, self.config)
        adjusted: str = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        return adjusted

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
        backends.check(config, {"text_config": config.text_config._attn_implementation})
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
        return self.project(self.encode(pixel_values, **naflex))

    def project(self, encoded: EncoderOutput) -> tuple[Tensor, Tensor]:
        """Tower features to decoder tokens; returns what `image_tokens` returns.

        Raises:
            ConfigError: the tower gave what is no `EncoderOutput` of its configuration.
        """
        check_output(encoded, self.config)
        features = dtypes.enter(encoded.features, self.multi_modal_projector)
        tokens, mask = self.multi_modal_projector(features, encoded.mask, encoded.grid)
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
        tokens = tokens.to(embeds)  # a tower may be in another dtype, or on another device
        return embeds.masked_scatter(placeholders[..., None], tokens), tokens

    def encode(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> EncoderOutput:
        """Run the vision tower on the pixels of a batch.

        Raises:
            DataError: tensors that the tower does not read, or one that it needs is not there.
        """
        given = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        naflex = {name: tensor for name, tensor in given.items() if tensor is not None}
        inputs.check_tower(self.vision_tower, naflex, self.config.encoder)
        output: EncoderOutput = self.vision_tower(pixel_values, **naflex)
        return output

    @dtypes.told
    @can_return_tuple
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
        encoded: EncoderOutput | None = None,
        **kwargs: Any,
    ) -> VLMModelOutput:
        """Image tokens in the place of their placeholders, then the decoder with the prefix-LM mask.

        Args:
            labels: of a whole training batch; they change nothing here, the loss is that of `VLM`.
            kwargs: `output_hidden_states`, `output_attentions` and `return_dict`, as for any transformers model.

        The others, and what is refused: as for `VLM.forward`.
        """
        inputs.check_names(kwargs)
        if kwargs.get("output_attentions"):
            backends.check_weights(self.config.text_config._attn_implementation)
        pixels = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
        }
        inputs.check_sources(input_ids, inputs_embeds, encoded, pixels)
        cache = inputs.only_cache(cache, past_key_values)
        image_tokens = None
        if inputs_embeds is None:
            assert input_ids is not None
            if pixel_values is not None:
                encoded = self.encode(pixel_values, pixel_attention_mask, spatial_shapes)
            inputs_embeds, image_tokens = self.embed(input_ids, encoded)
        inputs.check_labels(labels, token_type_ids, inputs_embeds)
        if attention_mask is None:
            attention_mask = no_padding(inputs_embeds, cache)
        if position_ids is None and not isinstance(attention_mask, dict):
            # The end of the row: with a filled cache the attention mask covers the cached tokens too.
            position_ids = masks.position_ids(attention_mask, sequence_ids)[:, -inputs_embeds.shape[1] :]
        if isinstance(attention_mask, dict):
            layer_masks: Any = attention_mask
        else:
            layer_masks = decoder_masks(self.config, inputs_embeds, attention_mask, token_type_ids, sequence_ids, cache)
        if set(layer_masks) == {"full_attention"} and not getattr(self.config.text_config, "layer_types", None):
            layer_masks = layer_masks["full_attention"]
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=layer_masks,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        return VLMModelOutput(
            last_hidden_state=out.last_hidden_state,
            **{CACHE: out.get(CACHE)},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=image_tokens,
        )


class VLM(VLMPreTrainedModel, GenerationMixin):
    """A PaliGemma-style vision-language model: tower -> projector -> Gemma."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        if config.image_token_id is None:
            raise ConfigError(
                "VLMConfig.image_token_id is not set; take it from the processor: processor.image_token_id"
            )
        self.model = VLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # What the tower's checkpoint had beside it (a pooling head): no part of the model, kept for an export of the
        # tower (`vlm.checkpoints.tower`).
        self.tower_head: dict[str, Tensor] = {}
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
    def dtype(self) -> torch.dtype:
        """The decoder's; other parts may have their own."""
        floats = (p.dtype for p in self.model.language_model.parameters() if p.is_floating_point())
        return next(floats, super().dtype)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first parameter that is in memory (parts on disk are on none)."""
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

    # The names are spelled out because generate() checks its arguments against this signature.
    @dtypes.told
    @can_return_tuple
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
        logits_to_keep: int | Tensor | None = None,
        reduction: loss.Reduction = "token",
        encoded: EncoderOutput | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> VLMOutput:
        """Loss with labels, logits without. The tensors are those of `vlm.Batch`.

        Args:
            reduction: of the loss, `token` or `example` (see `vlm.model.loss`).
            encoded: tower features computed before, instead of `pixel_values`.
            cache: of the decoder; `past_key_values` is its name before transformers 5.24, and the same.
            inputs_embeds: float[B, S, D] instead of `input_ids`: image tokens are in their places, so no pixels.
            use_cache: as for any transformers decoder; with labels only where it is True.
            logits_to_keep: positions whose logits are wanted: the last n, 0 for all, or an index. None is all.
            num_items_in_batch: supervised tokens of all micro-batches of a step, and of all ranks; `loss` is then
                `loss_sum` divided by it (transformers' Trainer passes it). Of the `token` reduction only.
            skip_logits: leave the logits out, which labels allow. None leaves them out in training, that is in train
                mode or where gradients are recorded, unless `logits_to_keep` is given; evaluation gets loss and logits.
            kwargs: `output_hidden_states`, `output_attentions` and `return_dict`, as for any transformers model.

        Raises:
            DataError: placeholders and image tokens differ in number; labels without token_type_ids; no supervised
                token; an argument that nothing would read, alone or beside the others.
            ConfigError: settings of the loss that nothing would read, or that contradict each other;
                `output_attentions` on a backend that has no attention weights.
        """
        inputs.check_loss_settings(labels, reduction, num_items_in_batch, skip_logits, logits_to_keep)
        if skip_logits is None:
            skip_logits = labels is not None and logits_to_keep is None and (self.training or torch.is_grad_enabled())
        if labels is not None and use_cache is None:
            use_cache = False
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            labels=labels,
            sequence_ids=sequence_ids,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            encoded=encoded,
            return_dict=True,
            **kwargs,
        )
        hidden = out.last_hidden_state
        # In the order of the fields: an output is a dictionary, and its tuple has the order in which it was filled.
        losses: dict[str, Any] = {}
        if labels is not None:
            losses = self._losses(hidden, labels, sequence_ids, reduction, num_items_in_batch)
        wanted = None if skip_logits else self.logits(keep(hidden, 0 if logits_to_keep is None else logits_to_keep))
        rest = {name: value for name, value in out.items() if name != "last_hidden_state"}
        return VLMOutput(loss=losses.pop("loss", None), logits=wanted, **rest, **losses)

    def encode(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> EncoderOutput:
        """Run the vision tower on the pixels of a batch; see `VLMModel.encode`."""
        return self.model.encode(pixel_values, pixel_attention_mask, spatial_shapes)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states float[..., D] to logits float[..., V], with the decoder's final soft-cap unless
        `softcap_in_generation` is off."""
        softcap = final_softcap(self.config) if self.config.softcap_in_generation else None
        return loss.apply_softcap(self.lm_head(hidden), softcap)

    def _losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        sequence_ids: Tensor | None,
        reduction: loss.Reduction,
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """`loss`, `loss_sum` and `loss_weight` of `VLMOutput`."""
        rows = loss.supervised_rows(labels, sequence_ids, reduction)
        if rows.target.numel() == 0:
            raise DataError("no token of this batch is supervised: all labels are -100; give each sample a suffix")
        softcap = final_softcap(self.config) if self.config.softcap_in_loss else None
        total = loss.linear_cross_entropy(
            hidden[rows.batch, rows.position],
            self.lm_head,
            rows.target,
            rows.weight,
            vocabulary=self.config.text_config.vocab_size,
            softcap=softcap,
        )
        mean = total / (rows.total if num_items is None else num_items)
        return {"loss": mean, "loss_sum": total, "loss_weight": rows.total}

    def set_attn_implementation(self, attn_implementation: str | dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Switch the attention backend at run time.

        Args:
            attn_implementation: `sdpa` or `eager`, for all parts or, as a map, for `vision_config`, `text_config` and
                `""` (the model's own, which nothing runs on).

        Raises:
            ConfigError: a backend or part that there is not; sdpa for a decoder with an attention soft-cap (Gemma 2),
                which sdpa would drop. Nothing is changed then.
        """
        backends.check(self.config, attn_implementation)
        try:
            return super().set_attn_implementation(attn_implementation, *args, **kwargs)
        except (ValueError, ImportError) as error:  # a tower of one's own that has another list
            raise backends.unsupported(self.config, attn_implementation, str(error)) from error

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' own; what belongs to the pixels goes where they go, to the first step only."""
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if prepared.get("pixel_values") is None:
            prepared = {name: value for name, value in prepared.items() if name not in NAFLEX_INPUTS}
        return prepared

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
        DataError: a first input without token_type_ids; prefix tokens or packed samples after a filled cache; an
            attention mask that leaves the cached tokens out.
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
            if sequence_ids is not None:
                raise DataError(
                    "sequence_ids beside a filled cache: which packed sample the cached tokens belong to is not known"
                    " any more; generate for samples that are not packed"
                )
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
