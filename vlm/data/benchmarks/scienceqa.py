"""ScienceQA, the questions with an image: `problems.json`, an object from id to problem.

`{"ID": {"question", "choices", "answer" (index), "hint", "image" (image.png or null), "split", "subject", "topic",
"grade", ...}}`; images are `{split}/{ID}/{image}` (github lupantech/ScienceQA; big_vision `datasets/science_qa`). An
empty hint becomes N/A, as in the official prompt.

The gold answer is the letter. `candidates` are the sentences that PaliGemma is trained to say.

Files: `problems`, and the folder `images`. Options: `split`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlm.data.source import LETTERS, Item, Source, choice_fields
from vlm.errors import DataError


def read(source: Source) -> Iterator[Item]:
    split = source.option("split")
    folder = source.images()
    problems = source.object("problems")
    for key in problems.values:
        row = problems.row(key)
        if row.text("split") != split or "image" not in row:
            continue
        choices, right = row.texts("choices"), row.integer("answer")
        if not 0 <= right < len(choices):
            raise DataError(f"{row.where}: 'answer' is {right}, but there are {len(choices)} choices")
        hint = row.text("hint") or "N/A"
        yield Item(
            id=key,
            images=(folder / f"{split}/{key}/{row.text('image')}",),
            fields={"question": row.text("question"), "hint": hint, **choice_fields(choices)},
            answers=(LETTERS[right],),
            info={
                "choices": choices,
                "answer_index": right,
                "candidates": tuple(f"The answer is {letter}." for letter in LETTERS[: len(choices)]),
                "subject": row.text("subject"),
                "grade": row.text("grade"),
            },
        )
