"""Image augmentations that a stage can ask for by name.

None is on by default: only the data's owner knows which of them keep the answer true.

`hflip` swaps left and right, `vflip` above and below, `rotate90` both; `brightness` keeps the hue. An augmentation
takes an RGB image and a generator and returns an RGB image.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlm.errors import ConfigError, nearest

Augmentation = Callable[[Image.Image, np.random.Generator], Image.Image]


def hflip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirror left and right in half of the cases."""
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def vflip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirror top and bottom in half of the cases."""
    return ImageOps.flip(image) if rng.random() < 0.5 else image


def rotate90(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn by 0, 90, 180 or 270 degrees."""
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = turns[int(rng.random() * 4)]
    return image if turn is None else image.transpose(turn)


def brightness(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Multiply all channels by one factor between 0.8 and 1.2."""
    return ImageEnhance.Brightness(image).enhance(0.8 + 0.4 * rng.random())


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Keep a random window of 85 to 100 % of each side; the size of the image shrinks with it."""
    width, height = image.size
    new_width, new_height = (max(1, round(side * (0.85 + 0.15 * rng.random()))) for side in (width, height))
    left, top = int(rng.random() * (width - new_width + 1)), int(rng.random() * (height - new_height + 1))
    return image.crop((left, top, left + new_width, top + new_height))


AUGMENTATIONS: dict[str, Augmentation] = {f.__name__: f for f in (hflip, vflip, rotate90, brightness, crop)}


def pipeline(names: Sequence[str]) -> list[Augmentation]:
    """The named augmentations in order. Raises `ConfigError` for an unknown name."""
    for name in names:
        if name not in AUGMENTATIONS:
            raise ConfigError(
                f"augment: unknown name {name!r}{nearest(name, AUGMENTATIONS)}; known: {', '.join(AUGMENTATIONS)}"
            )
    return [AUGMENTATIONS[name] for name in names]
