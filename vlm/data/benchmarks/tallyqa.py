"""TallyQA: `test.json`.

A list of `{"answer", "data_source", "image" (VG_100K/... or VG_100K_2/...), "image_id", "issimple", "question",
"question_id"}` (github manoja328/TallyQA_dataset; big_vision `datasets/tallyqa`). `image` is a path below the folder
`images`, where Visual Genome's VG_100K and VG_100K_2 are unpacked.

Files: `questions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from vlm.data.benchmarks.contract import Benchmark, each
from vlm.data.items import Item, Shown
from vlm.data.rows import Row
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='TallyQA: list of {"image_id", "question_id", "answer", "issimple"}; the id is image_id-question_id',
    gold="questions",
    recognise=each("question_id", "answer", "issimple"),
    order=7,
)


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.records("questions"):
        yield Item(
            id=f"{row.key('image_id')}-{row.key('question_id')}",
            answers=(str(row.integer("answer")),),
            info={"split": "simple" if row.flag("issimple") else "complex"},
            show=partial(_show, folder, row),
        )


def _show(folder: Folder, row: Row) -> Shown:
    return Shown(images=(folder / row.text("image"),), fields={"question": row.text("question")})
