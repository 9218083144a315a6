"""MMMU, its multiple-choice questions: parquet files of the Hugging Face data set, through the `datasets` library.

Columns `id` (validation_Accounting_1), `question` (with `<image 1>` where an image belongs), `options` (a Python list
as text), `answer` (a letter), `question_type` (multiple-choice or open), `image_1` ... `image_7`, `subfield`, ...
(huggingface.co/datasets/lmms-lab/MMMU, all subjects in one; MMMU/MMMU has the same columns per subject). Open questions
are left out.

Files: `data`, the folder with the `validation-*.parquet` files. Options: `pattern`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vlm.errors import ConfigError, DataError

from ..source import Item, Source
from . import choices

_MAX_IMAGES = 7


def read(source: Source) -> Iterator[Item]:
    folder = source.path("data")
    files = sorted(str(path) for path in folder.glob(source.options["pattern"]))
    if not files:
        raise DataError(f"{source.missing('data')} (no {source.options['pattern']} in it)")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"task {source.task!r} reads parquet files with the datasets library: pip install 'vlm-backbone[datasets]'"
        ) from error
    table = datasets.load_dataset("parquet", data_files={"rows": files}, split="rows")
    yield from items(table, str(folder))


def items(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[Item]:
    """The multiple-choice questions among rows with MMMU's columns (images as Pillow images)."""
    for number, row in enumerate(rows):
        if row["question_type"] != "multiple-choice":
            continue
        here = f"{where}, row {number}"
        images = [row.get(f"image_{index}") for index in range(1, _MAX_IMAGES + 1)]
        yield choices.item(
            row["id"],
            row["question"],
            _options(row["options"], here),
            row["answer"],
            tuple(image for image in images if image is not None),
            {"subject": row["id"].split("_", 1)[1].rsplit("_", 1)[0], "subfield": row["subfield"]},
            here,
        )


def _options(text: str, where: str) -> tuple[str, ...]:
    try:
        return tuple(map(str, ast.literal_eval(text)))
    except (SyntaxError, ValueError, TypeError) as error:
        raise DataError(f"{where}: 'options' should be a list written as text, got {text!r}") from error
