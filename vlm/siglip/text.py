"""SigLIP and SigLIP 2 with both towers: images and texts to embeddings, logits and the sigmoid loss.

Papers: SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786). Reference code: big_vision
`models/proj/image_text/two_towers.py`. The modules and parameter names are transformers' `SiglipModel` (SigLIP v1 and
the FixRes checkpoints of SigLIP 2) and `Siglip2Model` (NaFlex), with two departures: the NaFlex position grid is
resized as in `vlm.encoders.siglip2_naflex`, and no attention mask is ever given to the text tower, which was trained
without one.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints import big_vision
from vlm.checkpoints.big_vision_configs import text_config, vision_config
from vlm.checkpoints.big_vision_names import rules
from vlm.checkpoints.configs import check_numbers, guarded
from vlm.checkpoints.files import Weights, locate, read_json
from vlm.checkpoints.loader import BUFFERS, Source, check_fit, expected_shapes, finite, put
from vlm.encoders.siglip2_naflex import Embeddings
from vlm.errors import CheckpointError
from vlm.model.loss import sigmoid_contrastive

_PUNCTUATION = str.maketrans({"_": " "} | {mark: None for mark in string.punctuation if mark != "_"})


def canonicalize(text: str) -> str:
    """A name or a template as SigLIP's zero-shot evaluation gives it to the text tower: "Golden_Retriever." -> "golden
    retriever".

    An underscore is a blank, other ASCII punctuation is dropped, letters are lower-cased, blanks run together. Source:
    big_vision `evaluators/proj/image_text/prompt_engineering.py`. (SigLIP v1's tokenizer drops underscores too.)
    """
    return " ".join(text.translate(_PUNCTUATION).lower().split())


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
        self.model: Any
        if isinstance(config, Siglip2Config):
            self.kind = "siglip2_naflex"
            self.model = Siglip2Model(config)
            vision: Any = config.vision_config
            self.model.vision_model.embeddings = Embeddings(vision)
        else:
            self.kind = "siglip"
            self.model = SiglipModel(config)

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


def load(path: str | Path, *, allow_nonfinite: bool = False, revision: str | None = None) -> SigLIP:
    """Open a SigLIP or SigLIP 2 checkpoint with both towers: a Hugging Face directory or hub id, or a big_vision
    `.npz`.

    Raises:
        CheckpointError: files or tensors that are missing, unexpected, mis-shaped or not finite.
    """
    if Path(path).suffix == ".npz":
        with big_vision.open_npz(path) as arrays:
            return from_big_vision(arrays, origin=str(path), allow_nonfinite=allow_nonfinite)
    folder = locate(path, revision=revision)
    config = _config(read_json(folder / "config.json"), str(folder / "config.json"))
    weights = Weights(folder)
    kept = {name: info for name, info in weights.tensors.items() if not BUFFERS.fullmatch(name)}
    source = Source(
        str(path),
        {name: info.shape for name, info in kept.items()},
        {name: info.dtype for name, info in kept.items()},
        weights.read,
    )
    return _fill(config, source, allow_nonfinite)


def _config(values: Mapping[str, Any], where: str) -> PreTrainedConfig:
    classes: dict[str, Any] = {"siglip": SiglipConfig, "siglip2": Siglip2Config}
    kind = values.get("model_type")
    if kind not in classes:
        raise CheckpointError(f"{where}: model_type is {kind!r}, expected 'siglip' or 'siglip2' (both towers)")
    for key in ("text_config", "vision_config"):
        check_numbers(values.get(key, {}), f"{where}: {key}")
    config: PreTrainedConfig = guarded(lambda: classes[kind].from_dict(dict(values)), where)
    return config


def from_big_vision(
    arrays: Mapping[str, np.ndarray], *, origin: str = "big_vision parameters", allow_nonfinite: bool = False
) -> SigLIP:
    """Both towers from big_vision's arrays (names without `params/`). A text tower without a head (the i18n
    checkpoint) gets the identity, which is the same function.

    Raises:
        CheckpointError: arrays that are missing, unexpected, mis-shaped or not finite.
    """
    shapes, dtypes = big_vision.headers(arrays, origin)
    vision, text = vision_config(shapes, origin=origin), text_config(shapes, origin)
    kind: Any = SiglipConfig if "siglip_vision_model" == vision.model_type else Siglip2Config
    if kind is Siglip2Config:
        text = kind.sub_configs["text_config"](**{k: v for k, v in text.to_dict().items() if k in TEXT_KEYS})
    config = kind(vision_config=vision.to_dict(), text_config=text.to_dict())
    source = big_vision.array_source(arrays, shapes, dtypes, rules(shapes, two_towers=True, origin=origin), origin)
    return _fill(config, _with_text_head(source, text.hidden_size), allow_nonfinite)


TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "projection_size",
    "bos_token_id",
    "eos_token_id",
)


def _with_text_head(source: Source, width: int) -> Source:
    weight, bias = "text_model.head.weight", "text_model.head.bias"
    if weight in source.shapes:
        return source
    made = {weight: torch.eye(width), bias: torch.zeros(width)}
    return Source(
        source.origin,
        {**source.shapes, weight: (width, width), bias: (width,)},
        {**source.dtypes, weight: "F32", bias: "F32"},
        lambda name: made[name] if name in made else source.read(name),
    )


def _fill(config: Any, source: Source, allow_nonfinite: bool) -> SigLIP:
    with init_empty_weights(include_buffers=False):
        model = SigLIP(config)
    check_fit(source, expected_shapes(model.model))
    for name in source.shapes:
        put(model.model, name, finite(source.read(name), name, source.origin, allow_nonfinite).float())
    return model.eval()
