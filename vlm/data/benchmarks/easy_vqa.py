"""easy-VQA by Victor Zhou (MIT licence): the archive of the repository's `data` folder.

`data/{train,test}/questions.json` is a list of [question, answer, image id], images are `data/{split}/images/{id}.png`
(github vzhou842/easy-VQA). The archive is read as it is; its images are 64 x 64, so all of them fit in memory.

Files: `archive`. Options: `split`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source, parse_json, read_member
from vlm.data.strictjson import MAX_MEMBER_BYTES
from vlm.errors import DataError, ImageError

if TYPE_CHECKING:
    from PIL import Image

_COLOURS = frozenset("black blue brown gray green red teal yellow".split())

FORMAT = Benchmark(about="the archive of easy-VQA's data folder")


def read(source: Source) -> Iterator[Item]:
    path, split = source.path("archive"), source.option("split")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not a zip archive ({error})") from error
    with archive:
        listing = f"data/{split}/questions.json"
        questions = parse_json(read_member(archive, listing, path, MAX_MEMBER_BYTES), f"{path}, {listing}")
        images: dict[int, Image.Image] = {}
        if not isinstance(questions, list):
            raise DataError(f"{path}, {listing}: expected a list at the top; is this the easy-VQA archive?")
        for number, entry in enumerate(questions):
            question, answer, image = _checked(entry, f"{path}, {listing}, item {number}")
            if image not in images:
                images[image] = _decode(archive, f"data/{split}/images/{image}.png", path)
            yield Item(
                id=f"{split}-{number}",
                images=(images[image],),
                fields={"question": question},
                references=(answer,),
                info={"kind": kind(answer)},
            )


def kind(answer: str) -> str:
    """Kind of a question, by its answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "colour" if answer in _COLOURS else "shape"


def _checked(entry: object, where: str) -> tuple[str, str, int]:
    if isinstance(entry, list) and [type(value) for value in entry] == [str, str, int]:
        return entry[0], entry[1], entry[2]
    raise DataError(f"{where}: expected [question, answer, image id], got {entry!r}")


def _decode(archive: zipfile.ZipFile, name: str, path: Path) -> Image.Image:
    from vlm.images.load import DEFAULT_LIMITS, load_image

    try:
        return load_image(read_member(archive, name, path, DEFAULT_LIMITS.max_bytes))
    except ImageError as error:
        raise DataError(f"{path}: {name}: {error}") from error
