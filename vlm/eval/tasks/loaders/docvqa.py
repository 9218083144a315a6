"""DocVQA and InfographicVQA: the RRC's `val_v1.0_withQT.json`, `infographicsVQA_val_v1.0_withQT.json`.

`{"data": [{"questionId", "question", "answers", "image" (DocVQA: documents/NAME.png) or "image_local_name" (InfoVQA),
"question_types" or "answer_type", ...}]}` (rrc.cvc.uab.es, ch=17; big_vision `datasets/docvqa`, `datasets/infovqa`).
Only the file name of `image` is used: the releases differ in the folder. InfoVQA's multi-span answers are compared in
the order given; big_vision's val figures accept every order.

Files: `questions`, and the folder `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from ..source import Item, Source


def read(source: Source) -> Iterator[Item]:
    folder = source.place("images")
    for row in source.object("questions").rows("data"):
        image = row.text("image_local_name" if "image_local_name" in row else "image")
        kinds = next((row.texts(key) for key in ("question_types", "answer_type") if key in row), ())
        yield Item(
            id=row.key("questionId"),
            images=(folder / PurePosixPath(image).name,),
            fields={"question": row.text("question")},
            answers=row.texts("answers"),
            info={"question_type": ", ".join(sorted(kinds)) or "none"},
        )
