"""What an annotation format says of itself, and what its file has to define."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class AnnotationFormat:
    """`FORMAT` of a file of `vlm.data.formats`.

    Such a file also has `records(path, name)`: an iterator over (number, record), where the number is that of the line
    (or of the row) from 1 and a record is an object with the keys of `vlm.data.reading`, or the `Refused` that says
    why there is none. The checks of records are the same for all formats. `name` is the path for messages.
    """

    about: str
    """What it looks like, in a line."""
    recognise: Callable[[bytes], bool] | None = None
    """Whether the first bytes of a file are those of this format. None: it is read where its name is given, or where no
    other format is recognised."""
