"""VQA v2 and OK-VQA: a file of questions and one of annotations.

Questions `{"questions": [{"question_id", "image_id", "question"}]}`, annotations `{"annotations": [{"question_id",
"question_type", "answer_type", "answers": [{"answer", "answer_confidence", "answer_id"}], "multiple_choice_answer"}]}`
(visualqa.org, and big_vision `datasets/vqa` and `datasets/okvqa`). Images are `COCO_{folder}_{image_id:012d}.jpg`.
OK-VQA's `answers` hold stemmed text in `answer` and the typed one in `raw_answer`; like the official script, `answer`
is compared. Like it too, both files have to hold the same questions.

Files: `questions`, `annotations`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from vlm.data.benchmarks.contract import Benchmark, Predictions, inside
from vlm.data.items import Item, Shown, check_same, once
from vlm.data.rows import Row
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='VQA v2, OK-VQA: {"annotations": [{"question_id", "answers": [{"answer"}]}]}',
    gold="annotations",
    recognise=inside("annotations", "question_id", "answers"),
    predictions=(
        Predictions(
            name="vqa",
            about='VQA results, also TextVQA, ST-VQA, POPE: list or JSONL of {"question_id", "answer"}',
            id="question_id",
            text="answer",
            order=4,
        ),
    ),
    order=2,
)


def read(source: Source) -> Iterator[Item]:
    annotations = source.object("annotations")
    rows = annotations.rows("annotations")
    if not source.has("questions"):
        yield from map(_item, rows)
        return
    gold = once(((row.key("question_id"), row) for row in rows), annotations.where)
    questions = source.object("questions")
    asked = once(((row.key("question_id"), row) for row in questions.rows("questions")), questions.where)
    check_same(asked, gold, questions.where)
    folder = source.images()
    for key, row in asked.items():
        yield _item(gold[key], partial(_show, folder, row))


def _item(row: Row, show: Callable[[], Shown] | None = None) -> Item:
    return Item(
        id=row.key("question_id"),
        answers=tuple(answer.text("answer") for answer in row.some_rows("answers")),
        info=row.facts("question_type", "answer_type"),
        show=show,
    )


def _show(folder: Folder, row: Row) -> Shown:
    image = folder / f"COCO_{folder.path.name}_{row.integer('image_id'):012d}.jpg"
    return Shown(images=(image,), fields={"question": row.text("question")})
