"""A-OKVQA: `aokvqa_v1p0_val.json`, read for direct answers or for multiple choice.

A list of `{"question_id", "image_id", "question", "choices" (4), "correct_choice_idx", "direct_answers" (10),
"difficult_direct_answer", "rationales"}` (aokvqa.allenai.org; big_vision `datasets/aokvqa`). Images are COCO 2017:
`{image_id:012d}.jpg`. The official script does not score direct answers to questions with `difficult_direct_answer`.

Files: `questions`, and the folder `images`. Options: `mode` (direct or choice), `difficult` (of direct: keep those).
Read alone, an item has both: direct answers are its answers, the right choice is its reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from vlm.data.benchmarks.contract import Benchmark, Predictions, each
from vlm.data.items import Item, Shown, choice_fields
from vlm.data.rows import Row
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='A-OKVQA: list of {"question_id", "choices", "correct_choice_idx", "direct_answers"}',
    gold="questions",
    recognise=each("question_id", "choices", "correct_choice_idx", "direct_answers"),
    predictions=(
        Predictions(name="aokvqa_da", about='A-OKVQA: {id: {"direct_answer"}}', text="direct_answer", order=20),
        Predictions(name="aokvqa_mc", about='A-OKVQA: {id: {"multiple_choice"}}', text="multiple_choice", order=20),
    ),
    order=5,
)
_DIFFICULT = "marked difficult_direct_answer"


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    mode = None if source.alone else source.option("mode")
    for row in source.records("questions"):
        if mode == "direct":
            left_out = row.flag("difficult_direct_answer") and not source.option("difficult")
            yield _item(row, folder, left_out, answers=row.answers("direct_answers"))
            continue
        choices = row.texts("choices")
        right = row.index("correct_choice_idx", len(choices))
        choice = {"choices": choices, "answer_index": right}
        if mode == "choice":
            yield _item(row, folder, False, answers=(choices[right],), info=choice)
            continue
        difficult = "difficult_direct_answer" in row and row.flag("difficult_direct_answer")
        both = {"references": (choices[right],), "answers": row.answers("direct_answers")}
        yield _item(row, folder, difficult, info=choice, **both)


def _item(row: Row, folder: Folder, left_out: bool, **facts: Any) -> Item:
    why = _DIFFICULT if left_out else ""
    show = partial(_show, folder, row, facts.get("info", {}).get("choices"))
    return Item(id=row.key("question_id"), left_out=why, left_out_of="answers", show=show, **facts)


def _show(folder: Folder, row: Row, choices: tuple[str, ...] | None) -> Shown:
    return Shown(
        images=(folder / f"{row.integer('image_id'):012d}.jpg",),
        fields={"question": row.text("question"), **(choice_fields(choices) if choices else {})},
    )
