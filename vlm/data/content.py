"""Digests of data by its content: what is in an image file counts, not where it lies or what it is called.

Every file is read whole, once per process while it does not change (its size, times and inode are looked at each time),
by several threads; that costs about what copying the files to nowhere would.
"""

import functools
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from vlm.data.examples import Example, Labelled

log = logging.getLogger(__name__)

THREADS = 8
AT_ONCE = 2**20
"""Bytes up to which a file is read in one piece, which is twice as fast for small ones."""
REMEMBERED = 2**17
"""Files whose digest is kept in memory."""
WORTH_TELLING = 20_000
"""Files whose reading takes long enough to be announced."""
ORIENTATION = 0x0112
"""The EXIF tag that says how an image is turned upright."""


def of_items(
    items: Sequence[Example] | Sequence[Labelled], fields: Sequence[str], found: Mapping[Path, str] | None = None
) -> str:
    """sha256 over some fields of every item and over the content of its images, in order.

    Args:
        found: digests of `image_files(items)` by `of_files`, where somebody has them already; None reads the files.
    """
    found = of_files(image_files(items)) if found is None else found
    total = hashlib.sha256()
    for item in items:
        images = [found[image] if isinstance(image, Path) else of_picture(image) for image in item.images]
        total.update(json.dumps([[getattr(item, name) for name in fields], images]).encode() + b"\n")
    return total.hexdigest()


def image_files(items: Sequence[Example] | Sequence[Labelled]) -> list[Path]:
    """The image files of all items, each once, in a steady order."""
    return list(dict.fromkeys(image for item in items for image in item.images if isinstance(image, Path)))


def of_files(paths: Iterable[Path]) -> dict[Path, str]:
    """The digest of each file, see `of_file`; several are read at a time."""
    listed = list(paths)
    if len(listed) > WORTH_TELLING:
        log.info("reading %d files once, to know them again by their content", len(listed))
    with ThreadPoolExecutor(THREADS) as pool:
        # In portions: a task for each of 100,000 small files would cost more than reading them.
        portions = [listed[start : start + 64] for start in range(0, len(listed), 64)]
        digests = [digest for portion in pool.map(_of_some, portions) for digest in portion]
    return dict(zip(listed, digests, strict=True))


def _of_some(paths: Sequence[Path]) -> list[str]:
    return [of_file(path) for path in paths]


def of_file(path: Path) -> str:
    """sha256 of a file's bytes; `unreadable` for what is no file or cannot be read (decoding it says what is wrong)."""
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):  # a pipe would block
            return "unreadable"
        return _of_state(str(path), state.st_size, state.st_dev, state.st_ino, state.st_mtime_ns, state.st_ctime_ns)
    except OSError:
        return "unreadable"


@functools.lru_cache(maxsize=REMEMBERED)
def _of_state(path: str, size: int, *_state: int) -> str:
    with open(path, "rb", buffering=0) as file:
        if size <= AT_ONCE:
            return hashlib.sha256(file.read()).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_picture(image: Image.Image) -> str:
    """sha256 over what an image in memory shows: mode, size, pixels, palette, transparency and orientation."""
    total = hashlib.sha256()
    try:
        pixels = image.tobytes()
    except (OSError, ValueError):  # opened and not decoded yet, and damaged
        return "unreadable"
    seen = [image.mode, image.size, image.getexif().get(ORIENTATION), image.getpalette()]
    total.update(repr([*seen, image.info.get("transparency")]).encode())
    total.update(pixels)
    return total.hexdigest()
