"""What is trained on and evaluated: an image (or several, or none), what is asked and what should be said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Example:
    """One annotation that passed every check; the image has not been decoded yet."""

    id: str
    image: Path | Image.Image | None
    """None: about text alone."""
    prefix: str
    suffix: str | None
    references: tuple[str, ...]
    answers: tuple[str, ...]
    file: str
    line: int
    more_images: tuple[Path | Image.Image, ...] = ()
    """Images that follow `image`, where a prompt is about several."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else is known of the item and metrics or breakdowns read: choices, question type, language, ... From an
    annotation file: its other keys, as they are."""

    @property
    def images(self) -> tuple[Path | Image.Image, ...]:
        """All images, in the order in which the model sees them."""
        return () if self.image is None else (self.image, *self.more_images)


@dataclass(frozen=True)
class Labelled:
    """An image of a known class; it has not been decoded yet."""

    id: str
    image: Path | Image.Image
    label: str

    @property
    def images(self) -> tuple[Path | Image.Image, ...]:
        """The image, as `Example` has it."""
        return (self.image,)


@dataclass(frozen=True)
class Paired:
    """An image and texts that belong to it; it has not been decoded yet."""

    id: str
    image: Path | Image.Image
    texts: tuple[str, ...]
    language: str = ""

    @property
    def images(self) -> tuple[Path | Image.Image, ...]:
        """The image, as `Example` has it."""
        return (self.image,)
