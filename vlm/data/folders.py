"""Which files of a folder are pictures: all of them, in one order, each once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vlm.data.problems import Problem
from vlm.images.load import SUFFIXES

MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM....\0\0\0\0|....ftyp(avif|avis|mif1|heic)",
    re.DOTALL,
)
"""How a picture begins; decides where a name has no suffix."""
_LEFT_OUT = frozenset({"__MACOSX"})


def pictures(folder: str) -> Iterator[str | Problem]:
    """Every picture below a folder, as `folder/...`, in the order of the names; a folder that cannot be listed as a
    problem.

    Names that begin with a dot are left out. A link to a folder that lies inside is not followed, because its pictures
    are there already; one that leads outside is followed once, so that a circle of links ends.
    """
    root = os.path.realpath(folder)
    entered = {root}
    waiting = [(folder, True)]
    while waiting:
        place, is_folder = waiting.pop()
        if not is_folder:
            yield place
            continue
        if place != folder and os.path.islink(place) and not _enters(place, root, entered):
            continue
        try:
            names = sorted(os.listdir(place), reverse=True)
        except OSError as error:
            yield Problem(place, 0, "unreadable", f"the folder cannot be listed: {error.strerror}")
            continue
        for path in (os.path.join(place, name) for name in names if name[:1] != "." and name not in _LEFT_OUT):
            if os.path.isdir(path):
                waiting.append((path, True))
            elif is_picture(path):
                waiting.append((path, False))


def is_picture(path: str) -> bool:
    """Whether a file is a picture by its name, or by its content where the name has no suffix.

    What a name says is not doubted here, even of a pipe or a link that leads nowhere: reading it says what is wrong.
    """
    suffix = os.path.splitext(path)[1].lower()
    return suffix in SUFFIXES if suffix else MAGIC.match(head(path)) is not None


def head(path: str | Path, size: int = 512) -> bytes:
    """The first bytes of a regular file; empty for anything else, and for what cannot be read."""
    try:
        if not os.path.isfile(path):
            return b""
        with open(path, "rb", buffering=0) as file:
            return file.read(size)
    except (OSError, ValueError):
        return b""


def _enters(link: str, root: str, entered: set[str]) -> bool:
    """Whether a link to a folder leads to one that the walk does not see otherwise; it is then marked as entered."""
    real = os.path.realpath(link)
    inside = os.path.commonpath([root, real]) == root
    around = os.path.commonpath([root, real]) == real  # it holds the folder itself: a circle
    if inside or around or real in entered:
        return False
    entered.add(real)
    return True
