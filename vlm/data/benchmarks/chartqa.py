"""ChartQA: `test/test_human.json` and `test/test_augmented.json`, lists of `{"imgname", "query", "label"}`.

Images are `test/png/{imgname}` (github vis-nlp/ChartQA; big_vision `datasets/chartqa`). Items have no ids; theirs here
are the part and the position.

Files: one per part (`human`, `augmented`), and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source

FORMAT = Benchmark(about='ChartQA: lists of {"imgname", "query", "label"}, one per part')


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for part in source.files:
        if part == "images":
            continue
        for number, row in enumerate(source.records(part)):
            yield Item(
                id=f"{part}-{number}",
                images=(folder / row.text("imgname"),),
                fields={"question": row.text("query")},
                answers=(row.key("label"),),
                info={"split": part},
            )
