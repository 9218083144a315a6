"""DINOv3 ViT towers: rotary positions and register tokens.

Paper: DINOv3 (arXiv 2508.10104). The blocks and parameter names are transformers' `DINOv3ViTModel`. Class and register
tokens take part in attention and are removed from the features.

Departures: the mask token of pre-training is left out, and so are the random shifts, jitters and scales of positions
while training: a VLM learns from the same positions that it is used with. Features are the final norm of the last block
(`layer=-1`), or the outputs of other blocks without a norm. There is no position table: positions are angles of patch
centres between -1 and 1, so another image size needs no resampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig as Config
from transformers import DINOv3ViTModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTLayer,
    DINOv3ViTPreTrainedModel,
    DINOv3ViTRopePositionEmbedding,
)

from vlm.encoders._layers import final_norm, hidden_features, run_blocks
from vlm.encoders.contract import EncoderOutput, Published, Spec, check_square, square_output, stated
from vlm.images.transforms import ImageTransform

__all__ = ["SPEC"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet."""
# Derived from the number of layers, and of backbones for detection only.
BACKBONE = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")


def extra_tokens(config: Any) -> int:
    """The class token and the registers, which stand before the patches."""
    return 1 + int(config.num_register_tokens)


def read_config(values: dict[str, Any]) -> Config:
    """A checkpoint's settings with the positions' random changes off."""
    kept = {key: value for key, value in values.items() if key not in BACKBONE}
    return Config(**{**kept, "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None})


class Embeddings(nn.Module):
    """Patches behind the class token and the registers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, side = config.hidden_size, int(config.patch_size)  # type: ignore[arg-type]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, width))
        self.patch_embeddings = nn.Conv2d(config.num_channels, width, kernel_size=side, stride=side)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[M, 3, H, W] -> float[M, 1 + R + P, E]."""
        patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        extra = [tokens.expand(len(patches), -1, -1) for tokens in (self.cls_token, self.register_tokens)]
        return torch.cat([*extra, patches], dim=1)


class Encoder(DINOv3ViTPreTrainedModel):
    """DINOv3 patch features."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.rope_embeddings = DINOv3ViTRopePositionEmbedding(config)
        blocks = [DINOv3ViTLayer(config) for _ in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.norm = final_norm(config, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Embeddings):
            for tokens in (module.cls_token, module.register_tokens):
                nn.init.trunc_normal_(tokens, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode images.

        Args:
            pixel_values: float[M, 3, H, W] with H = W = `config.image_size`.

        Raises:
            ConfigError: images of another size.
        """
        check_square(self.config, pixel_values, "dinov3")
        pixel_values = pixel_values.to(self.dtype)
        positions = self.rope_embeddings(pixel_values)
        features = run_blocks(
            self.config,
            self.model["layer"],
            self.norm,
            self.embeddings(pixel_values),
            position_embeddings=positions,
        )
        return square_output(self.config, features[:, extra_tokens(self.config) :])


def transform(config: Config, **settings: Any) -> ImageTransform:
    """DINOv3's own: resized to the square without keeping the aspect ratio, bilinear with antialias, mean and deviation
    of ImageNet."""
    values = {
        "mode": "squash",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "resample": "bilinear",
        "mean": MEAN,
        "std": STD,
    }
    return ImageTransform(**{**values, **settings})


def published(config: Config, transform: ImageTransform, head: Mapping[str, tuple[int, ...]] | None) -> Published:
    """As transformers' `DINOv3ViTModel`, under the names of the published checkpoints."""
    values = {key: value for key, value in stated(config).items() if key not in BACKBONE}
    return Published(
        architecture="DINOv3ViTModel",
        config=values,
        rename=lambda name: name.removeprefix("model."),
        build=lambda: DINOv3ViTModel(Config(**values)),
        features=lambda model, **inputs: hidden_features(config, model, model.norm, extra_tokens(config), **inputs),
    )


def tiny() -> Config:
    """A tower of 28x28 px, patch 14, 4 patches, two registers."""
    return read_config(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "num_register_tokens": 2,
        }
    )


SPEC = Spec(
    title="DINOv3",
    config=Config,
    encoder=Encoder,
    transform=transform,
    model_types=("dinov3_vit",),
    prefixes=("",),
    left_out=r"(embeddings\.mask_token|rope_embeddings\.)",
    extra_tokens=extra_tokens,
    blocks=("DINOv3ViTLayer",),
    block_names=("model.layer.",),
    norm_names=("norm.",),
    read=read_config,
    renames=((r"^layer\.", "model.layer."),),
    published=published,
    tiny=tiny,
)
