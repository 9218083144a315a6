"""Andrej Karpathy's splits of COCO and Flickr30k: `dataset_coco.json`, `dataset_flickr30k.json`.

`{"images": [{"filename", "filepath" (COCO only: train2014 or val2014), "split" (train, restval, val, test), "imgid",
"cocoid" (COCO only), "sentences": [{"raw": ...}]}], "dataset": ...}`, from `caption_datasets.zip`. References are the
`raw` sentences. Read the same way by BLIP-2 and others; `filepath` and `cocoid` as big_vision `datasets/coco35l` does.

Files: `captions`, and the folder `images`. Options: `split`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source

FORMAT = Benchmark(about='Karpathy: {"images": [{"split", "sentences": [{"raw"}]}]}')


def read(source: Source) -> Iterator[Item]:
    split = source.option("split")
    folder = source.images()
    for row in source.object("captions").rows("images"):
        if row.text("split") != split:
            continue
        below = f"{row.text('filepath')}/" if "filepath" in row else ""
        yield Item(
            id=row.key("cocoid" if "cocoid" in row else "imgid"),
            images=(folder / f"{below}{row.text('filename')}",),
            references=tuple(sentence.text("raw") for sentence in row.rows("sentences")),
        )
