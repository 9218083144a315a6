"""VQA v2 and OK-VQA: a file of questions and one of annotations.

Questions `{"questions": [{"question_id", "image_id", "question"}]}`, annotations `{"annotations": [{"question_id",
"question_type", "answer_type", "answers": [{"answer", "answer_confidence", "answer_id"}], "multiple_choice_answer"}]}`
(visualqa.org, and big_vision `datasets/vqa` and `datasets/okvqa`). Images are `COCO_{folder}_{image_id:012d}.jpg`.
OK-VQA's `answers` hold stemmed text in `answer` and the typed one in `raw_answer`; like the official script, `answer`
is compared.

Files: `questions`, `annotations`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.source import Item, Row, Source
from vlm.errors import DataError


def read(source: Source) -> Iterator[Item]:
    annotations: dict[str, Row] = {}
    for row in source.object("annotations").rows("annotations"):
        key = row.key("question_id")
        if key in annotations:
            raise DataError(f"{row.where}: question {key} is annotated twice; only one of the two can be meant")
        annotations[key] = row
    folder = source.images()
    for row in source.object("questions").rows("questions"):
        key = row.key("question_id")
        if key not in annotations:
            raise DataError(f"{row.where}: question {key} is not in {source.files['annotations'].path}")
        facts = annotations[key]
        yield Item(
            id=key,
            images=(folder / f"COCO_{folder.path.name}_{row.integer('image_id'):012d}.jpg",),
            fields={"question": row.text("question")},
            answers=tuple(answer.text("answer") for answer in facts.some_rows("answers")),
            info={name: facts.text(name) for name in ("question_type", "answer_type") if name in facts},
        )
