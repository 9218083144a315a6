"""DINOv2 towers, with or without register tokens.

Papers: DINOv2 (arXiv 2304.07193), Vision Transformers Need Registers (arXiv 2309.16588). The blocks and parameter names
are transformers' `Dinov2Model` and `Dinov2WithRegistersModel`, which differ in the registers alone: a plain DINOv2 is
one with `num_register_tokens` 0. Class and register tokens take part in attention and are removed from the features.

Departures: the mask token of pre-training is left out. Features are the final norm of the last block (`layer=-1`), or
the outputs of other blocks without a norm. Another image size resamples the position table once, when the model is
built, as the two transformers classes do for each image: bicubic, half-pixel centres, with antialias for the towers
with registers and without for the others; the class token's row stays.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Model, Dinov2PreTrainedModel, Dinov2WithRegistersModel
from transformers import Dinov2WithRegistersConfig as Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer, Dinov2PatchEmbeddings

from vlm.encoders._layers import final_norm, hidden_features, run_blocks, runs
from vlm.encoders._positions import resample_after
from vlm.encoders.contract import (
    EncoderOutput,
    Published,
    Spec,
    check_square,
    square_grid,
    square_output,
    square_tokens,
    stated,
)
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform

__all__ = ["SPEC"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet."""
# Derived from the number of layers, and of backbones for detection only.
BACKBONE = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices", "use_mask_token")


def extra_tokens(config: Any) -> int:
    """The class token and the registers, which stand before the patches."""
    return 1 + int(config.num_register_tokens)


def read_config(values: dict[str, Any]) -> Config:
    """Settings of either class; without registers they are 0.

    Raises:
        ConfigError: a SwiGLU tower (`dinov2-giant`), whose weights are stored in another form.
    """
    if values.get("use_swiglu_ffn"):
        raise ConfigError("use_swiglu_ffn is true: DINOv2 giant cannot be read; take small, base or large")
    kept = {key: value for key, value in values.items() if key not in BACKBONE}
    return Config(**{"num_register_tokens": 0, **kept})


def resample(table: Tensor, config: Any) -> Tensor:
    """float[1, 1 + n, E], the class token's row first, to the configuration's image size."""
    return resample_after(table[0], 1, square_grid(config)[0], smooth=config.num_register_tokens > 0)[None]


def embed(patch_embeddings: Any, pixel_values: Tensor) -> Tensor:
    """float[M, 3, H, W] -> float[M, P, E]. transformers asks the projection for its weight, for the dtype, which a
    wrapped or quantised one may not have."""
    patches: Tensor = patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
    return patches


class Embeddings(nn.Module):
    """Patches with positions, behind the class token and the registers (which have none)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, patches = config.hidden_size, square_tokens(config, int(config.image_size))  # type: ignore[arg-type]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embeddings = Dinov2PatchEmbeddings(config)  # type: ignore[arg-type]
        runs(self.patch_embeddings, functools.partial(embed, self.patch_embeddings))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + patches, width))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, width))
        else:
            self.register_parameter("register_tokens", None)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[M, 3, H, W] -> float[M, 1 + R + P, E]."""
        patches = self.patch_embeddings(pixel_values)
        hidden = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.position_embeddings
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(len(patches), -1, -1)
            hidden = torch.cat([hidden[:, :1], registers, hidden[:, 1:]], dim=1)
        return self.dropout(hidden)


class Encoder(Dinov2PreTrainedModel):
    """DINOv2 patch features."""

    config_class = Config
    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        blocks = [Dinov2Layer(config) for _ in range(config.num_hidden_layers)]  # type: ignore[arg-type]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.layernorm = final_norm(config, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Embeddings):
            for tokens in (module.cls_token, module.position_embeddings):
                nn.init.trunc_normal_(tokens, std=self.config.initializer_range)
            if module.register_tokens is not None:
                nn.init.zeros_(module.register_tokens)

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode images.

        Args:
            pixel_values: float[M, 3, H, W] with H = W = `config.image_size`.

        Raises:
            ConfigError: images of another size.
        """
        check_square(self.config, pixel_values, "dinov2")
        hidden = self.embeddings(pixel_values.to(self.dtype))
        features = run_blocks(self.config, self.encoder["layer"], self.layernorm, hidden)  # type: ignore[arg-type]
        return square_output(self.config, features[:, extra_tokens(self.config) :])


def transform(config: Config, **settings: Any) -> ImageTransform:
    """DINOv2's own: the shorter side resized to 256/224 of the square, bicubic, the square in the middle kept, mean and
    deviation of ImageNet."""
    values: dict[str, Any] = {
        "mode": "crop",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "resample": "bicubic",
        "mean": MEAN,
        "std": STD,
    }
    values |= settings
    if values["mode"] == "crop":
        values.setdefault("resize_shortest", round(int(config.image_size) * 256 / 224))  # type: ignore[arg-type]
    return ImageTransform(**values)


def published(config: Config, transform: ImageTransform, head: Mapping[str, tuple[int, ...]] | None) -> Published:
    """As transformers' `Dinov2Model` or `Dinov2WithRegistersModel`, under the names of the published checkpoints."""
    registers, prefix = int(config.num_register_tokens), extra_tokens(config)
    kind: Any = Dinov2WithRegistersModel if registers else Dinov2Model
    # A tower for detection names its stages there, which belong to a number of layers.
    values = {key: value for key, value in stated(config).items() if key not in BACKBONE}
    values["model_type"] = kind.config_class.model_type
    if not registers:
        del values["num_register_tokens"]

    def rename(name: str) -> str:
        for spelled, published in WRITTEN.items():
            name = name.replace(spelled, published)
        return name

    return Published(
        architecture=kind.__name__,
        config=values,
        rename=rename,
        build=lambda: kind(kind.config_class(**{k: v for k, v in values.items() if k != "model_type"})),
        features=lambda model, **inputs: hidden_features(config, model, model.layernorm, prefix, **inputs),
    )


WRITTEN = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}
"""transformers' names in memory (from 5.2x on) and in files."""


def tiny() -> Config:
    """A tower of 28x28 px, patch 14, 4 patches, two registers."""
    return Config(
        hidden_size=32,
        mlp_ratio=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        num_register_tokens=2,
    )


SPEC = Spec(
    title="DINOv2",
    config=Config,
    encoder=Encoder,
    transform=transform,
    model_types=("dinov2", "dinov2_with_registers"),
    prefixes=("dinov2.", "dinov2_with_registers.", ""),
    left_out=r"(embeddings\.mask_token|classifier\.)",
    extra_tokens=extra_tokens,
    blocks=("Dinov2Layer",),
    block_names=("encoder.layer.",),
    norm_names=("layernorm.",),
    read=read_config,
    renames=(
        (r"attention\.attention\.query\.", "attention.q_proj."),
        (r"attention\.attention\.key\.", "attention.k_proj."),
        (r"attention\.attention\.value\.", "attention.v_proj."),
        (r"attention\.output\.dense\.", "attention.o_proj."),
    ),
    positions=("embeddings.position_embeddings",),
    resample=resample,
    published=published,
    tiny=tiny,
)
