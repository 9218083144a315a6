"""DocVQA and InfographicVQA: the RRC's `val_v1.0_withQT.json`, `infographicsVQA_val_v1.0_withQT.json`.

`{"data": [{"questionId", "question", "answers", "image" (DocVQA: documents/NAME.png) or "image_local_name" (InfoVQA),
"question_types" or "answer_type", ...}]}` (rrc.cvc.uab.es, ch=17; big_vision `datasets/docvqa`, `datasets/infovqa`).
Only the file name of `image` is used: the releases differ in the folder. The parts of a multi-span answer of InfoVQA
("a, b") are compared in the order given; with the option `any_order` every order is an answer, as in big_vision's data.

Files: `questions`, and the folder `images`. Options: `any_order`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import permutations
from pathlib import PurePosixPath

from vlm.data.benchmarks.contract import Benchmark, Predictions, inside
from vlm.data.items import Item, Shown
from vlm.data.rows import Row
from vlm.data.source import Folder, Source

FORMAT = Benchmark(
    about='DocVQA, InfographicVQA: {"data": [{"questionId", "answers"}]}',
    name="rrc",
    gold="questions",
    recognise=inside("data", "questionId", "answers"),
    predictions=(
        Predictions(
            name="rrc",
            about='DocVQA, InfographicVQA: list of {"questionId", "answer"}',
            id="questionId",
            text="answer",
            order=3,
        ),
    ),
    order=4,
)


def read(source: Source) -> Iterator[Item]:
    folder = source.images()
    for row in source.object("questions").rows("data"):
        answers = row.answers("answers")
        kinds = row.facts("question_types", "answer_type")
        yield Item(
            id=row.key("questionId"),
            answers=_orders(answers) if source.options.get("any_order", False) else answers,
            info={"question_type": next(iter(kinds.values()), "none"), **row.facts("answer_type")},
            show=partial(_show, folder, row),
        )


def _show(folder: Folder, row: Row) -> Shown:
    image = row.text("image_local_name" if "image_local_name" in row else "image")
    return Shown(images=(folder / PurePosixPath(image).name,), fields={"question": row.text("question")})


def _orders(answers: tuple[str, ...]) -> tuple[str, ...]:
    """Each answer in every order of its parts, once: "a, b" -> "a, b", "b, a"."""
    return tuple(dict.fromkeys(", ".join(order) for text in answers for order in permutations(text.split(", "))))
