"""Pictures for pages: made small, encoded, and held inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm.images.load import FilePart, load_image
from vlm.report.page import text

ImageLike = str | Path | bytes | Image.Image | FilePart

TINY = 160
"""Pixels; up to here pictures are kept as they are, and enlarged with hard pixel edges."""
THUMBNAIL = 256
"""Pixels of the longer side in a grid of many: a few hundred photos stay below 10 MB."""


@dataclass(frozen=True)
class Small:
    """A picture as it goes into a page.

    Attributes:
        data: the bytes of a PNG or JPEG file.
        kind: its media type.
        tiny: few enough pixels that each of them should be seen.
    """

    data: bytes
    kind: str
    tiny: bool

    def html(self, alt: str = "") -> str:
        """An `<img>` with the picture inside."""
        css = ' class="tiny"' if self.tiny else ""
        data = base64.b64encode(self.data).decode("ascii")
        return f'<img{css} alt="{text(alt)}" loading="lazy" src="data:{self.kind};base64,{data}">'


def small(source: ImageLike, largest: int = THUMBNAIL, *, exact: bool = False) -> Small:
    """A picture whose longer side has at most `largest` pixels: JPEG, or PNG where pixels matter.

    Args:
        exact: PNG whatever its size, as for plots.

    Raises:
        ImageError: it cannot be read.
    """
    image = load_image(source).copy()  # `thumbnail` works in place; the picture may be the caller's
    tiny = max(image.size) <= TINY
    image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    if tiny or exact:
        image.save(buffer, "PNG", optimize=True)
        return Small(buffer.getvalue(), "image/png", tiny)
    image.save(buffer, "JPEG", quality=84)
    return Small(buffer.getvalue(), "image/jpeg", tiny)
