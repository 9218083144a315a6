"""Captions in COCO's own annotation format: `captions_val2014.json`, and NoCaps, which follows it.

`{"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "id", "caption"}]}`; NoCaps adds `domain`
(in-domain, near-domain, out-domain) to its images. (cocodataset.org, format-data; big_vision `datasets/nocaps`.)

Files: `captions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from vlm.data.benchmarks.contract import Benchmark, Predictions, inside
from vlm.data.items import Item, Shown, once
from vlm.data.rows import Row
from vlm.data.source import Folder, Source
from vlm.errors import DataError

FORMAT = Benchmark(
    about='COCO captions: {"images", "annotations": [{"image_id", "caption"}]}',
    name="coco",
    gold="captions",
    recognise=inside("annotations", "image_id", "caption"),
    predictions=(
        Predictions(
            name="coco",
            about='COCO results: list of {"image_id", "caption"}',
            id="image_id",
            text="caption",
            order=1,
        ),
    ),
    order=1,
)


def read(source: Source) -> Iterator[Item]:
    content = source.object("captions")
    images = content.rows("images") if "images" in content else None
    captions: dict[str, list[str]] = once(((row.key("id"), []) for row in images or ()), content.where)
    for row in content.rows("annotations"):
        image = row.key("image_id")
        if images is not None and image not in captions:
            raise DataError(f"{row.where}: image {image!r} is not among the images of the file")
        captions.setdefault(image, []).append(row.text("caption"))
    if images is None:  # enough to score captions; which file an image is, nobody says
        for key, texts in captions.items():
            yield Item(id=key, references=tuple(texts), show=partial(_unknown, content))
        return
    folder = source.images()
    for row in images:
        key = row.key("id")
        facts = row.facts("domain")
        yield Item(id=key, references=tuple(captions[key]), info=facts, show=partial(_show, folder, row))


def _show(folder: Folder, row: Row) -> Shown:
    return Shown(images=(folder / row.text("file_name"),))


def _unknown(content: Row) -> Shown:
    raise DataError(f"{content.where}: no 'images', so that captions are of no file. Is this the official file?")
