"""Image augmentations that a stage can ask for by name.

None is on by default: only the data's owner knows which of them keep the answer true.

`hflip` swaps left and right, `vflip` above and below, `rotate90` both; `brightness` keeps the hue. An augmentation
draws a `View` for an image; boxes and points in the texts (`vlm.text.locations`) go with the picture. A mask is a code
of its outline, which nothing here can turn: `check` refuses data with masks where the outline would change, and `crop`
leaves a picture whole rather than cut through one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlm.data.examples import Example
from vlm.errors import ConfigError, DataError, nearest
from vlm.text import locations
from vlm.text.locations import Move

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class View:
    """What is done to a picture: to its pixels, and to a place in it."""

    pixels: Callable[[Image.Image], Image.Image]
    move: Move | None = None
    """None where everything stays in its place."""


OfImages = Callable[[Image.Image, np.random.Generator], Image.Image]
Draw = Callable[[Size, np.random.Generator], View]


@dataclass(frozen=True)
class Augmentation:
    """An augmentation by name; called with an RGB image and a generator it returns an RGB image."""

    name: str
    draw: Draw
    """The view of an image of a size."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return self.draw(image.size, rng).pixels(image)


def _augmentation(draw: Draw) -> Augmentation:
    return Augmentation(draw.__name__, draw)


_AS_IT_IS = View(lambda image: image)


@_augmentation
def hflip(size: Size, rng: np.random.Generator) -> View:
    """Mirror left and right in half of the cases."""
    return View(ImageOps.mirror, lambda x, y: (1 - x, y)) if rng.random() < 0.5 else _AS_IT_IS


@_augmentation
def vflip(size: Size, rng: np.random.Generator) -> View:
    """Mirror top and bottom in half of the cases."""
    return View(ImageOps.flip, lambda x, y: (x, 1 - y)) if rng.random() < 0.5 else _AS_IT_IS


_TURNS: tuple[View, ...] = (
    _AS_IT_IS,
    View(lambda image: image.transpose(Image.Transpose.ROTATE_90), lambda x, y: (y, 1 - x)),
    View(lambda image: image.transpose(Image.Transpose.ROTATE_180), lambda x, y: (1 - x, 1 - y)),
    View(lambda image: image.transpose(Image.Transpose.ROTATE_270), lambda x, y: (1 - y, x)),
)


@_augmentation
def rotate90(size: Size, rng: np.random.Generator) -> View:
    """Turn by 0, 90, 180 or 270 degrees, against the clock."""
    return _TURNS[int(rng.random() * 4)]


@_augmentation
def brightness(size: Size, rng: np.random.Generator) -> View:
    """Multiply all channels by one factor between 0.8 and 1.2."""
    factor = 0.8 + 0.4 * rng.random()
    return View(lambda image: ImageEnhance.Brightness(image).enhance(factor))


@_augmentation
def crop(size: Size, rng: np.random.Generator) -> View:
    """Keep a random window of 85 to 100 % of each side; the size of the image shrinks with it."""
    shares, offsets = rng.random(2), rng.random(2)

    def window(size: Size) -> tuple[int, int, int, int]:
        new = [max(1, round(side * (0.85 + 0.15 * share))) for side, share in zip(size, shares, strict=True)]
        left, top = (int(offset * (side - kept + 1)) for offset, side, kept in zip(offsets, size, new, strict=True))
        return left, top, left + new[0], top + new[1]

    left, top, right, bottom = window(size)
    width, height = size
    return View(
        lambda image: image.crop(window(image.size)),
        lambda x, y: ((x * width - left) / (right - left), (y * height - top) / (bottom - top)),
    )


AUGMENTATIONS: dict[str, Augmentation] = {a.name: a for a in (hflip, vflip, rotate90, brightness, crop)}
_TURNS_MASKS = ("hflip", "vflip", "rotate90")


def pipeline(names: Sequence[str]) -> list[Augmentation]:
    """The named augmentations in order. Raises `ConfigError` for an unknown name."""
    for name in names:
        if name not in AUGMENTATIONS:
            raise ConfigError(
                f"augment: unknown name {name!r}{nearest(name, AUGMENTATIONS)}; known: {', '.join(AUGMENTATIONS)}"
            )
    return [AUGMENTATIONS[name] for name in names]


def check(augmentations: Sequence[Augmentation], examples: Iterable[Example]) -> None:
    """Raise `DataError` for examples with masks that an augmentation would have to turn, by file and line."""
    turning = ", ".join(augmentation.name for augmentation in augmentations if augmentation.name in _TURNS_MASKS)
    if not turning:
        return
    found = [example for example in examples if "<seg" in example.prefix or "<seg" in (example.suffix or "")]
    if found:
        first = found[0]
        raise DataError(
            f"{first.file}:{first.line}: augment: {turning} would turn the picture, but not the mask that its <seg>"
            f" tokens encode ({len(found)} of the examples have one); leave {turning} out for data with masks (crop and"
            " brightness keep them)"
        )


def apply(
    augmentations: Sequence[Augmentation | OfImages],
    images: Sequence[Image.Image],
    texts: Sequence[str],
    rng: np.random.Generator,
) -> tuple[list[Image.Image], list[str]]:
    """The images and the texts about them in one view; several images are all seen in the same.

    A step that would cut a box, a point or a mask off (`vlm.text.locations.move`) is left out. A plain function from
    image to image must leave everything in its place where the texts have boxes; each image is drawn for it anew.
    """
    shown, said = list(images), list(texts)
    for augmentation in augmentations if shown else ():
        if not isinstance(augmentation, Augmentation):
            shown = [augmentation(image, rng) for image in shown]
            continue
        view = augmentation.draw(shown[0].size, rng)
        moved = [text if view.move is None else locations.move(text, view.move) for text in said]
        whole = [text for text in moved if text is not None]
        if len(whole) == len(said):
            shown, said = [view.pixels(image) for image in shown], whole
    return shown, said
