"""Crossmodal-3600: `captions.jsonl`, one image per line with captions in 36 languages.

`{"image/key": "0001eeaf4aed83f9", "en": {"caption": [...], "caption/tokenized": [...], ...}, "de": {...}, ...}`; the
image is `{key}.jpg` (google.github.io/crossmodal-3600; big_vision `datasets/xm3600`, which reads `caption` too).

Files: `captions`, and the folder `images`. Options: `languages`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source

FORMAT = Benchmark(about='Crossmodal-3600: JSONL of {"image/key", language: {"caption"}}')


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    rows = list(source.records("captions"))
    for language in source.option("languages"):
        for row in rows:
            key = row.text("image/key")
            yield Item(
                id=f"{key}_{language}",
                images=(folder / f"{key}.jpg",),
                fields={"language": language},
                references=row.row(language).answers("caption"),
                info={"language": language},
            )
