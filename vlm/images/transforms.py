"""Pillow images to the tensors that a vision tower reads: resize, patches, normalisation.

Everything is Pillow and torch, in float32, with every number in one dataclass that is saved with the checkpoint: the
result never depends on which image
library happens to be installed.

Four ways to bring an image to the tower's size:

    squash     resize to a square, aspect ratio not kept (SigLIP, PaliGemma)
    crop       resize the shorter side, keep the square in the middle (CLIP, DINOv2)
    letterbox  resize to fit, centre on a square of the background colour
    naflex     keep the aspect ratio: the largest grid of whole patches within the budget (SigLIP 2 NaFlex)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError, nearest
from vlm.images.patches import patchify, resize_float
from vlm.images.resize import resize_bilinear

Mode = Literal["squash", "crop", "letterbox", "naflex"]
Rounding = Literal["nearest", "down"]
Policy = Literal["fill", "native"]
LARGEST = {"patch_size": 1_024, "image_size": 16_384, "resize_shortest": 16_384, "max_num_patches": 1_000_000}
"""Far above any published model; a wrong number must not ask for terabytes or count for hours."""
LARGEST_NUMBER = 1e6
"""Of mean, deviation and background: they are of values in [0, 1] or of 8 bit."""
FLOAT_FILTERS = ("bilinear", "bicubic")
"""Filters of the float resize; the others exist in Pillow only."""
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Pixels(NamedTuple):
    """The images of a batch as tensors.

    Attributes:
        pixel_values: float32[M, 3, H, W], or float32[M, N, P*P*3] for NaFlex.
        pixel_attention_mask: int64[M, N], 1 for real patches; None unless NaFlex.
        spatial_shapes: int64[M, 2], (rows, columns) of each image's patch grid; None unless NaFlex.
        grids: (rows, columns) of each image's patch grid, for every mode.
    """

    pixel_values: Tensor
    pixel_attention_mask: Tensor | None
    spatial_shapes: Tensor | None
    grids: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """How images become tensors.

    Attributes:
        mode: `squash`, `crop`, `letterbox` or `naflex`.
        patch_size: side of a patch in pixels.
        image_size: side of the square in pixels (all but `naflex`).
        resize_shortest: the shorter side in pixels before the square is cut out (`crop`); None: the square's.
        max_num_patches: patch budget of an image (`naflex`). No default: it decides quality and cost.
        naflex: what an image below the budget becomes (`naflex`): `fill` enlarges it to the budget, as the original;
            `native` keeps its resolution. Files that do not say mean `fill`.
        mean, std: per-channel normalisation of values in [0, 1].
        resample: `nearest`, `bilinear`, `bicubic` or `lanczos`.
        antialias: widen the filter when an image shrinks. False is the default of big_vision's own `resize` and the
            setting of some of its published recipes; transformers always antialiases.
        rounding: of resized values to 8 bit: `nearest` as Pillow and transformers, `down` as big_vision, whose `resize`
            truncates (half a step darker on average). NaFlex never rounds.
        background: RGB shown behind transparent pixels and around letterboxed images.
    """

    mode: Mode
    patch_size: int
    image_size: int | None = None
    resize_shortest: int | None = None
    max_num_patches: int | None = None
    naflex: Policy = "fill"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: str = "bicubic"
    antialias: bool = True
    rounding: Rounding = "nearest"
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        for name in ("mean", "std", "background"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        if self.mode not in get_args(Mode):
            known = get_args(Mode)
            raise ConfigError(f"unknown image mode {self.mode!r}{nearest(str(self.mode), known)}; known: {known}")
        if not isinstance(self.resample, str) or self.resample not in RESAMPLING:
            raise ConfigError(f"unknown resample filter {self.resample!r}; known: {', '.join(RESAMPLING)}")
        self._check_resize()
        self._check_policy()
        needed = "max_num_patches" if self.any_aspect else "image_size"
        for name in ("patch_size", needed):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"image transform {self.mode!r} needs {name} as a positive integer, got {value!r}")
        for name, highest in LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, int) and value > highest:
                raise ConfigError(f"image transform {name} is {str(value)[:40]}, at most {highest:,}")
        shortest = self.resize_shortest
        if shortest is not None and (self.mode != "crop" or not isinstance(shortest, int) or shortest < self._side):
            raise ConfigError(
                f"image transform resize_shortest is {shortest!r}, expected a whole number from {self._side}, the"
                f" square, upwards, and mode 'crop', got {self.mode!r}"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"image transform std must be positive, got {self.std}")

    def _check_resize(self) -> None:
        if self.rounding not in get_args(Rounding):
            known = get_args(Rounding)
            raise ConfigError(f"unknown rounding {self.rounding!r}{nearest(str(self.rounding), known)}; known: {known}")
        if not isinstance(self.antialias, bool):
            raise ConfigError(f"image transform antialias must be true or false, got {self.antialias!r}")
        if self.any_aspect and self.rounding != "nearest":
            raise ConfigError(f"naflex never rounds to 8 bit; leave rounding={self.rounding!r} out")
        if self._in_float and self.resample not in FLOAT_FILTERS:
            raise ConfigError(
                f"antialias={self.antialias} with rounding={self.rounding!r} needs resample bilinear or bicubic, got"
                f" {self.resample!r}"
            )

    def _check_policy(self) -> None:
        if self.naflex not in get_args(Policy):
            known = get_args(Policy)
            raise ConfigError(
                f"unknown naflex policy {self.naflex!r}{nearest(str(self.naflex), known)}; known: {known}"
            )
        if not self.any_aspect and self.naflex != "fill":
            raise ConfigError(
                f"naflex={self.naflex!r} is for towers that take any aspect ratio; this one reads squares (mode"
                f" {self.mode!r}): leave it out, or read a SigLIP tower as siglip2_naflex"
            )

    @property
    def members(self) -> tuple[ImageTransform, ...]:
        """The transforms of a fused tower's members; none where there is one tower."""
        return ()

    @property
    def each(self) -> tuple[ImageTransform, ...]:
        """The transform of each tower: the members of a fused one, or this."""
        return self.members or (self,)

    @property
    def any_aspect(self) -> bool:
        """Every image has a grid of its own, within a budget, and shorter ones are padded; else all have one grid."""
        return any_aspect(self.mode)

    @property
    def squashes(self) -> bool:
        """The whole image becomes a square, its aspect ratio is not kept."""
        return self.mode == "squash"

    @property
    def crops(self) -> bool:
        """The square in the middle is kept."""
        return self.mode == "crop"

    @property
    def _side(self) -> int:
        return self.image_size or 0

    @property
    def _in_float(self) -> bool:
        """The square is resized without Pillow, which cannot do it so."""
        return not self.antialias or self.rounding != "nearest"

    def __call__(self, images: Sequence[Image.Image]) -> Pixels:
        """Transform RGB images (use `vlm.images.load_image` to get them from files)."""
        if self.any_aspect:
            return self._naflex(images)
        grid = self.grid(0, 0)
        values = torch.stack([self._square(image) for image in images])
        return Pixels(values, None, None, [grid] * len(images))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patch grid that an image of this size gets."""
        if self.any_aspect:
            assert self.max_num_patches is not None
            return naflex_grid(height, width, self.patch_size, self.max_num_patches, self.naflex)
        assert self.image_size is not None
        side = self.image_size // self.patch_size
        return side, side

    def effective_resolution(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels at which the tower sees an image of this size: its grid of whole patches."""
        rows, columns = self.grid(height, width)
        return rows * self.patch_size, columns * self.patch_size

    @property
    def max_patches(self) -> int:
        """The most patches that one image can have."""
        if self.any_aspect:
            assert self.max_num_patches is not None
            return self.max_num_patches
        return math.prod(self.grid(0, 0))

    def widest_grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of the grids that use the most patches: the one there is, or, for each number of rows, the
        longest that the budget allows."""
        if not self.any_aspect:
            return [self.grid(0, 0)]
        budget = self.max_patches
        return [(rows, budget // rows) for rows in range(1, budget + 1)]

    @property
    def square_side(self) -> int:
        """Side in pixels of a large square image as the tower sees it, the rest that makes no patch included."""
        if self.any_aspect:
            return round(math.sqrt(self.max_patches)) * self.patch_size
        return self._side

    def size_of(self, rows: int) -> dict[str, int]:
        """The setting with which a large square image has a grid of `rows` x `rows` patches."""
        if self.any_aspect:
            return {"max_num_patches": rows * rows}
        return {"image_size": rows * self.patch_size}

    def short(self) -> str:
        """Size and patches in a few words."""
        if self.any_aspect:
            return f"NaFlex, {self.max_patches} patches of {self.patch_size} px"
        return f"{self.image_size} px, {self.mode}, patches of {self.patch_size} px"

    def describe(self) -> str:
        """One line for people: the effective resolution and the number of patches."""
        if self.any_aspect:
            side = self.square_side
            small = ", smaller images keep their size" if self.naflex == "native" else ""
            return f"naflex, at most {self.max_patches} patches of {self.patch_size} px (about {side}x{side} px){small}"
        assert self.image_size is not None
        rows, columns = self.grid(0, 0)
        seen = rows * self.patch_size
        cut = "" if seen == self.image_size else f", the last {self.image_size - seen} px of each side are never seen"
        size = f"{self.image_size}x{self.image_size} px"
        return f"{self.mode}, {size}, {rows * columns} patches of {self.patch_size} px{cut}"

    def changed(self, settings: dict[str, Any]) -> ImageTransform:
        """The transform with other settings; another way to a square has no shorter side to cut from."""
        kept = {} if settings.get("mode", self.mode) == "crop" else {"resize_shortest": None}
        return replace(self, **{**kept, **settings})

    def at_size(self, image_size: int | None) -> ImageTransform:
        """The transform of squares of another size, where there is one; a crop keeps its proportion."""
        if None in (image_size, self.image_size) or image_size == self.image_size:
            return self
        size, old, shortest = int(image_size or 0), self._side, self.resize_shortest
        if shortest is not None:
            shortest = max(size, round(size * shortest / old))
        return replace(self, image_size=size, resize_shortest=shortest)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageTransform:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown or missing key.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} in image_transform{nearest(key, known)}; known: {', '.join(known)}"
                )
        for key in ("mode", "patch_size"):
            if key not in values:
                raise ConfigError(f"image_transform has no {key!r}; add it")
        return cls(**values)

    def _square(self, image: Image.Image) -> Tensor:
        assert self.image_size is not None
        size = self.image_size
        if self.mode == "letterbox":
            scale = size / max(image.size)
            fit = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            canvas = Image.new("RGB", (size, size), self.background)
            canvas.paste(self._resize(image, fit), ((size - fit[0]) // 2, (size - fit[1]) // 2))
            image = canvas
        elif self.mode == "crop":
            image = self._crop(image)
        elif image.size != (size, size):
            image = self._resize(image, (size, size))
        return self._normalise(_to_tensor(image))

    def _crop(self, image: Image.Image) -> Image.Image:
        """Shorter side to `resize_shortest`, the other in proportion (rounded down), then the middle square: the
        arithmetic of transformers' CLIPImageProcessor."""
        short, size = self.resize_shortest or self._side, self._side
        least = min(image.size)
        if max(image.size) > 256 * least:  # what lies far from the middle is cut off anyway, and may fill the memory
            reach = [min(side, 256 * least + side % 2) for side in image.size]
            start = [(side - kept) // 2 for side, kept in zip(image.size, reach, strict=True)]
            image = image.crop((start[0], start[1], start[0] + reach[0], start[1] + reach[1]))
        wide = (short * image.width // least, short * image.height // least)
        if image.size != wide:
            image = self._resize(image, wide)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def _resize(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """To (width, height), 8 bit."""
        if not self._in_float:
            return image.resize(size, RESAMPLING[self.resample])
        array, shape = np.array(image.convert("RGB"), dtype=np.uint8), (size[1], size[0])
        if self.resample == "bilinear":
            values = resize_bilinear(array, shape, antialias=self.antialias)
        else:
            floats = torch.from_numpy(array).permute(2, 0, 1).float()
            values = resize_float(floats, shape, self.resample, antialias=self.antialias).permute(1, 2, 0).numpy()
        values = np.floor(values) if self.rounding == "down" else np.rint(values)
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))

    def _normalise(self, values: Tensor) -> Tensor:
        """float32[3, H, W] in [0, 1] -> float32[3, H, W]."""
        mean = torch.tensor(self.mean).view(3, 1, 1)
        return (values - mean) / torch.tensor(self.std).view(3, 1, 1)

    def _naflex(self, images: Sequence[Image.Image]) -> Pixels:
        if self.resample not in FLOAT_FILTERS:
            raise ConfigError(f"naflex resizes in float and needs resample bilinear or bicubic, got {self.resample!r}")
        grids = [self.grid(image.height, image.width) for image in images]
        longest = max(rows * columns for rows, columns in grids)
        values = torch.zeros(len(images), longest, 3 * self.patch_size**2)
        mask = torch.zeros(len(images), longest, dtype=torch.int64)
        for i, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
            size = (rows * self.patch_size, columns * self.patch_size)
            # As big_vision does: normalise first, resize in float, never round to 8 bit.
            resized = resize_float(self._normalise(_to_tensor(image)), size, self.resample, antialias=self.antialias)
            values[i, : rows * columns] = patchify(resized, self.patch_size)
            mask[i, : rows * columns] = 1
        return Pixels(values, mask, torch.tensor(grids), grids)


def any_aspect(mode: str) -> bool:
    """Whether images keep their aspect ratio, each with a grid of its own."""
    return mode == "naflex"


def _three_numbers(name: str, values: Any) -> tuple[Any, ...]:
    """One number per channel, as a tuple."""
    numbers = tuple(values) if isinstance(values, list | tuple) else ()
    # abs, not isfinite: a whole number may be too large to be looked at as a float.
    if len(numbers) != 3 or not all(isinstance(v, int | float) and abs(v) <= LARGEST_NUMBER for v in numbers):
        raise ConfigError(f"image transform {name} must be three numbers, got {str(values)[:200]}")
    return numbers


def _to_tensor(image: Image.Image) -> Tensor:
    """uint8 RGB image -> float32[3, H, W] in [0, 1]."""
    array = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def naflex_grid(
    height: int, width: int, patch_size: int, max_num_patches: int, policy: Policy = "fill"
) -> tuple[int, int]:
    """The NaFlex patch grid: the largest scale at which whole patches that cover the image fit the budget.

    With s the scale, the grid is (ceil(s*H/p), ceil(s*W/p)), each at least 1; s is found by the bisection of big_vision
    (`ops_naflex.get_resize_ratio`): on [eps/10, 100], until the interval is shorter than eps = 1e-5. `native` stops at
    s = 1: an image that fits the budget is stretched by less than a patch per side, to whole patches.

    Args:
        height, width: image size in pixels.
        patch_size: side of a patch in pixels.
        max_num_patches: patch budget.
        policy: `fill` or `native`.

    Returns:
        (rows, columns), rows * columns <= max_num_patches.

    Raises:
        ConfigError: a side, the patch size or the budget is below 1.
    """
    if min(height, width, patch_size, max_num_patches) < 1:
        raise ConfigError(
            f"no patch grid for an image of {height}x{width} px, patch {patch_size}, budget {max_num_patches}; all"
            f" must be at least 1"
        )

    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(scale * height / patch_size)), max(1, math.ceil(scale * width / patch_size))

    def fit(scale: float) -> bool:
        return math.prod(grid(scale)) <= max_num_patches

    if policy == "native" and fit(1.0):
        return grid(1.0)
    eps = 1e-5
    low, high = eps / 10, 100.0
    while high - low >= eps:
        middle = (low + high) / 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return grid(low)
