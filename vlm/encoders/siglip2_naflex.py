"""SigLIP 2 NaFlex: any aspect ratio, a variable number of patches per image.

Paper: SigLIP 2, section 2.4.2 (arXiv 2502.14786). Reference code: big_vision `models/proj/image_text/naflex_vit.py`.
The blocks and parameter names are transformers' `Siglip2VisionModel`. Departure from transformers: the position grid is
resized one axis at a time, because torch's antialiased resize to a width of 1 repeats the first row on the CPU and
would give every patch of an h x 1 image one position. And padding is never computed: see `Encoder`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionModel
from transformers import Siglip2VisionConfig as Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip2.modeling_siglip2 import (
    Siglip2Attention,
    Siglip2VisionEmbeddings,
    eager_attention_forward,
)

from vlm.encoders._positions import resize_position_grid
from vlm.encoders.contract import EncoderOutput, Published, Spec, TextTower, stated
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform

__all__ = ["SPEC"]

DEFAULT_MAX_NUM_PATCHES = 256
"""The patch budget of Google's NaFlex demo; an explicit setting wherever a model is built."""
CPU_PATCHES = 2048
"""Patches that go through the layers together on a CPU: more fall out of its caches between two operations."""


class Embeddings(Siglip2VisionEmbeddings):
    """Patch embedding plus position embeddings resized to each image's grid.

    transformers reads both matrices past their modules; here the modules run, so that whatever hooks, wraps, quantises
    or offloads them takes part.
    """

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor) -> Tensor:
        """float[M, N, P*P*3], int64[M, 2] -> float[M, N, E]."""
        table = self.position_table(pixel_values.device)
        positions = self.resize_positional_embeddings(table, spatial_shapes, max_length=pixel_values.shape[1])
        embedded: Tensor = self.patch_embedding(pixel_values.to(table.dtype))
        return embedded + positions

    def position_table(self, device: torch.device) -> Tensor:
        """float[A, A, E], the learned square grid."""
        side = self.position_embedding_size
        rows: Tensor = self.position_embedding(torch.arange(side * side, device=device))
        return rows.view(side, side, -1)

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


class PackedEmbeddings(Embeddings):
    """The same for real patches only, laid end to end."""

    def forward(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:  # type: ignore[override]
        """float[T, P*P*3] and the grid of each image -> float[T, E]. Images with equal grids share one resize."""
        table = self.position_table(patches.device)
        # Kept for this call only: the table may change between two, and each call has its own autograd graph.
        resized = {grid: resize_position_grid(table, *grid) for grid in dict.fromkeys(grids)}
        embedded: Tensor = self.patch_embedding(patches.to(table.dtype))
        return embedded + torch.cat([resized[grid] for grid in grids])


class Group(NamedTuple):
    """Neighbouring images of one length in a packed line: their attention is one batch."""

    start: int
    images: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.images * self.length)


def packing(lengths: list[int]) -> tuple[list[int], list[Group]]:
    """The order in which images are laid end to end, equal lengths together, and the groups in that order.

    For lengths [4, 6, 4]: order [0, 2, 1], groups (start 0, 2 images of 4) and (start 8, 1 image of 6).
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups, start = [], 0
    for length, members in itertools.groupby(order, key=lengths.__getitem__):
        images = len(list(members))
        groups.append(Group(start, images, length))
        start += images * length
    return order, groups


def portions(order: list[int], lengths: list[int], most: int) -> list[list[int]]:
    """`order` cut into runs of images that have at most `most` patches together; a longer image is a run of its own."""
    runs: list[list[int]] = []
    total = 0
    for image in order:
        if not runs or total + lengths[image] > most:
            runs.append([])
            total = 0
        runs[-1].append(image)
        total += lengths[image]
    return runs


class PackedAttention(Siglip2Attention):
    """Attention inside each image of a packed line of patches, without a mask."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: None = None, *, groups: list[Group], **kwargs: Any
    ) -> tuple[Tensor, None]:
        """float[T, E] -> float[T, E]; `groups` say which rows are an image."""
        queries, keys, values = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        outputs = []
        for group in groups:
            heads = [
                line[group.rows].view(group.images, group.length, self.num_heads, self.head_dim).transpose(1, 2)
                for line in (queries, keys, values)
            ]
            dropout = self.dropout if self.training else 0.0
            output, _ = attend(self, *heads, None, is_causal=False, scaling=self.scale, dropout=dropout)
            outputs.append(output.reshape(group.images * group.length, -1))
        return self.out_proj(torch.cat(outputs)), None


class Encoder(Siglip2VisionModel):
    """SigLIP 2 NaFlex patch features; padding rows are zero, and marked by the mask.

    Every layer runs on real patches only, laid end to end, and attention on one image (or images of one length) at a
    time: a batch costs what its patches cost, however the sizes are mixed.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = PackedEmbeddings(config)
        for layer in self.encoder.layers:
            layer.self_attn = PackedAttention(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> EncoderOutput:
        """Encode patchified images.

        Args:
            pixel_values: float[M, N, P*P*3], real patches first.
            pixel_attention_mask: int or bool[M, N], 1 for real patches.
            spatial_shapes: int64[M, 2], (rows, columns).

        Raises:
            ConfigError: the mask and the grids count different numbers of patches.
        """
        mask = pixel_attention_mask.bool()
        grids = [(rows, columns) for rows, columns in spatial_shapes.tolist()]
        lengths = [rows * columns for rows, columns in grids]
        counted = mask.sum(1).tolist()
        if counted != lengths:
            raise ConfigError(
                f"pixel_attention_mask marks {counted} patches per image, spatial_shapes give {lengths};"
                " both come from the processor, pass them unchanged"
            )
        order, _ = packing(lengths)
        by_image = mask.flatten().nonzero().squeeze(1).split(lengths)
        flat, lines, hidden = pixel_values.flatten(0, 1), [], []
        for images in portions(order, lengths, CPU_PATCHES if flat.device.type == "cpu" else mask.numel()):
            lines.append(torch.cat([by_image[i] for i in images]))
            hidden.append(self._run(flat[lines[-1]], [grids[i] for i in images]))
        features = hidden[0].new_zeros(mask.numel(), hidden[0].shape[1])
        features = features.index_copy(0, torch.cat(lines), torch.cat(hidden))
        return EncoderOutput(features.view(*mask.shape, -1), mask, spatial_shapes)

    def _run(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """float[T, P*P*3], images end to end and shorter ones first, and their grids -> float[T, E]."""
        _, groups = packing([rows * columns for rows, columns in grids])
        hidden = self.embeddings(patches, grids)
        for layer in self.encoder.layers:
            hidden = layer(hidden, None, groups=groups)
        return self.post_layernorm(hidden)


def transform(config: Config, **settings: Any) -> ImageTransform:
    """Aspect ratio kept, at most `max_num_patches` patches, values in [-1, 1], bilinear in float as in big_vision."""
    values = {
        "mode": "naflex",
        "patch_size": config.patch_size,
        "max_num_patches": DEFAULT_MAX_NUM_PATCHES,
        "resample": "bilinear",
    }
    return ImageTransform(**{**values, **settings})


def adopt(values: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """A square SigLIP tower's settings: its position table is the grid that is resized for each image."""
    kept = {key: value for key, value in values.items() if key != "image_size"}
    return {**kept, "num_patches": (values["image_size"] // values["patch_size"]) ** 2}


def adapt(model: Any) -> None:
    """Both towers with positions resized as here, before weights are read."""
    model.vision_model.embeddings = Embeddings(model.config.vision_config)


def published(config: Config, transform: ImageTransform, head: Mapping[str, tuple[int, ...]] | None) -> Published:
    """As transformers' `Siglip2VisionModel`; version 4 knows the names with their prefix only, 5 knows both."""
    values = stated(config, vision_use_head=head is not None)
    return Published(
        architecture="Siglip2VisionModel",
        config=values,
        rename="vision_model.{}".format,
        build=lambda: Siglip2VisionModel(Config(**values)),
        features=lambda model, **inputs: model(**inputs).last_hidden_state,
    )


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


SPEC = Spec(
    title="SigLIP 2 NaFlex",
    config=Config,
    encoder=Encoder,
    transform=transform,
    model_types=("siglip2", "siglip2_vision_model"),
    prefixes=("vision_tower.vision_model.", "vision_model.", "model.vision_model.", ""),
    left_out=r"(head\.|text_model\.|logit_|embeddings\.position_ids)",
    any_aspect=True,
    blocks=("Siglip2EncoderLayer",),
    fixed={"vision_use_head": False},  # the pooling head would never get a gradient
    weights="siglip",
    adopt=adopt,
    text_tower=TextTower(config=Siglip2Config, model=Siglip2Model, model_type="siglip2", family="siglip2", adapt=adapt),
    published=published,
    tiny=tiny,
)
