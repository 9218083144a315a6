"""A-OKVQA: `aokvqa_v1p0_val.json`, read for direct answers or for multiple choice.

A list of `{"question_id", "image_id", "question", "choices" (4), "correct_choice_idx", "direct_answers" (10),
"difficult_direct_answer", "rationales"}` (aokvqa.allenai.org; big_vision `datasets/aokvqa`). Images are COCO 2017:
`{image_id:012d}.jpg`. The official script does not score direct answers to questions with `difficult_direct_answer`.

Files: `questions`, and the folder `images`. Options: `mode` (direct or choice), `difficult` (of direct: keep those).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm.data.source import Item, Row, Source, choice_fields
from vlm.errors import DataError


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    direct = source.option("mode") == "direct"
    for row in source.rows("questions"):
        if direct and row.flag("difficult_direct_answer") and not source.option("difficult"):
            continue
        facts = _direct(row) if direct else _choice(row)
        yield Item(id=row.key("question_id"), images=(folder / f"{row.integer('image_id'):012d}.jpg",), **facts)


def _direct(row: Row) -> dict[str, Any]:
    return {"fields": {"question": row.text("question")}, "answers": row.answers("direct_answers")}


def _choice(row: Row) -> dict[str, Any]:
    choices, right = row.texts("choices"), row.integer("correct_choice_idx")
    if not 0 <= right < len(choices):
        raise DataError(f"{row.where}: 'correct_choice_idx' is {right}, but there are {len(choices)} choices")
    return {
        "fields": {"question": row.text("question"), **choice_fields(choices)},
        "answers": (choices[right],),
        "info": {"choices": choices, "answer_index": right},
    }
