"""POPE: `coco_pope_{random,popular,adversarial}.json`, one object per line.

`{"question_id", "image" (COCO_val2014_....jpg), "text", "label" (yes or no)}` (RUCAIBox/POPE, output/coco; big_vision
`datasets/pope`). Question ids count from 1 in each of the three files.

Files: one per kind of question (`random`, `popular`, `adversarial`), or `questions` alone, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from vlm.data.benchmarks.contract import Benchmark, Predictions, each
from vlm.data.items import Item, Shown
from vlm.data.rows import Row
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='POPE: JSONL of {"question_id", "text", "label"}',
    gold="questions",
    recognise=each("question_id", "label"),
    predictions=(
        Predictions(
            name="pope",
            about='POPE and ScienceQA as LLaVA writes them: JSONL of {"question_id", "text"}',
            id="question_id",
            text="text",
            order=5,
        ),
    ),
    order=9,
)


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for split in source.files:
        if split == "images":
            continue
        for row in source.records(split):
            label = row.one_of("label", "yes", "no")
            alone = split == "questions"  # one file, of which only it says what kind it is
            kinds = [row.text(key) for key in ("split", "category") if key in row] if alone else [split]
            yield Item(
                id=row.key("question_id") if alone else f"{split}-{row.key('question_id')}",
                answers=(label,),
                info={**({"split": kinds[0]} if kinds else {}), "label": label},
                show=partial(_show, folder, row),
            )


def _show(folder: Folder, row: Row) -> Shown:
    return Shown(images=(folder / row.text("image"),), fields={"question": row.text("text")})
