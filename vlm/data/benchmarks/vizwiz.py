"""VizWiz-VQA: `val.json`.

A list of `{"image", "question", "answers": [{"answer", "answer_confidence"}] (10), "answer_type", "answerable" (0 or
1)}` (vizwiz.org; big_vision `datasets/vizwizvqa`). The image names the item: each has one question.

Files: `questions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from vlm.data.benchmarks.contract import Benchmark, Predictions, each, without_extension
from vlm.data.items import Item, Shown
from vlm.data.rows import Row
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='VizWiz: list of {"image", "question", "answers": [{"answer"}]}',
    gold="questions",
    recognise=each("image", "question", "answers"),
    predictions=(
        Predictions(
            name="vizwiz", about='VizWiz: list of {"image", "answer"}', id="image", text="answer", images=True, order=7
        ),
    ),
    order=6,
)


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.records("questions"):
        answerable = {"answerable": row.flag("answerable")} if "answerable" in row else {}
        yield Item(
            id=without_extension(row.text("image")),
            answers=tuple(answer.text("answer") for answer in row.some_rows("answers")),
            info={**row.facts("answer_type"), **answerable},
            show=partial(_show, folder, row),
        )


def _show(folder: Folder, row: Row) -> Shown:
    return Shown(images=(folder / row.text("image"),), fields={"question": row.text("question")})
