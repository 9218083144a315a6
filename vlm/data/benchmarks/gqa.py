"""GQA: `testdev_balanced_questions.json`, an object from question id to question.

`{"ID": {"imageId", "question", "answer", "fullAnswer", "isBalanced", "types": {"structural", "semantic", "detailed"},
"groups", ...}}` (cs.stanford.edu/people/dorarad/gqa; big_vision `datasets/gqa`). Images are `{imageId}.jpg`. `kind` is
what the official `eval.py` reports apart: open for structural type query, else binary.

xGQA has the same questions in further languages, one file each, with English answers (github e-bug/iglue; big_vision
`datasets/xgqa`).

Files: one or more of questions (`questions`, or a language), and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from vlm.data.benchmarks.contract import Benchmark, Predictions, by_id
from vlm.data.items import Item, Shown
from vlm.data.rows import Row
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='GQA questions: {id: {"question", "answer"}}',
    gold="questions",
    recognise=by_id("question", "answer"),
    predictions=(
        Predictions(
            name="gqa",
            about='GQA: list of {"questionId", "prediction"}',
            id="questionId",
            text="prediction",
            order=2,
        ),
    ),
    order=11,
)


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for role in source.files:
        if role == "images":
            continue
        language = {} if role == "questions" else {"language": role}
        questions = source.object(role)
        for key in questions.values:
            row = questions.row(key)
            balanced = row.flag("isBalanced") if "isBalanced" in row else True
            yield Item(
                id="_".join([key, *language.values()]),
                answers=(row.text("answer"),),
                info={**language, **_kinds(row)},
                left_out="" if balanced else "not in GQA's balanced set",
                show=partial(_show, folder, row),
            )


def _show(folder: Folder, row: Row) -> Shown:
    return Shown(images=(folder / f"{row.text('imageId')}.jpg",), fields={"question": row.text("question")})


def _kinds(row: Row) -> dict[str, Any]:
    facts = row.row("types").facts("structural", "semantic") if "types" in row else {}
    if "structural" not in facts:
        return facts
    return {"kind": "open" if facts["structural"] == "query" else "binary", **facts}
