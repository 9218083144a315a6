"""CLIP vision towers (ViT): OpenAI's, and others in transformers' CLIP format.

Paper: Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020). The blocks and
parameter names are transformers' `CLIPVisionModel`. The class token takes part in attention and is removed from the
features.

Departure: with `layer=-1` the final norm (`post_layernorm`) is applied to the patch tokens. CLIP itself applies it to
the class token alone, and transformers' `last_hidden_state` comes without it; a projector wants features of one scale.
`layer=-2` is LLaVA's choice, without any norm. Another image size resamples the position table as transformers'
`interpolate_pos_encoding` does: bicubic, half-pixel centres, no antialias; the class token's row stays.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers import CLIPVisionConfig as Config

from vlm.encoders._layers import final_norm, hidden_features, run_blocks, runs
from vlm.encoders._positions import resample_after
from vlm.encoders.contract import (
    EncoderOutput,
    Published,
    Spec,
    TextTower,
    check_square,
    square_grid,
    square_output,
    stated,
)
from vlm.images.transforms import ImageTransform

__all__ = ["SPEC"]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's training images."""


def resample(table: Tensor, config: Any) -> Tensor:
    """float[1 + n, E], the class token's row first, to the configuration's image size."""
    return resample_after(table, 1, square_grid(config)[0])


class Encoder(CLIPVisionModel):
    """CLIP patch features."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.post_layernorm = final_norm(config, self.post_layernorm)  # type: ignore[assignment]
        runs(self.embeddings, functools.partial(embed, self.embeddings))

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode images.

        Args:
            pixel_values: float[M, 3, H, W] with H = W = `config.image_size`.

        Raises:
            ConfigError: images of another size.
        """
        check_square(self.config, pixel_values, "clip")
        hidden = self.pre_layrnorm(self.embeddings(pixel_values.to(self.dtype)))
        features = run_blocks(self.config, self.encoder.layers, self.post_layernorm, hidden, attention_mask=None)
        return square_output(self.config, features[:, 1:])


def embed(embeddings: Any, pixel_values: Tensor) -> Tensor:
    """float[M, 3, H, W] -> float[M, 1 + P, E]. transformers asks the patch embedding for its weight, for the dtype,
    which a wrapped or quantised one may not have."""
    patches: Tensor = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    hidden = torch.cat([embeddings.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
    return hidden + embeddings.position_embedding(embeddings.position_ids)


def transform(config: Config, **settings: Any) -> ImageTransform:
    """CLIP's own: the shorter side resized, bicubic, the square in the middle kept, OpenAI's mean and deviation."""
    values = {
        "mode": "crop",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "resample": "bicubic",
        "mean": MEAN,
        "std": STD,
    }
    return ImageTransform(**{**values, **settings})


def published(config: Config, transform: ImageTransform, head: Mapping[str, tuple[int, ...]] | None) -> Published:
    """As transformers' `CLIPVisionModel`, or with its projection where the checkpoint had one; version 4 knows the
    names with their prefix only, 5 knows both."""
    projection = (head or {}).get("visual_projection.weight")
    kind: Any = CLIPVisionModel if projection is None else CLIPVisionModelWithProjection
    values = stated(config) if projection is None else stated(config, projection_dim=projection[0])

    def rename(name: str) -> str:
        return name if name.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{name}"

    def features(model: Any, **inputs: Tensor) -> Tensor:
        inner = getattr(model, "vision_model", model)
        return hidden_features(config, inner, inner.post_layernorm, 1, normed=False, **inputs)

    return Published(
        architecture=kind.__name__,
        config=values,
        rename=rename,
        build=lambda: kind(Config(**values)),
        features=features,
    )


def tiny() -> Config:
    """A tower of 28x28 px, patch 14, 4 patches."""
    return Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )


SPEC = Spec(
    title="CLIP",
    config=Config,
    encoder=Encoder,
    transform=transform,
    model_types=("clip", "clip_vision_model"),
    prefixes=("vision_model.", ""),
    left_out=r"(text_model\.|text_projection\.|visual_projection\.|logit_scale|embeddings\.position_ids)",
    extra_tokens=lambda config: 1,
    blocks=("CLIPEncoderLayer",),
    block_names=("encoder.layers.",),
    norm_names=("post_layernorm.",),
    positions=("embeddings.position_embedding.weight",),
    resample=resample,
    text_tower=TextTower(
        config=CLIPConfig,
        model=CLIPModel,
        model_type="clip",
        family="clip",
        objective="softmax",
        width=lambda config: int(config.projection_dim),
    ),
    published=published,
    tiny=tiny,
)
