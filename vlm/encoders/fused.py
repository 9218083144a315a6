"""Several towers on one grid, their features concatenated along the channels.

Papers: Eyes Wide Shut? (interleaved and additive mixtures, arXiv 2401.06209), Prismatic VLMs (SigLIP and DINOv2 side by
side, arXiv 2402.07865), Cambrian-1 (arXiv 2406.16860). Reference code: Prismatic's `dinosiglip_vit.py` concatenates
`[M, P, E1]` and `[M, P, E2]` in this way, after asserting equal numbers of patches.

Each member reads its own pixels (`vlm.images.fused`): its own size, filter, mean and deviation, one geometry for all.
Cell (i, j) of the result is cell (i, j) of every member. Members with different grids are refused, unless the
configuration says `grid: [rows, columns]` and `resample: bilinear`; then the features of each member with another
grid are resized to it (half-pixel centres, antialias where an axis shrinks, in float32), and `vlm new` and
`vlm info` say so.

Departure from Prismatic: the features are each member's own choice of layer with its own norm (there: the second to
last block of both). This file finds its members through `vlm.registry.part`: no other encoder uses others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from vlm.encoders.contract import EncoderOutput, Spec
from vlm.errors import ConfigError
from vlm.images.fused import FusedTransform, one_view, unpack
from vlm.images.patches import resize_float
from vlm.images.transforms import ImageTransform
from vlm.registry import part

__all__ = ["SPEC"]

logger = logging.getLogger(__name__)

KIND = "fused"
RESAMPLING = ("bilinear",)


class Config(PreTrainedConfig):
    """What a fused tower is made of.

    Attributes:
        members: two or more `{"encoder": kind, "config": {...}}`, in the order of their channels.
        grid: (rows, columns) of the features; None: the one that all members have.
        resample: `bilinear` resizes the features of members with another grid than `grid`; None refuses them.
    """

    model_type = "vlm_fused"

    members: Any = None
    grid: Any = None
    resample: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # transformers builds every configuration class once without arguments (to diff against defaults).
        if self.members is not None:
            self.grid = list(_common_grid(self))

    @property
    def towers(self) -> list[tuple[str, PreTrainedConfig]]:
        """(kind, configuration) of each member."""
        kinds = [member["encoder"] for member in self.members or ()]
        return [
            (kind, _spec(kind).read_config({**member["config"], **_spec(kind).fixed}))
            for kind, member in zip(kinds, self.members or (), strict=True)
        ]

    @property
    def hidden_size(self) -> int:
        """Channels of all members together."""
        return sum(_spec(kind).width(config) for kind, config in self.towers)

    @property
    def image_size(self) -> int:
        """Side in pixels of the largest member's images."""
        return int(self._largest.image_size)

    @property
    def patch_size(self) -> int:
        """Of the member with the largest images."""
        return int(self._largest.patch_size)

    @property
    def _largest(self) -> Any:
        configs: list[Any] = [config for _, config in self.towers]
        if not configs:
            raise AttributeError("a fused configuration without members has no size")
        return max(configs, key=lambda config: config.image_size)


def fuse(
    members: Sequence[tuple[str, PreTrainedConfig]], grid: Sequence[int] | None = None, resample: str | None = None
) -> Config:
    """The configuration of a fused tower from its members' kinds and configurations.

    Raises:
        ConfigError: fewer than two members, one without a fixed grid, or grids that differ without `resample`.
    """
    return Config(
        members=[{"encoder": kind, "config": _settings(config)} for kind, config in members],
        grid=None if grid is None else list(grid),
        resample=resample,
    )


def _spec(kind: str) -> Spec:
    """What a member's file says of it."""
    found: Spec = part("vlm.encoders", kind).SPEC
    return found


def with_members(config: Config, members: list[tuple[str, Any]]) -> Config:
    """The same tower with other configurations of its members; a common grid that was not asked for is theirs again."""
    return fuse(members, config.grid if config.resample else None, config.resample)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """A member's own settings, without what every transformers configuration has."""
    common = PreTrainedConfig().to_dict()
    values = config.to_dict()
    return {key: value for key, value in values.items() if key not in common or value != common[key]}


def _common_grid(config: Config) -> tuple[int, int]:
    """(rows, columns), checked against every member's own grid."""
    _check_members(config.members)
    grids = {}
    for number, (kind, member) in enumerate(config.towers):
        rows = int(member.image_size) // int(member.patch_size)
        name = f"{number + 1}. {kind} ({member.image_size} px, patches of {member.patch_size})"
        grids[name] = (rows, rows)
    if config.resample not in (None, *RESAMPLING):
        raise ConfigError(f"resample is {config.resample!r}, a fused tower knows {', '.join(RESAMPLING)}")
    if config.grid is not None and not _is_grid(config.grid):
        raise ConfigError(f"grid is {config.grid!r}, expected [rows, columns]")
    if config.resample is not None and config.grid is None:
        raise ConfigError("resample says how, grid: [rows, columns] to what; a fused tower needs both")
    first = next(iter(grids.values()))
    wanted = first if config.grid is None else (int(config.grid[0]), int(config.grid[1]))
    if config.resample is None and set(grids.values()) != {wanted}:
        shown = ", ".join(f"{name} gives {rows}x{columns}" for name, (rows, columns) in grids.items())
        towers: list[Any] = config.towers
        alike = " + ".join(f"{kind}@{first[0] * member.patch_size}" for kind, member in towers)
        asked = "" if config.grid is None else f" for grid {wanted[0]}x{wanted[1]}"
        raise ConfigError(
            f"the members of a fused tower have different grids{asked}: {shown}; choose image sizes with equal grids"
            f" ({alike}), or resample the features:"
            f" grid [{first[0]}, {first[1]}], resample bilinear"
        )
    return wanted


def _is_grid(value: Any) -> bool:
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int for n in value)
    return whole and all(1 <= n <= 1024 for n in value)


def _check_members(members: Any) -> None:
    if not isinstance(members, list) or len(members) < 2:
        raise ConfigError("a fused tower needs two members or more; for one, use its own kind")
    for member in members:
        complete = isinstance(member, dict) and set(member) == {"encoder", "config"}
        if not complete or not isinstance(member["config"], dict):
            raise ConfigError(
                f'a member of a fused tower is {{"encoder": kind, "config": {{...}}}}, got {str(member)[:200]}'
            )
        if member["encoder"] == KIND:
            raise ConfigError("a fused tower cannot be a member of another; list its members instead")
        spec = _spec(member["encoder"])
        spec.read_config(member["config"])
        if spec.any_aspect:
            raise ConfigError(
                f"{member['encoder']} gives each image a grid of its own, and the members of a fused tower share one:"
                f" take a fixed-resolution checkpoint (SigLIP 2 has both)"
            )


def choose_layers(config: Config, layer: int | list[int]) -> Config:
    """The same choice of feature layers for every member."""
    chosen = [(kind, _spec(kind).choose_layers(kind, member, layer)) for kind, member in config.towers]
    return fuse(chosen, config.grid, config.resample)


class Encoder(PreTrainedModel):
    """Features of several towers, side by side."""

    config_class = Config
    config: Config
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        towers = config.towers
        configs: list[Any] = [member for _, member in towers]
        self.sizes = [int(member.image_size) for member in configs]
        self.members = nn.ModuleList(_spec(kind).encoder._from_config(own) for kind, own in towers)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls, *args: Any) -> bool:
        return True  # the members have their own attention, and follow

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Members are transformers models and initialise themselves."""

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode images.

        Args:
            pixel_values: float[M, sum of 3*H*W over the members], as `FusedTransform` packs them.

        Raises:
            ConfigError: another number of pixels than the members'.
        """
        rows, columns = self.config.grid
        parts = unpack(pixel_values, self.sizes)
        features = [
            resized(member(values), (rows, columns)) for member, values in zip(self.members, parts, strict=True)
        ]
        grid = torch.tensor([[rows, columns]], device=pixel_values.device).repeat(len(pixel_values), 1)
        return EncoderOutput(torch.cat(features, dim=-1), None, grid)


def resized(output: EncoderOutput, grid: tuple[int, int]) -> Tensor:
    """float[M, R*C, E]: features brought to a grid; untouched where they have it."""
    own = output.grid[0].tolist()
    if tuple(own) == grid:
        return output.features
    image = output.features.float().unflatten(1, own).permute(0, 3, 1, 2)
    return resize_float(image, grid, "bilinear").flatten(2).transpose(1, 2).to(output.features.dtype)


def transform(config: Config, *, recorded: Sequence[dict[str, Any]] | None = None, **settings: Any) -> ImageTransform:
    """The members' own transforms with one geometry: theirs if they agree, else `squash`, which is logged.

    Args:
        recorded: what each member's checkpoint records, as settings of its transform.
        settings: for all members: mode, background, resample, antialias, rounding.
    """
    towers = config.towers
    own = [
        _spec(kind).transform(member, **values)
        for (kind, member), values in zip(towers, recorded or [{}] * len(towers), strict=True)
    ]
    members = one_view(own, settings)
    for (kind, _), before, after in zip(towers, own, members, strict=True):
        if before.mode != after.mode and "mode" not in settings:
            logger.warning(
                "fused tower: %s was trained with %s, here it gets %s like the other members, so that all see the same"
                " part of an image; image.mode=crop or letterbox chooses another way for all",
                kind,
                before.mode,
                after.mode,
            )
    return FusedTransform.of(members, tuple(config.grid))


def tiny() -> Config:
    """SigLIP at 28 px (patch 14) beside DINOv3 at 32 px (patch 16): 4 cells."""
    return small(28, 14, 64, 2, 4)


def small(image_size: int, patch_size: int, width: int, depth: int, heads: int) -> Config:
    """SigLIP beside DINOv3, each of half the width; DINOv3 has patches that are 2 px larger, and the same grid."""
    rows, half = image_size // patch_size, width // 2
    same = {"hidden_size": half, "intermediate_size": 2 * half, "num_hidden_layers": depth}
    same |= {"num_attention_heads": heads}
    other = {**same, "patch_size": patch_size + 2, "image_size": rows * (patch_size + 2), "num_register_tokens": 2}
    siglip = {**same, "patch_size": patch_size, "image_size": image_size, "vision_use_head": False}
    members = (("siglip", siglip), ("dinov3", other))
    return fuse([(kind, _spec(kind).read_config(values)) for kind, values in members])


SPEC = Spec(
    title="several towers side by side",
    config=Config,
    encoder=Encoder,
    transform=transform,
    model_types=("vlm_fused",),
    prefixes=("",),
    left_out=r"(?!)",  # nothing
    grid=lambda config: (int(config.grid[0]), int(config.grid[1])),
    members=lambda config: config.towers,
    with_members=with_members,
    choose=choose_layers,
    tiny=tiny,
    small=small,
)
