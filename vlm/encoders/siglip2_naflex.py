"""SigLIP 2 NaFlex: any aspect ratio, a variable number of patches per image.

Paper: SigLIP 2, section 2.4.2 (arXiv 2502.14786). Reference code: big_vision `models/proj/image_text/naflex_vit.py`.
The blocks and parameter names are transformers' `Siglip2VisionModel`. Departure from transformers: the position grid is
resized one axis at a time, because torch's antialiased resize to a width of 1 repeats the first row on the CPU and
would give every patch of an h x 1 image one position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Siglip2VisionConfig as Config
from transformers import Siglip2VisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from vlm.encoders import EncoderOutput
from vlm.encoders import square_tokens as tokens_for
from vlm.errors import ConfigError
from vlm.transforms import ImageTransform, resize_float

__all__ = ["Config", "Encoder", "resize_position_grid", "tiny", "tokens_for", "transform"]

MODEL_TYPES = ("siglip2", "siglip2_vision_model")
PREFIXES = ("vision_tower.vision_model.", "vision_model.", "model.vision_model.", "")
LEFT_OUT = r"(head\.|text_model\.|logit_|embeddings\.position_ids)"

DEFAULT_MAX_NUM_PATCHES = 256
"""The patch budget of Google's NaFlex demo; an explicit setting wherever a model is built."""


def resize_position_grid(table: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings of a rows x columns patch grid (bilinear, antialiased, half-pixel centres).

    Args:
        table: float[A, A, E], the learned square grid.

    Returns:
        float[rows * columns, E], row order, in the dtype of `table`.
    """
    # Antialiased resize has no half-precision kernel on the CPU, and the original computes it in float32.
    image = table.permute(2, 0, 1).float()
    resized = resize_float(image, (rows, columns), "bilinear")
    return resized.permute(1, 2, 0).reshape(rows * columns, -1).to(table.dtype)


class Embeddings(Siglip2VisionEmbeddings):
    """Patch embedding plus position embeddings resized to each image's grid."""

    @staticmethod
    def resize_positional_embeddings(positional_embeddings: Tensor, spatial_shapes: Tensor, max_length: int) -> Tensor:
        """float[A, A, E], int64[M, 2] -> float[M, max_length, E]; padding rows repeat the first row, as in
        transformers."""
        resized: dict[tuple[int, int], Tensor] = {}
        for rows, columns in {(int(r), int(c)) for r, c in spatial_shapes.tolist()}:
            real = resize_position_grid(positional_embeddings, rows, columns)
            padding = real[:1].expand(max_length - real.shape[0], -1)
            resized[rows, columns] = torch.cat([real, padding])
        return torch.stack([resized[int(r), int(c)] for r, c in spatial_shapes.tolist()])


class Encoder(Siglip2VisionModel):
    """SigLIP 2 NaFlex patch features; padding rows are marked by the mask."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor, **kwargs: Any
    ) -> EncoderOutput:
        """Encode patchified images.

        Args:
            pixel_values: float[M, N, P*P*3], real patches first.
            pixel_attention_mask: int or bool[M, N], 1 for real patches.
            spatial_shapes: int64[M, 2], (rows, columns).

        Raises:
            ConfigError: the mask and the grids count different numbers of patches.
        """
        mask = pixel_attention_mask.bool()
        counted, stated = mask.sum(1), spatial_shapes.prod(1)
        if not torch.equal(counted, stated.to(counted.dtype)):
            raise ConfigError(
                f"pixel_attention_mask marks {counted.tolist()} patches per image, spatial_shapes give"
                f" {stated.tolist()};"
                " both come from the processor, pass them unchanged"
            )
        output = super().forward(
            pixel_values=pixel_values.to(self.dtype),
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            **kwargs,
        )
        return EncoderOutput(output.last_hidden_state, mask, spatial_shapes)


def transform(config: Config, **settings: Any) -> ImageTransform:
    """Aspect ratio kept, at most `max_num_patches` patches, values in [-1, 1], bilinear in float as in big_vision."""
    values = {
        "mode": "naflex",
        "patch_size": config.patch_size,
        "max_num_patches": DEFAULT_MAX_NUM_PATCHES,
        "resample": "bilinear",
    }
    return ImageTransform(**{**values, **settings})


def tiny() -> Config:
    """A tower with patch 14 and a 4 x 4 position grid."""
    return Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=14,
        num_patches=16,
        vision_use_head=False,
    )
