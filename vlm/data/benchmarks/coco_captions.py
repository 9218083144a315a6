"""Captions in COCO's own annotation format: `captions_val2014.json`, and NoCaps, which follows it.

`{"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "id", "caption"}]}`; NoCaps adds `domain`
(in-domain, near-domain, out-domain) to its images. (cocodataset.org, format-data; big_vision `datasets/nocaps`.)

Files: `captions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.source import Item, Source
from vlm.errors import DataError


def read(source: Source) -> Iterator[Item]:
    content = source.object("captions")
    captions: dict[str, list[str]] = {row.key("id"): [] for row in content.rows("images")}
    for row in content.rows("annotations"):
        image = row.key("image_id")
        if image not in captions:
            raise DataError(f"{row.where}: image {image} is not among the images of the file")
        captions[image].append(row.text("caption"))
    folder = source.images()
    for row in content.rows("images"):
        key = row.key("id")
        if not captions[key]:
            raise DataError(f"{row.where}: image {key} has no caption; is this a file of the hidden test split?")
        yield Item(
            id=key,
            images=(folder / row.text("file_name"),),
            references=tuple(captions[key]),
            info={"domain": row.text("domain")} if "domain" in row else {},
        )
