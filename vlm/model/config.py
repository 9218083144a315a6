"""`VLMConfig`: what a vision-language model is made of.

The configuration names an encoder kind and a projector kind. A kind is looked up among the files of `vlm/encoders` and
`vlm/projectors` by its exact name, never imported from a path, so a downloaded configuration cannot choose code to run.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from vlm.errors import ConfigError
from vlm.model import decoder, projecting
from vlm.registry import part


class VLMConfig(PreTrainedConfig):
    """Configuration of a `vlm.VLM`.

    Attributes:
        encoder: kind of the vision tower (a file of `vlm/encoders`), such as `siglip` or `siglip2_naflex`.
        vision_config: the tower's own transformers configuration.
        projector_config: `{"kind": ..., ...}`, the projector (a file of `vlm/projectors`) and its settings.
        text_config: a Gemma, Gemma 2 or Gemma 3 text configuration.
        image_token_id: id of the `<image>` placeholder. No default: a wrong one is silent.
        softcap_in_loss: apply the decoder's `final_logit_softcapping` to the training loss too. Off by default, as in
            Google's transfer recipe (big_vision trains without: `compute_logits` bypasses the cap).
        softcap_in_generation: apply it to the logits of a forward without labels. On by default, as in transformers.
            Greedy tokens do not depend on it; probabilities, beams and samples do. Off is right for a model whose
            transfer recipe switched the cap off (`final_logits_softcap=0`), as Google's recipes do.
    """

    model_type = "vlm"
    sub_configs = {"text_config": PreTrainedConfig, "vision_config": PreTrainedConfig}
    # What transformers' Trainer does not gather as predictions.
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_hidden_states", "loss_sum", "loss_weight"]

    encoder: str = "siglip"
    vision_config: Any = None
    projector_config: Any = None
    text_config: Any = None
    image_token_id: int | None = None
    softcap_in_loss: bool = False
    softcap_in_generation: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers builds every configuration class once without arguments (to diff against defaults).
        self.text_config = decoder.read_config(self.text_config or {"model_type": "gemma"})
        vision_class = part("vlm.encoders", self.encoder).SPEC.config
        if not isinstance(self.vision_config, PreTrainedConfig):
            values = dict(self.vision_config or {})
            stated = values.pop("model_type", vision_class.model_type)
            if stated != vision_class.model_type:
                raise ConfigError(
                    f"vision_config.model_type is {stated!r}, but encoder {self.encoder!r} has"
                    f" {vision_class.model_type!r}; one of the two is wrong"
                )
            self.vision_config = vision_class(**values)
        self.projector_config = dict(self.projector_config or {"kind": "linear"})
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        projecting.named(str(self.projector_config.get("kind")))
        vocab = self.text_config.vocab_size
        if self.image_token_id is not None and not 0 <= self.image_token_id < vocab:
            raise ConfigError(
                f"image_token_id {self.image_token_id} is outside the decoder's vocabulary of {vocab}; set it to the"
                f" id of <image> in the tokenizer"
            )
