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
from typing import Any

from vlm.data.source import Item, Row, Source


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for role in source.files:
        if role == "images":
            continue
        language = {} if role == "questions" else {"language": role}
        questions = source.object(role)
        for key in questions.values:
            row = questions.row(key)
            if "isBalanced" in row and not row.flag("isBalanced"):
                continue  # the official script scores the balanced set only
            yield Item(
                id="_".join([key, *language.values()]),
                images=(folder / f"{row.text('imageId')}.jpg",),
                fields={"question": row.text("question")},
                answers=(row.text("answer"),),
                info={**language, **_kinds(row)},
            )


def _kinds(row: Row) -> dict[str, Any]:
    if "types" not in row:
        return {}
    types = row.row("types")
    structural = types.text("structural")
    return {
        "kind": "open" if structural == "query" else "binary",
        "structural": structural,
        "semantic": types.text("semantic"),
    }
