"""`SigLIP`: an image tower and a text tower, to embeddings, logits and the sigmoid loss.

Papers: SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786). Reference code: big_vision
`models/proj/image_text/two_towers.py`. The modules and parameter names are transformers' `SiglipModel` (SigLIP v1 and
the FixRes checkpoints of SigLIP 2) and `Siglip2Model` (NaFlex), with two departures: the NaFlex position grid is
resized as in `vlm.encoders.siglip2_naflex`, and no attention mask is ever given to the text tower, which was trained
without one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from vlm.model.loss import sigmoid_contrastive
from vlm.model.parts import text_towers


class TwoTowerOutput(NamedTuple):
    """What a forward returns.

    Attributes:
        image: float[B, D], pooled image embeddings before normalisation.
        text: float[C, D], text embeddings before normalisation.
        logits: float[B, C], cosine similarity times exp(logit_scale) plus logit_bias.
        loss: float32[], the sigmoid loss when B = C (image i belongs to text i), else None.
    """

    image: Tensor
    text: Tensor
    logits: Tensor
    loss: Tensor | None


class SigLIP(nn.Module):
    """An image tower and a text tower; `kind` is `siglip` or `siglip2_naflex`.

    Parameter names are those of the transformers model that it holds as `model`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.kind, towers = next((kind, tower) for kind, tower in text_towers().items() if type(config) is tower.config)
        self.model: Any = towers.model(config)
        towers.adapt(self.model)

    def encode_image(self, pixel_values: Tensor, **naflex: Tensor) -> Tensor:
        """Pooled image embeddings, float[B, D], not normalised.

        Args:
            pixel_values: float[B, 3, H, W], or float[B, N, P*P*3] for NaFlex with `pixel_attention_mask` int[B, N] and
                `spatial_shapes` int64[B, 2].
        """
        features: Tensor = self.model.get_image_features(pixel_values=pixel_values, **naflex).pooler_output
        return features

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Text embeddings, float[C, D], not normalised: the last position of a tower without a mask.

        Args:
            input_ids: int64[C, L], padded on the right to the length the tower was trained with.
        """
        features: Tensor = self.model.get_text_features(input_ids=input_ids).pooler_output
        return features

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """float[B, D], float[C, D] -> float[B, C], normalised, scaled and shifted."""
        image, text = nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)
        return image @ text.T * self.model.logit_scale.exp() + self.model.logit_bias

    def forward(self, pixel_values: Tensor, input_ids: Tensor, **naflex: Tensor) -> TwoTowerOutput:
        """Embeddings, logits and, for as many images as texts, the sigmoid loss."""
        image, text = self.encode_image(pixel_values, **naflex), self.encode_text(input_ids)
        logits = self.logits(image, text)
        loss = sigmoid_contrastive(logits) if logits.shape[0] == logits.shape[1] else None
        return TwoTowerOutput(image, text, logits, loss)
