"""TextVQA: `TextVQA_0.5.1_val.json`.

`{"data": [{"question_id", "image_id", "question", "answers" (10), "image_classes", "set_name", ...}]}` (textvqa.org;
big_vision `datasets/textvqa`). Images are `{image_id}.jpg`; those of val lie in `train_images`. Some OpenImages files
are stored turned; with the file `rotation` (OpenImages' `ImageID`, `Rotation` table, counter-clockwise degrees) those
are turned back, as big_vision does before PaliGemma sees them.

Files: `questions`, the folder `images`, and `rotation` (optional).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vlm.data.source import Item, Source
from vlm.errors import DataError, ImageError
from vlm.images.load import load_image


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    turns = _turns(source.table("rotation", "ImageID", "Rotation")) if source.has("rotation") else {}
    upright: dict[str, Path | Image.Image] = {}
    for row in source.object("questions").rows("data"):
        image = row.key("image_id")
        if image not in upright:
            upright[image] = _upright(folder / f"{image}.jpg", turns.get(image, 0))
        yield Item(
            id=row.key("question_id"),
            images=(upright[image],),
            fields={"question": row.text("question")},
            answers=row.answers("answers"),
        )


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
    try:
        return load_image(path).rotate(90 * turns, expand=True)
    except ImageError:
        return path  # the harness meets the same error and counts the item as wrong
