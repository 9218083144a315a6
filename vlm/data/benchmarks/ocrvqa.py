"""OCR-VQA: `dataset.json`, an object from book to its questions.

`{"ID": {"imageURL", "questions": [...], "answers": [...], "title", "authorName", "genre", "split"}}`, where split 1 is
train, 2 validation, 3 test (ocr-vqa.github.io and its `loadDataset.py`; mmpretrain's `OCRVQA`). Images are the ID with
the extension of `imageURL`.

Files: `questions`, and the folder `images`. Options: `split` (the number).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source
from vlm.errors import DataError

FORMAT = Benchmark(about='OCR-VQA: {id: {"questions", "answers", "split"}}')


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    books = source.object("questions")
    for key in books.values:
        row = books.row(key)
        if row.integer("split") != source.option("split"):
            continue
        questions, answers = row.texts("questions"), row.texts("answers")
        if len(questions) != len(answers):
            raise DataError(f"{row.where}: {len(questions)} questions but {len(answers)} answers")
        image = folder / f"{key}{PurePosixPath(row.text('imageURL')).suffix}"
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield Item(id=f"{key}-{number}", images=(image,), fields={"question": question}, answers=(answer,))
