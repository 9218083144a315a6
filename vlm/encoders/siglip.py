"""SigLIP towers at a fixed resolution: SigLIP v1, and the FixRes checkpoints of SigLIP 2 (same architecture).

Papers: SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786). Reference code: big_vision `models/vit.py` with
`pool_type none`. The blocks and parameter names are transformers' `SiglipVisionModel`. Departures: none; the attention
pooling head, unused by a VLM, is dropped when
`vision_use_head` is False.

Features are `post_layernorm` of the last block (`layer=-1`), or the outputs of other blocks without a norm. Another
image size resamples the position table as big_vision does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel
from transformers import SiglipVisionConfig as Config

from vlm.encoders._layers import final_norm, hidden_features, run_blocks, runs
from vlm.encoders._positions import resample_square, resize_position_grid
from vlm.encoders.contract import (
    EncoderOutput,
    Published,
    Spec,
    TextTower,
    check_square,
    square_grid,
    square_output,
    square_tokens,
    stated,
)
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform

__all__ = ["SPEC"]


def resample_position_table(table: Tensor, positions: int) -> Tensor:
    """Learned position embeddings for another image size, as big_vision resizes them when it loads a checkpoint.

    Bilinear, corner to corner (`scipy.ndimage.zoom` of order 1), in float32. Not what transformers'
    `interpolate_pos_encoding` does (bicubic, half-pixel centres), and not the resize of a NaFlex tower.

    Args:
        table: float[n, E], a square grid in row order.
        positions: patches wanted, a square number too.

    Returns:
        float[positions, E] in the dtype of `table`; the table itself when the number does not change.

    Raises:
        ConfigError: a number of positions that is no square.
    """
    old, new = math.isqrt(table.shape[0]), math.isqrt(max(positions, 0))
    for count, side in ((table.shape[0], old), (positions, new)):
        if side < 1 or side * side != count:
            raise ConfigError(
                f"position embeddings can be resampled between square grids only, got {table.shape[0]} ->"
                f" {positions}: {count} is no square number; choose an image size for a square grid of patches"
            )
    return resample_square(table.detach(), new, "bilinear", align_corners=True)


def resample(table: Tensor, config: Any) -> Tensor:
    """The position table at the configuration's image size (`resample_position_table`)."""
    return resample_position_table(table, square_tokens(config, int(config.image_size)))


class Encoder(SiglipVisionModel):
    """SigLIP patch features."""

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
        check_square(self.config, pixel_values, "siglip")
        hidden = self.embeddings(pixel_values.to(self.dtype))
        features = run_blocks(self.config, self.encoder.layers, self.post_layernorm, hidden, attention_mask=None)
        return square_output(self.config, features)


def embed(embeddings: Any, pixel_values: Tensor) -> Tensor:
    """float[M, 3, H, W] -> float[M, P, E]. transformers asks the patch embedding for its weight, for the dtype, which a
    wrapped or quantised one may not have."""
    patches: Tensor = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    return patches + embeddings.position_embedding(embeddings.position_ids)


def transform(config: Config, **settings: Any) -> ImageTransform:
    """Square resize without keeping the aspect ratio, values in [-1, 1], bilinear with antialias as in big_vision.

    Checkpoints on the Hub record their own filter (v1 bicubic, SigLIP 2 bilinear), which then replaces this default.
    """
    values = {
        "mode": "squash",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "resample": "bilinear",
    }
    return ImageTransform(**{**values, **settings})


def adopt(values: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """A NaFlex tower's settings in squares: of the size whose patches are the position table's, or of another."""
    own = math.isqrt(values["num_patches"]) * values["patch_size"]
    kept = {key: value for key, value in values.items() if key != "num_patches"}
    return {**kept, "image_size": own if image_size is None else image_size}


def adopt_positions(table: Tensor, config: Any) -> Tensor:
    """The positions that a NaFlex tower gives a square image, as a table: float[n, E] -> float[rows * rows, E]."""
    side, (rows, columns) = math.isqrt(table.shape[0]), square_grid(config)
    return resize_position_grid(table.reshape(side, side, -1), rows, columns)


def published(config: Config, transform: ImageTransform, head: Mapping[str, tuple[int, ...]] | None) -> Published:
    """As transformers' `SiglipVisionModel`; version 4 knows the names with their prefix only, 5 knows both."""
    values = stated(config, vision_use_head=head is not None)
    return Published(
        architecture="SiglipVisionModel",
        config=values,
        rename="vision_model.{}".format,
        build=lambda: SiglipVisionModel(Config(**values)),
        features=lambda model, **inputs: hidden_features(config, model, model.post_layernorm, **inputs),
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
        vision_use_head=False,
    )


SPEC = Spec(
    title="SigLIP",
    config=Config,
    encoder=Encoder,
    transform=transform,
    model_types=("siglip", "siglip_vision_model"),
    prefixes=("vision_tower.vision_model.", "vision_model.", "model.vision_model.", ""),
    left_out=r"(head\.|text_model\.|logit_|embeddings\.position_ids)",
    blocks=("SiglipEncoderLayer",),
    block_names=("encoder.layers.",),
    norm_names=("post_layernorm.",),
    fixed={"vision_use_head": False},  # the pooling head would never get a gradient
    positions=("embeddings.position_embedding.weight",),
    resample=resample,
    weights="siglip",
    adopt=adopt,
    adopt_positions=adopt_positions,
    text_tower=TextTower(config=SiglipConfig, model=SiglipModel, model_type="siglip", family="siglip"),
    in_paligemma=True,
    published=published,
    tiny=tiny,
)
