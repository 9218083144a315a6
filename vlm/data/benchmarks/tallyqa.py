"""TallyQA: `test.json`.

A list of `{"answer", "data_source", "image" (VG_100K/... or VG_100K_2/...), "image_id", "issimple", "question",
"question_id"}` (github manoja328/TallyQA_dataset; big_vision `datasets/tallyqa`). `image` is a path below the folder
`images`, where Visual Genome's VG_100K and VG_100K_2 are unpacked.

Files: `questions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.source import Item, Source


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.rows("questions"):
        yield Item(
            id=f"{row.key('image_id')}-{row.key('question_id')}",
            images=(folder / row.text("image"),),
            fields={"question": row.text("question")},
            answers=(str(row.integer("answer")),),
            info={"split": "simple" if row.flag("issimple") else "complex"},
        )
