"""`DualTower`: an image tower and a text tower, to embeddings, logits, probabilities and the loss.

Papers: SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786). Reference code: big_vision
`models/proj/image_text/two_towers.py`. The modules and parameter names are transformers' `SiglipModel` (SigLIP v1 and
the FixRes checkpoints of SigLIP 2) and `Siglip2Model` (NaFlex), with two departures: the NaFlex position grid is
resized as in `vlm.encoders.siglip2_naflex`, and no attention mask is ever given to the text tower, which was trained
without one.

What a family does differently is in its entry: the `TextTower` of its encoder's file and its `Objective` here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from vlm.errors import ConfigError
from vlm.model.loss import sigmoid_contrastive, softmax_contrastive
from vlm.model.parts import text_towers


@dataclass(frozen=True)
class Objective:
    """What a family was trained with, and so how its logits are read.

    Attributes:
        probabilities: float[B, C] of logits, image x text -> float[B, C].
        loss: float[B, B] of logits -> float32[].
        biased: a bias is added to the scaled cosine.
    """

    probabilities: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor], Tensor]
    biased: bool


OBJECTIVES = {
    "sigmoid": Objective(torch.sigmoid, sigmoid_contrastive, biased=True),
    "softmax": Objective(lambda logits: logits.softmax(dim=-1), softmax_contrastive, biased=False),
}
FAMILY = "vlm_family"
"""In a configuration: the family whose text rule the checkpoint follows, where its model class does not say."""


class TwoTowerOutput(NamedTuple):
    """What a forward returns.

    Attributes:
        image: float32[B, D], image embeddings of length 1.
        text: float32[C, D], text embeddings of length 1.
        logits: float32[B, C], their cosine times the scale, plus the bias.
        loss: float32[] when B = C (image i belongs to text i), else None.
    """

    image: Tensor
    text: Tensor
    logits: Tensor
    loss: Tensor | None


class DualTower(nn.Module):
    """An image tower and a text tower with one space of embeddings.

    Attributes:
        kind: of its image tower, as `vlm.encoders` names it: `siglip`, `siglip2_naflex`.
        family: whose text rule it follows, a key of `vlm.siglip.rules.RULES`.
        trained_with: `sigmoid` or `softmax`.
        objective: what that means for logits, and whether there is a bias.
        model: transformers' model, with its parameter names.
        embedding_size: D.
    """

    def __init__(self, config: Any, family: str | None = None) -> None:
        """
        Args:
            config: transformers' configuration of both towers.
            family: None: what the configuration says, or else that of its class.

        Raises:
            ConfigError: a configuration of no known class.
        """
        super().__init__()
        found = [(kind, tower) for kind, tower in text_towers().items() if type(config) is tower.config]
        if not found:
            known = ", ".join(tower.config.__name__ for tower in text_towers().values())
            raise ConfigError(f"a {type(config).__name__} is of no model with two towers; known: {known}")
        self.kind, towers = found[0]
        self.config = config
        self.family: str = family or config.to_dict().get(FAMILY) or towers.family
        self.trained_with: str = towers.objective
        self.objective = OBJECTIVES[towers.objective]
        self.embedding_size = towers.width(config)
        self.model: Any = towers.model(config)
        towers.adapt(self.model)

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its matrices; scale and bias may be more precise."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.ndim > 1)

    @property
    def context(self) -> int:
        """Positions of the text tower: the rows of its position table."""
        return int(self.model.text_model.embeddings.position_embedding.weight.shape[0])

    @property
    def attention(self) -> str:
        """The attention backend, in a word."""
        return str(self.config.text_config._attn_implementation)

    @property
    def scale(self) -> Tensor:
        """float32[], what a cosine is multiplied by."""
        scale: Tensor = self.model.logit_scale.float().exp().reshape(())
        return scale

    @property
    def bias(self) -> Tensor | None:
        """float32[], what is added then; None in a family without."""
        return self.model.logit_bias.float().reshape(()) if self.objective.biased else None

    def encode_image(self, pixel_values: Tensor, *, normalize: bool = True, **naflex: Tensor) -> Tensor:
        """Image embeddings, float32[B, D].

        Args:
            pixel_values: float[B, 3, H, W], or float[B, N, P*P*3] for NaFlex with `pixel_attention_mask` int[B, N] and
                `spatial_shapes` int64[B, 2].
            normalize: to length 1; False: as the pooling gives them.
        """
        return _embedding(self.image_features(pixel_values.to(self.dtype), **naflex), normalize)

    def encode_text(self, input_ids: Tensor, *, normalize: bool = True) -> Tensor:
        """Text embeddings, float32[C, D]. There is no mask to give: these towers were trained without.

        Args:
            input_ids: int64[C, L], padded to the whole context as `DualProcessor.texts` does.
            normalize: to length 1; False: as the tower gives them.

        Raises:
            ConfigError: L is not the context.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] != self.context:
            raise ConfigError(
                f"input_ids have shape {list(input_ids.shape)}, expected [texts, {self.context}]: a text is always"
                " padded to the whole context, and another length gives other embeddings; use DualProcessor.texts"
            )
        return _embedding(self.text_features(input_ids), normalize)

    def image_features(self, pixel_values: Tensor, **naflex: Tensor) -> Tensor:
        """float[B, D] in the model's dtype, as the library's model gives them."""
        features: Tensor = self.model.get_image_features(pixel_values=pixel_values, **naflex).pooler_output
        return features

    def text_features(self, input_ids: Tensor) -> Tensor:
        """float[C, D] in the model's dtype, as the library's model gives them."""
        features: Tensor = self.model.get_text_features(input_ids=input_ids).pooler_output
        return features

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """float[B, D], float[C, D] -> float32[B, C]: the cosine, scaled, and shifted where the family has a bias."""
        scaled = _embedding(image, True) @ _embedding(text, True).T * self.scale
        return scaled if self.bias is None else scaled + self.bias

    def probabilities(self, logits: Tensor) -> Tensor:
        """float[B, C] -> float[B, C]: each pair's own (sigmoid), or, for CLIP, of one text among the C (softmax)."""
        return self.objective.probabilities(logits)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """float[B, D], float[B, D] -> float32[]; image i belongs to text i.

        Raises:
            ConfigError: not one text per image.
        """
        return self.objective.loss(self.logits(image, text))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, **naflex: Any) -> TwoTowerOutput:
        """Embeddings, logits and, for as many images as texts, the loss."""
        image, text = self.encode_image(pixel_values, **naflex), self.encode_text(input_ids)
        logits = self.logits(image, text)
        loss = self.objective.loss(logits) if logits.shape[0] == logits.shape[1] else None
        return TwoTowerOutput(image, text, logits, loss)


def _embedding(features: Tensor, normalize: bool) -> Tensor:
    """In float32: a unit vector rounded to 16 bits is not of length 1."""
    return unit(features.float(), dim=-1) if normalize else features.float()
