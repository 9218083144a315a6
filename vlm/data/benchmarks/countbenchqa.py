"""CountBenchQA: CountBench's parquet file on Hugging Face, and PaliGemma's questions about it.

Columns `image` (some are gone), `text`, `image_url`, `number`; the questions are a list of `{"question"}` with one
entry for each row, images that are gone included (big_vision `datasets/countbenchqa`). As there, an image with one
channel only is left out, so that 490 items remain. The images are written once, as they are, into the folder `images`.

Files: `data`, the folder with the parquet file, `questions`, and the folder `images`. Options: `pattern`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlm.data.benchmarks import _parquet
from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.rows import Row
from vlm.data.source import Folder, Source
from vlm.errors import DataError

FORMAT = Benchmark(about='CountBench\'s Parquet file, and a list of {"question"}')


def read(source: Source) -> Iterator[Item]:
    questions = list(source.records("questions"))
    rows = _parquet.rows(
        source.path("data"), source.option("pattern"), ["image"], missing=source.missing("data"), task=source.task
    )
    yield from items(rows, questions, source.images(), source.files["data"].path)


def items(rows: Iterable[Mapping[str, Any]], questions: Sequence[Row], folder: Folder, where: str) -> Iterator[Item]:
    """The questions about images that are there."""
    from PIL import Image, UnidentifiedImageError  # scoring does without Pillow

    table = list(rows)
    if len(table) != len(questions):
        raise DataError(f"{where}: {len(table)} rows, but there are {len(questions)} questions")
    for number, (row, question) in enumerate(zip(table, questions, strict=True)):
        image = row.get("image")
        if not image or not image["bytes"]:
            continue
        path = _parquet.written(image["bytes"], folder / str(number))
        try:
            with Image.open(path) as opened:
                grey = len(opened.getbands()) == 1
        except UnidentifiedImageError:
            grey = False  # the harness names it and counts it as wrong
        if not grey:
            number_of_things = str(Row(row, where, "row", number).integer("number"))
            yield Item(
                id=str(number),
                images=(path,),
                fields={"question": question.text("question")},
                answers=(number_of_things,),
                info={"number": number_of_things},
            )
