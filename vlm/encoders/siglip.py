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
from torch.nn import functional as F
from transformers import SiglipVisionConfig as Config
from transformers import SiglipVisionModel

from vlm.encoders._layers import final_norm, hidden_features, run_blocks, runs
from vlm.encoders.contract import EncoderOutput, Published, check_square, square_output, stated
from vlm.encoders.contract import square_tokens as tokens_for
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform

__all__ = ["Config", "Encoder", "published", "resample_position_table", "tiny", "tokens_for", "transform"]

MODEL_TYPES = ("siglip", "siglip_vision_model")
PREFIXES = ("vision_tower.vision_model.", "vision_model.", "model.vision_model.", "")
LEFT_OUT = r"(head\.|text_model\.|logit_|embeddings\.position_ids)"
FIXED = {"vision_use_head": False}  # the pooling head would never get a gradient
POSITIONS = "embeddings.position_embedding.weight"
BLOCKS, NORM = "encoder.layers.", "post_layernorm."


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
    if old == new:
        return table
    grid = table.detach().float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
    return grid.permute(0, 2, 3, 1).reshape(positions, -1).to(table.dtype)


def resample(table: Tensor, config: Config) -> Tensor:
    """The position table at the configuration's image size (`resample_position_table`)."""
    return resample_position_table(table, tokens_for(config, int(config.image_size)))  # type: ignore[arg-type]


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


def published(config: Config, transform: ImageTransform, head: Mapping[str, tuple[int, ...]] | None) -> Published:
    """As transformers' `SiglipVisionModel`; version 4 knows the names with their prefix only, 5 knows both."""
    values = stated(config, vision_use_head=head is not None)
    return Published(
        architecture="SiglipVisionModel",
        config=values,
        rename="vision_model.{}".format,
        build=lambda: SiglipVisionModel(Config(**values)),
        features=lambda model, **inputs: hidden_features(config, model, None, 0, **inputs),
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
