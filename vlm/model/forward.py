"""`VLM`: a vision tower, a projector and a Gemma decoder behind one forward.

    VLM.forward
      VLMModel.forward
        encode                 pixels -> tower -> `EncoderOutput`
        project                features -> projector -> image tokens
        embed                  image tokens in the place of their placeholders (`merge`)
        _masks_and_positions   who sees whom (`layer_masks`, `masks`)
        language_model         embeddings -> hidden states
      _losses, logits          hidden states -> `loss` of the supervised rows, or the vocabulary

Parameter names are those of transformers' PaliGemma for the same parts (`model.vision_tower`,
`model.multi_modal_projector`, `model.language_model`, `lm_head`), so weights move between the two unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import can_return_tuple

from vlm.encoders.contract import EncoderOutput, check_output
from vlm.errors import ConfigError, DataError
from vlm.model import attention_backends, decoder, dtypes, inputs, loss, masks, merge, parts, projecting
from vlm.model.config import VLMConfig
from vlm.model.generating import Generating
from vlm.model.inputs import Inputs, Wanted
from vlm.model.layer_masks import decoder_masks, no_padding
from vlm.model.outputs import CACHE, VLMModelOutput, VLMOutput


class VLMPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the architecture."""

    config_class = VLMConfig
    config: VLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # Asked for in a configuration: transformers calls this when the model is built. The parts check their own.
        attention_backends.check_name(attn_implementation, self.config.text_config)
        adjusted: str = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        return adjusted

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Towers and decoders are transformers models and initialise themselves; only the projector is ours.
        if isinstance(module, VLMModel):
            projecting.init_weights(module.multi_modal_projector)


class VLMModel(VLMPreTrainedModel):
    """Tower, projector and decoder without the output embedding."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        encoder = parts.encoder_spec(config.encoder)
        self.vision_tower = encoder.encoder._from_config(config.vision_config)
        self.multi_modal_projector = projecting.build(
            config.projector_config, encoder.width(config.vision_config), config.text_config.hidden_size
        )
        attention_backends.check(config.text_config, {"text_config": config.text_config._attn_implementation})
        backends = decoder.facts(config.text_config).backends
        if "sdpa" not in backends:  # transformers' own choice where nothing is asked for
            config.text_config._attn_implementation = backends[0]
        self.language_model = decoder.build(config.text_config)
        blocks = parts.blocks(config.encoder, config.vision_config)
        self._no_split_modules = [*decoder.spec(config.text_config).blocks, *blocks]
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
            merge.refuse_placeholders(placeholders)
            return embeds, None
        return merge.merge(embeds, placeholders, *self.project(encoded))

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
            attention_backends.check_weights(self.config.text_config._attn_implementation)
        given = Inputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            labels=labels,
            sequence_ids=sequence_ids,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            cache=inputs.only_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            encoded=encoded,
        )
        inputs.check_sources(given)
        embeds, image_tokens = self._embedded(given)
        inputs.check_labels(given, embeds)
        layer_masks, positions = self._masks_and_positions(given, embeds)
        out = self.language_model(
            inputs_embeds=embeds,
            attention_mask=layer_masks,
            position_ids=positions,
            use_cache=given.use_cache,
            return_dict=True,
            **{CACHE: given.cache},
            **kwargs,
        )
        return VLMModelOutput(
            last_hidden_state=out.last_hidden_state,
            **{CACHE: out.get(CACHE)},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=image_tokens,
        )

    def _embedded(self, given: Inputs) -> tuple[Tensor, Tensor | None]:
        """What `embed` returns, whatever the batch brings: pixels, features or embeddings."""
        if given.inputs_embeds is not None:
            return given.inputs_embeds, None
        assert given.input_ids is not None
        pixels = given.pixels()
        return self.embed(given.input_ids, self.encode(**pixels) if pixels else given.encoded)

    def _masks_and_positions(self, given: Inputs, embeds: Tensor) -> tuple[Any, Tensor | None]:
        """The decoder's masks (by layer type, where it has several) and int64[B, S] positions."""
        mask, facts = given.attention_mask, decoder.facts(self.config.text_config)
        if isinstance(mask, dict):  # made before by `create_masks_for_generate`
            made, positions = mask, given.position_ids
        else:
            mask = no_padding(embeds, given.cache) if mask is None else mask
            positions = given.position_ids
            if positions is None:
                # The end of the row: with a filled cache the attention mask covers the cached tokens too.
                positions = masks.position_ids(mask, given.sequence_ids)[:, -embeds.shape[1] :]
            made = decoder_masks(facts, given, embeds, mask)
        return (made if facts.by_layer_type else next(iter(made.values()))), positions


class VLM(VLMPreTrainedModel, Generating, GenerationMixin):
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
        # Tied to the embedding: one tensor under two names, whose gradient is the sum of both uses.
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # What the tower's checkpoint had beside it (a pooling head): no part of the model, kept for an export of the
        # tower (`vlm.checkpoints.tower_head`).
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
        wanted = Wanted(
            reduction=reduction,
            num_items=num_items_in_batch,
            skip_logits=skip_logits,
            logits_to_keep=logits_to_keep,
        )
        inputs.check_wanted(wanted, labels)
        given = Inputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            labels=labels,
            sequence_ids=sequence_ids,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            cache=inputs.only_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            encoded=encoded,
        )
        out = self.model(**given.arguments(), return_dict=True, **kwargs)  # called: hooks of offloading sit on it
        hidden = out.last_hidden_state
        losses: dict[str, Any] = {} if labels is None else self._losses(hidden, labels, given, wanted)
        training = labels is not None and (self.training or torch.is_grad_enabled())
        logits = self.logits(wanted.keep(hidden)) if wanted.logits(training) else None
        # In the order of the fields: an output is a dictionary, and its tuple has the order in which it was filled.
        rest = {name: value for name, value in out.items() if name != "last_hidden_state"}
        return VLMOutput(loss=losses.pop("loss", None), logits=logits, **rest, **losses)

    def encode(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> EncoderOutput:
        """Run the vision tower on the pixels of a batch; see `VLMModel.encode`."""
        return self.model.encode(pixel_values, pixel_attention_mask, spatial_shapes)

    def image_token_counts(self, pixel_values: Tensor, spatial_shapes: Tensor | None = None, **_: Any) -> Tensor:
        """int64[M], the decoder tokens that each image will give."""
        if spatial_shapes is None:
            grid = parts.encoder_spec(self.config.encoder).grid(self.config.vision_config)
            spatial_shapes = torch.tensor([grid] * pixel_values.shape[0])
        num_tokens: Any = self.model.multi_modal_projector.num_tokens
        return torch.tensor([num_tokens((rows, columns)) for rows, columns in spatial_shapes.tolist()])

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states float[..., D] to logits float[..., V], with the decoder's final soft-cap unless
        `softcap_in_generation` is off."""
        softcap = decoder.facts(self.config.text_config).final_softcap if self.config.softcap_in_generation else None
        return loss.apply_softcap(self.lm_head(hidden), softcap)

    def _losses(self, hidden: Tensor, labels: Tensor, given: Inputs, wanted: Wanted) -> dict[str, Tensor]:
        """`loss`, `loss_sum` and `loss_weight` of `VLMOutput`."""
        rows = loss.supervised_rows(labels, given.sequence_ids, wanted.reduction)
        if rows.target.numel() == 0:
            raise DataError("no token of this batch is supervised: all labels are -100; give each sample a suffix")
        softcap = decoder.facts(self.config.text_config).final_softcap if self.config.softcap_in_loss else None
        total = loss.linear_cross_entropy(
            hidden[rows.batch, rows.position],
            self.lm_head,
            rows.target,
            rows.weight,
            vocabulary=self.config.text_config.vocab_size,
            softcap=softcap,
        )
        mean = total / (rows.total if wanted.num_items is None else wanted.num_items)
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
        attention_backends.check(self.config.text_config, attn_implementation)
        try:
            return super().set_attn_implementation(attn_implementation, *args, **kwargs)
        except (ValueError, ImportError) as error:  # a tower of one's own that has another list
            raise attention_backends.unsupported(self.config.text_config, attn_implementation, str(error)) from error
