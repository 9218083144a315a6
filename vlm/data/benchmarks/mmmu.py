"""MMMU, its multiple-choice questions: parquet files of the Hugging Face data set, through the `datasets` library.

Columns `id` (validation_Accounting_1), `question` (with `<image 1>` where an image belongs), `options` (a Python list
as text), `answer` (a letter), `question_type` (multiple-choice or open), `image_1` ... `image_7`, `subfield`, ...
(huggingface.co/datasets/lmms-lab/MMMU, all subjects in one; MMMU/MMMU has the same columns per subject). Open questions
are left out.

The images are written once, as they are, into the folder `images`.

Files: `data`, the folder with the parquet files, and the folder `images`. Options: `pattern` of the files' names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vlm.data.benchmarks import _parquet
from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item, lettered
from vlm.data.rows import Row
from vlm.data.source import Folder, Source
from vlm.errors import DataError

_IMAGES = tuple(f"image_{number}" for number in range(1, 8))

FORMAT = Benchmark(about="MMMU's Parquet files")


def read(source: Source) -> Iterator[Item]:
    rows = _parquet.rows(
        source.path("data"), source.option("pattern"), _IMAGES, missing=source.missing("data"), task=source.task
    )
    yield from items(rows, source.images(), source.files["data"].path)


def items(rows: Iterable[Mapping[str, Any]], images: Folder, where: str) -> Iterator[Item]:
    """The multiple-choice questions among rows with MMMU's columns (images as `{"bytes": ...}` or None)."""
    for number, values in enumerate(rows):
        row = Row(values, where, "row", number)
        if row.text("question_type") != "multiple-choice":
            continue
        key = row.text("id")
        given = {name: row.values[name] for name in _IMAGES if row.values.get(name)}
        item = Item(
            id=key,
            images=tuple(_parquet.written(image["bytes"], images / f"{key}-{name}") for name, image in given.items()),
            fields={"question": row.text("question")},
            info={"subject": key.split("_", 1)[-1].rsplit("_", 1)[0], "subfield": row.text("subfield")},
        )
        yield lettered(item, _options(row), row.text("answer"), row.where)


def _options(row: Row) -> tuple[str, ...]:
    text = row.text("options")
    try:
        return tuple(map(str, ast.literal_eval(text)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"{row.where}: 'options' should be a list written as text, got {text!r}") from error
