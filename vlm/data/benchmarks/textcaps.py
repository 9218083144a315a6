"""TextCaps: `TextCaps_0.1_val.json`, one entry per caption.

`{"data": [{"image_id", "image_name", "caption_str", ...}]}` (textvqa.org/textcaps; big_vision `datasets/textcaps`); the
captions of one image are brought together. The images of val lie in `train_images`. Captions keep their case here:
caption metrics lower it.

Files: `captions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source

FORMAT = Benchmark(about='TextCaps: {"data": [{"image_id", "caption_str"}]}')


def read(source: Source) -> Iterator[Item]:
    captions: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for row in source.object("captions").rows("data"):
        key = row.key("image_id")
        names.setdefault(key, row.key("image_name"))
        captions.setdefault(key, []).append(row.text("caption_str"))
    folder = source.images()
    for key, texts in captions.items():
        yield Item(id=key, images=(folder / f"{names[key]}.jpg",), references=tuple(texts))
