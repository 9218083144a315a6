"""What the reader of a benchmark says of itself, and how its files are recognised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm.data.rows import Document


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One way in which people write what models said: a file of records, or one object by id."""

    name: str
    """What `vlm score` calls it."""
    about: str
    id: str = ""
    """The key of a record's id; empty where the file is an object from id to what was said."""
    text: str = ""
    """The key of what was said; empty where the object has the text itself."""
    inside: str = ""
    """The key of the object from id to what was said, where it lies in another one."""
    images: bool = False
    """The ids are names of image files; their extensions are cut."""
    order: int = 50
    """Lower is tried first, where a file could be several."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`FORMAT` of a file of `vlm.data.benchmarks`.

    Such a file also has `read(source)`: an iterator over the `Item`s in the files of a `vlm.data.source.Source`.
    """

    about: str
    """What the file with the gold texts looks like, in a line."""
    gold: str = ""
    """The role of the file that is enough to score predictions; empty where none is."""
    recognise: Callable[[Document], bool] | None = None
    """Whether a file is that one, by its keys: `inside`, `each` or `by_id`."""
    name: str = ""
    """What `vlm score` calls it, where that is not the name of the file here."""
    predictions: tuple[Predictions, ...] = ()
    """How the benchmark's own files of results look, where nobody declared these before."""
    order: int = 50
    """Lower is tried first, where a file could be several."""


def inside(key: str, *keys: str) -> Callable[[Document], bool]:
    """The object's list `key` holds objects with these keys."""

    def recognise(document: Document) -> bool:
        found = document.object.values.get(key) if document.object is not None else None
        first = found[0] if isinstance(found, list) and found else None
        return isinstance(first, dict) and first.keys() >= set(keys)

    return recognise


def each(*keys: str) -> Callable[[Document], bool]:
    """The first record has these keys (a single JSONL line is one), and not `id`, which only our own lines have."""
    return lambda document: document.keys.issuperset(keys) and "id" not in document.keys


def by_id(*keys: str) -> Callable[[Document], bool]:
    """An object by id whose first value has these keys."""
    return lambda document: document.object is not None and document.first.keys() >= set(keys)


def without_extension(image: str) -> str:
    """The name of an image file as an id: "val_0001.jpg" -> "val_0001"."""
    return image.rsplit(".", 1)[0]
