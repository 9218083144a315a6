"""Prediction files of the benchmarks, read strictly: JSON or JSONL, the format told from the keys.

A file is never read generously. An id that occurs twice, a prediction that is no text, a record with other keys than
its neighbours: each is refused with its place, because what is skipped here would silently change a figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm import words
from vlm.data import strictjson
from vlm.errors import ConfigError, DataError, nearest

MAX_LISTED = 10


@dataclass(frozen=True)
class Row:
    """One JSON object of a file, with its place for messages; every getter raises DataError."""

    values: Mapping[str, Any]
    where: str
    line: int = 0
    """The line in a JSONL file, from 1; 0 elsewhere."""

    def text(self, key: str) -> str:
        return text(self._get(key), f"{self.where}: {key!r}")

    def texts(self, key: str) -> tuple[str, ...]:
        return texts(self._get(key), f"{self.where}: {key!r}")

    def id(self, key: str) -> str:
        return identifier(self._get(key), f"{self.where}: {key!r}")

    def index(self, key: str, size: int) -> int:
        """A whole number from 0 to size - 1."""
        value = self._get(key)
        if isinstance(value, str) and len(value) < 20 and value.removeprefix("-").isdecimal():
            value = int(value)  # some official files quote them
        if type(value) is not int or not 0 <= value < size:
            raise DataError(f"{self.where}: {key!r} should be a whole number from 0 to {size - 1}, got {value!r}")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if value not in (0, 1):
            raise DataError(f"{self.where}: {key!r} should be true, false, 0 or 1, got {value!r}")
        return bool(value)

    def one_of(self, key: str, *known: str) -> str:
        """A text that is one of these."""
        value = self.text(key)
        if value not in known:
            raise DataError(f"{self.where}: {key!r} should be {' or '.join(known)}, got {value!r}")
        return value

    def row(self, key: str) -> Row:
        return row(self._get(key), f"{self.where}: {key!r}")

    def rows(self, key: str) -> list[Row]:
        return rows(self._get(key), f"{self.where}: {key!r}")

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise DataError(f"{self.where}: no {key!r}; it has {', '.join(map(repr, self.values)) or 'no keys'}")
        return self.values[key]


def text(value: Any, where: str) -> str:
    """A text, else DataError."""
    if not isinstance(value, str):
        hint = "; write an empty text for no answer" if value is None else ""
        raise DataError(f"{where} should be text, got {json.dumps(value)[:80]}{hint}")
    return value


def texts(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts with at least one, else DataError."""
    if value == []:
        raise DataError(
            f"{where} is an empty list, so that nothing could be right; give at least one text, or leave the item out"
        )
    if not isinstance(value, list):
        raise DataError(f"{where} should be a list of text, got {json.dumps(value)[:80]}")
    return tuple(text(item, f"{where}[{number}]") for number, item in enumerate(value))


def identifier(value: Any, where: str) -> str:
    """A text or a whole number as text, else DataError."""
    if type(value) is int or (isinstance(value, str) and value.strip()):
        return str(value)
    raise DataError(f"{where} should be a text or a whole number, got {json.dumps(value)[:80]}")


def row(value: Any, where: str) -> Row:
    """A JSON object, else DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{where} should be an object with keys, got {json.dumps(value)[:80]}")
    return Row(value, where)


def rows(value: Any, where: str) -> list[Row]:
    """A list of JSON objects, else DataError."""
    if not isinstance(value, list):
        raise DataError(f"{where} should be a list, got {json.dumps(value)[:80]}")
    return [row(item, f"{where}[{number}]") for number, item in enumerate(value)]


def once(pairs: Iterator[tuple[str, Any]], name: str) -> dict[str, Any]:
    """Pairs of id and value as a dict. Raises DataError that lists the ids that occur more than once."""
    found: dict[str, Any] = {}
    twice: dict[str, None] = {}
    for key, value in pairs:
        if key in found:
            twice[key] = None
        found[key] = value
    if twice:
        raise DataError(
            f"{name}: {len(twice)} ids occur more than once: {listed(list(twice))}; one of each can be meant"
        )
    if not found:
        raise DataError(f"{name}: holds no item")
    return found


def without_extension(image: str) -> str:
    """The name of an image file as an id: "val_0001.jpg" -> "val_0001"."""
    return image.rsplit(".", 1)[0]


def listed(ids: list[str]) -> str:
    """The first ids, quoted, and how many follow."""
    return words.listed(ids, MAX_LISTED, show=repr)


# --- Bytes to JSON ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A file: either one JSON object, or records (a JSON list, or JSONL)."""

    name: str
    object: Row | None
    records: list[Row]

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the object, or of the first record: they tell the format; a later record without one is refused."""
        return frozenset((self.records[0] if self.object is None else self.object).values)

    @property
    def first(self) -> Row | None:
        """The first value of the object, or the first record, where that is an object."""
        if self.object is None:
            return self.records[0]
        values = next(iter(self.object.values.values()))
        return Row(values, self.name) if isinstance(values, dict) else None


def open_document(path: str | Path) -> Document:
    """Read a file as JSON, or as JSONL where it holds one object per line. Raises DataError."""
    name = str(path)
    content = _decode(path, name)
    start = content.lstrip()[:1]
    if start not in ("{", "["):
        what = "is empty" if not start else f"starts with {start!r}"
        raise DataError(f"{name}: {what}; expected JSON, or JSONL with one object per line")
    try:
        value = strictjson.parse(content)
    except strictjson.NotJSON as error:
        if not isinstance(error, strictjson.ExtraData) or start != "{":
            raise DataError(f"{name}: {error.in_words()}") from error
        return Document(name, None, list(_lines(content, name)))
    if isinstance(value, list):
        value = rows(value, name)
    if not value:
        raise DataError(f"{name}: holds no item")
    return Document(name, None, value) if isinstance(value, list) else Document(name, Row(value, name, 1), [])


def _decode(path: str | Path, name: str) -> str:
    data = strictjson.read_bytes(path)
    strictjson.refuse_other_formats(
        data[: strictjson.HEAD_BYTES], name, expected="expected JSON, or JSONL with one object per line", documents=True
    )
    try:
        return strictjson.decode(data)
    except strictjson.NotJSON as error:
        raise DataError(f"{name}: {error.in_words()}") from error


def _lines(content: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines() would cut at U+2028 inside a text
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            value = strictjson.parse(line)
        except strictjson.NotJSON as error:
            raise DataError(f"{where}: {error.in_words()}") from error
        yield Row(row(value, where).values, where, number)


# --- Predictions ------------------------------------------------------------------------------------------------------

# name -> (key of the id, key of the text), for a JSON list or JSONL; tried in this order
RECORD_KEYS = {
    "jsonl": ("id", "prediction"),
    "coco": ("image_id", "caption"),
    "gqa": ("questionId", "prediction"),
    "rrc": ("questionId", "answer"),
    "vqa": ("question_id", "answer"),
    "pope": ("question_id", "text"),
    "nlvr2": ("identifier", "prediction"),
    "vizwiz": ("image", "answer"),
}
PREDICTION_FORMATS = {
    "jsonl": 'JSONL or list of {"id", "prediction"}, such as predictions.jsonl of vlm eval',
    "coco": 'COCO results: list of {"image_id", "caption"}',
    "gqa": 'GQA: list of {"questionId", "prediction"}',
    "rrc": 'DocVQA, InfographicVQA: list of {"questionId", "answer"}',
    "vqa": 'VQA results, also TextVQA, ST-VQA, POPE: list or JSONL of {"question_id", "answer"}',
    "pope": 'POPE and ScienceQA as LLaVA writes them: JSONL of {"question_id", "text"}',
    "nlvr2": 'NLVR2: list or JSONL of {"identifier", "prediction"}',
    "vizwiz": 'VizWiz: list of {"image", "answer"}',
    "scienceqa": 'ScienceQA results: {"outputs": {id: text}}',
    "aokvqa_da": 'A-OKVQA: {id: {"direct_answer"}}',
    "aokvqa_mc": 'A-OKVQA: {id: {"multiple_choice"}}',
    "mapping": "{id: text}",
}


def read_predictions(path: str | Path, format: str | None = None) -> tuple[dict[str, str], str]:
    """Predictions by id, and the name of the format, told from the content unless `format` is one of
    `PREDICTION_FORMATS`.

    Raises:
        ConfigError: unknown format.
        DataError: the file cannot be read as such, or an id occurs twice (listed).
    """
    if format is not None and format not in PREDICTION_FORMATS:
        raise ConfigError(
            f"unknown format of predictions {format!r}{nearest(format, PREDICTION_FORMATS)}; known: "
            f"{', '.join(PREDICTION_FORMATS)}"
        )
    document = open_document(path)
    found = format or _detect(document)
    return once(_predictions(document, found), document.name), found


def _detect(document: Document) -> str:
    by_keys = next((name for name, keys in RECORD_KEYS.items() if document.keys.issuperset(keys)), None)
    if by_keys is not None:
        return by_keys
    if document.object is not None:
        values = document.object.values
        if isinstance(values.get("outputs"), dict):
            return "scienceqa"
        if all(isinstance(value, str) for value in values.values()):
            return "mapping"
        first = document.first
        both = {"direct_answer", "multiple_choice"} & set(first.values if first else ())
        if len(both) == 1:
            return {"direct_answer": "aokvqa_da", "multiple_choice": "aokvqa_mc"}[both.pop()]
        if both:
            raise DataError(
                f"{document.name}: holds direct_answer and multiple_choice; name one with --predictions-format "
                "aokvqa_da or aokvqa_mc"
            )
    raise DataError(
        f"{document.name}: predictions of no known format; the keys are {', '.join(sorted(document.keys)[:MAX_LISTED])}"
        f". Known: {'; '.join(f'{name}: {about}' for name, about in PREDICTION_FORMATS.items())}"
    )


def _predictions(document: Document, format: str) -> Iterator[tuple[str, str]]:
    if format in RECORD_KEYS:
        key, answer = RECORD_KEYS[format]
        # One JSONL line is one JSON object.
        for record in document.records or [document.object or Row({}, document.name)]:
            said = record.text(answer)
            yield (without_extension(record.text(key)) if format == "vizwiz" else record.id(key)), said
        return
    if document.object is None:
        raise DataError(f"{document.name}: a list; predictions of format {format} are one object by id")
    source = document.object.row("outputs") if format == "scienceqa" else document.object
    for key in source.values:
        if format.startswith("aokvqa"):
            yield key, source.row(key).text("direct_answer" if format == "aokvqa_da" else "multiple_choice")
        else:
            yield key, source.text(key)
