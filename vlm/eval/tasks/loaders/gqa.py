"""GQA: `testdev_balanced_questions.json`, an object from question id to question.

`{"ID": {"imageId", "question", "answer", "fullAnswer", "isBalanced", "types": {"structural", "semantic", "detailed"},
"groups", ...}}` (cs.stanford.edu/people/dorarad/gqa; big_vision `datasets/gqa`). Images are `{imageId}.jpg`. `kind` is
what the official `eval.py` reports apart: open for structural type query, else binary.

Files: `questions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..source import Item, Source


def read(source: Source) -> Iterator[Item]:
    folder = source.place("images")
    questions = source.object("questions")
    for key in questions.values:
        row = questions.row(key)
        types = row.row("types")
        structural = types.text("structural")
        yield Item(
            id=key,
            images=(folder / f"{row.text('imageId')}.jpg",),
            fields={"question": row.text("question")},
            answers=(row.text("answer"),),
            info={
                "kind": "open" if structural == "query" else "binary",
                "structural": structural,
                "semantic": types.text("semantic"),
            },
        )
