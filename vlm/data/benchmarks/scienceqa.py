"""ScienceQA, the questions with an image: `problems.json`, an object from id to problem.

`{"ID": {"question", "choices", "answer" (index), "hint", "image" (image.png or null), "split", "subject", "topic",
"grade", ...}}`; images are `{split}/{ID}/{image}` (github lupantech/ScienceQA; big_vision `datasets/science_qa`). An
empty hint becomes N/A, as in the official prompt.

The gold answer is the letter. `candidates` are the sentences that PaliGemma is trained to say.

Files: `problems`, and the folder `images`. Options: `split`. Read alone, the problems are those of every split, with or
without an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from vlm.data.benchmarks.contract import Benchmark, Predictions, by_id
from vlm.data.items import LETTERS, Item, Shown, choice_fields
from vlm.data.rows import Row
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='ScienceQA problems.json: {id: {"choices", "answer"}}',
    gold="problems",
    recognise=by_id("choices", "answer"),
    predictions=(
        Predictions(
            name="scienceqa",
            about='ScienceQA results: {"outputs": {id: text}}',
            inside="outputs",
            order=8,
        ),
    ),
    order=10,
)


def read(source: Source) -> Iterator[Item]:
    problems = source.object("problems")
    folder = source.images()
    split = None if source.alone else source.option("split")
    for key in problems.values:
        row = problems.row(key)
        if split is None:
            yield _item(key, row, folder, row.facts("split"))
        elif row.text("split") == split and "image" in row:
            yield _item(key, row, folder, {})


def _item(key: str, row: Row, folder: Folder, facts: dict[str, str]) -> Item:
    choices = row.texts("choices")
    right = row.index("answer", len(choices))
    return Item(
        id=key,
        answers=(LETTERS[right],),
        info={
            "choices": choices,
            "answer_index": right,
            "candidates": tuple(f"The answer is {letter}." for letter in LETTERS[: len(choices)]),
            **row.facts("subject", "grade"),
            **facts,
        },
        show=partial(_show, folder, key, row, choices),
    )


def _show(folder: Folder, key: str, row: Row, choices: tuple[str, ...]) -> Shown:
    return Shown(
        images=(folder / f"{row.text('split')}/{key}/{row.text('image')}",),
        fields={"question": row.text("question"), "hint": row.text("hint") or "N/A", **choice_fields(choices)},
    )
