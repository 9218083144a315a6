"""VizWiz-VQA: `val.json`.

A list of `{"image", "question", "answers": [{"answer", "answer_confidence"}] (10), "answer_type", "answerable" (0 or
1)}` (vizwiz.org; big_vision `datasets/vizwizvqa`). The image names the item: each has one question.

Files: `questions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.source import Item, Source


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.rows("questions"):
        image = row.text("image")
        yield Item(
            id=image.rsplit(".", 1)[0],
            images=(folder / image,),
            fields={"question": row.text("question")},
            answers=tuple(answer.text("answer") for answer in row.some_rows("answers")),
            info={"answer_type": row.text("answer_type"), "answerable": row.flag("answerable")},
        )
