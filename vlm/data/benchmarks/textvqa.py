"""TextVQA: `TextVQA_0.5.1_val.json`.

`{"data": [{"question_id", "image_id", "question", "answers" (10), "image_classes", "set_name", ...}]}` (textvqa.org;
big_vision `datasets/textvqa`). Images are `{image_id}.jpg`; those of val lie in `train_images`. Some OpenImages files
are stored turned; with the file `rotation` (OpenImages' `ImageID`, `Rotation` table, counter-clockwise degrees) those
are turned back, as big_vision does before PaliGemma sees them.

Files: `questions`, the folder `images`, and `rotation` (optional).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.data.benchmarks.contract import Benchmark, inside
from vlm.data.items import Item, Shown
from vlm.data.rows import Row
from vlm.data.source import Folder, Source
from vlm.errors import DataError, ImageError

if TYPE_CHECKING:
    from PIL import Image

FORMAT = Benchmark(
    about='TextVQA, ST-VQA: {"data": [{"question_id", "answers"}]}',
    gold="questions",
    recognise=inside("data", "question_id", "answers"),
    order=3,
)


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    turns = _turns(source.table("rotation", "ImageID", "Rotation")) if source.has("rotation") else {}
    upright: dict[str, Path | Image.Image] = {}
    for row in source.object("questions").rows("data"):
        yield Item(
            id=row.key("question_id"),
            answers=row.answers("answers"),
            info=row.facts("question_type", "answer_type"),
            show=partial(_show, folder, turns, upright, row),
        )


def _show(folder: Folder, turns: dict[str, int], upright: dict[str, Path | Image.Image], row: Row) -> Shown:
    image = row.key("image_id")
    if image not in upright:
        upright[image] = _upright(folder / f"{image}.jpg", turns.get(image, 0))
    return Shown(images=(upright[image],), fields={"question": row.text("question")})


def _turns(table: list[dict[str, str]]) -> dict[str, int]:
    """Image id -> quarter turns, for the images that need any."""
    turns = {}
    for line in table:
        try:
            turns[line["ImageID"]] = int(float(line["Rotation"] or 0) // 90)
        except (ValueError, OverflowError) as error:
            raise DataError(f"image {line['ImageID']}: the rotation {line['Rotation']!r} is no number") from error
    return {image: turn for image, turn in turns.items() if turn}


def _upright(path: Path, turns: int) -> Path | Image.Image:
    if not turns:
        return path
    from vlm.images.load import load_image

    try:
        return load_image(path).rotate(90 * turns, expand=True)
    except ImageError:
        return path  # the harness meets the same error and counts the item as wrong
