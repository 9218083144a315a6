"""One JSON object of a file, every access checked; and a file of such objects.

An official file that lacks a field, or holds another type there, is refused with the file, the place and the field;
nothing is skipped in silence, because what is skipped would change a figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm.errors import DataError

_NO_GOLD = "is an empty list: there is nothing to compare an answer with. Is this a file of a hidden test split?"
_NO_TEXT = "is an empty list, so that nothing could be right; give at least one text, or leave the item out"


class Row:
    """One JSON object; every getter raises DataError with the place.

    Args:
        values: the object.
        parent: what it lies in: the file's name, or another row.
        step: where in there, for errors.
        line: the line in a JSONL file, from 1; 0 elsewhere.
        official: it comes from a benchmark's file where its makers put it, so advice is to get that file.
    """

    __slots__ = ("_parent", "_step", "line", "official", "values")

    def __init__(self, values: Any, parent: str | Row, *step: object, line: int = 0, official: bool = False) -> None:
        self._parent = parent
        self._step = step
        self.line = line
        self.official: bool = official or (isinstance(parent, Row) and parent.official)
        if not isinstance(values, dict):
            raise DataError(f"{self.where} should be an object with keys, got {in_json(values)}")
        self.values: dict[str, Any] = values

    @property
    def where(self) -> str:
        """The file and the place in it. Made on demand: files have millions of places."""
        parent = self._parent if isinstance(self._parent, str) else self._parent.where
        return f"{parent}, {' '.join(map(str, self._step))}" if self._step else parent

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            hint = ". Is this the official file?" if self.official else ""
            raise DataError(f"{self.where}: no {key!r}; it has {', '.join(map(repr, self.values)) or 'no keys'}{hint}")
        return self.values[key]

    def text(self, key: str) -> str:
        value = self[key]
        if isinstance(value, str):
            return value
        hint = "; write an empty text for no answer" if value is None and not self.official else ""
        raise DataError(f"{self.where}: {key!r} should be text, got {in_json(value)}{hint}")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of text, maybe empty."""
        value = self._of_type(key, list, "a list of text")
        for place, item in enumerate(value):
            if not isinstance(item, str):
                raise DataError(f"{self.where}: {key!r} {place} should be text, got {in_json(item)}")
        return tuple(value)

    def answers(self, key: str = "answers") -> tuple[str, ...]:
        """A list of gold texts with at least one."""
        return self.texts(key) or self._no_gold(key)

    def key(self, key: str) -> str:
        """An id: text, or a whole number as text."""
        value = self[key]
        if type(value) is int or (isinstance(value, str) and value.strip()):
            return str(value)
        raise DataError(f"{self.where}: {key!r} should be a text or a whole number, got {in_json(value)}")

    def integer(self, key: str) -> int:
        """A whole number, or one written as text (some official files quote them)."""
        value = self[key]
        if isinstance(value, str) and len(value) < 20 and value.removeprefix("-").isdecimal():
            return int(value)
        return self._of_type(key, int, "a whole number")

    def index(self, key: str, size: int) -> int:
        """A whole number from 0 to size - 1."""
        found = self.integer(key)
        if not 0 <= found < size:
            raise DataError(f"{self.where}: {key!r} should be a whole number from 0 to {size - 1}, got {found}")
        return found

    def flag(self, key: str) -> bool:
        """A truth value; 0 and 1 count (TallyQA writes booleans, VizWiz numbers)."""
        value = self[key]
        if value in (0, 1):
            return bool(value)
        raise DataError(f"{self.where}: {key!r} should be true, false, 0 or 1, got {in_json(value)}")

    def one_of(self, key: str, *known: str) -> str:
        """A text that is one of these."""
        value = self.text(key)
        if value not in known:
            raise DataError(f"{self.where}: {key!r} should be {' or '.join(known)}, got {value!r}")
        return value

    def box(self, key: str) -> tuple[float, ...]:
        """Four numbers."""
        value = self._of_type(key, list, "a list of four numbers")
        if len(value) != 4 or not all(type(number) in (int, float) for number in value):
            raise DataError(f"{self.where}: {key!r} should be a list of four numbers, got {in_json(value)}")
        return tuple(float(number) for number in value)

    def facts(self, *names: str) -> dict[str, str]:
        """Those of these keys that are there, as text for breakdowns; a list of kinds as "form, layout"."""
        return {name: self._joined(name) for name in names if name in self}

    def row(self, key: str) -> Row:
        return Row(self[key], self, repr(key))

    def rows(self, key: str) -> list[Row]:
        """A list of objects."""
        value = self._of_type(key, list, "a list of objects")
        name = repr(key)
        return [Row(item, self, name, index) for index, item in enumerate(value)]

    def some_rows(self, key: str) -> list[Row]:
        """A list of objects with at least one: gold answers."""
        return self.rows(key) or self._no_gold(key)

    def _joined(self, key: str) -> str:
        value = self[key]
        return ", ".join(sorted(self.texts(key))) or "none" if isinstance(value, list) else str(value or "none")

    def _no_gold(self, key: str) -> Any:
        raise DataError(f"{self.where}: {key!r} {_NO_GOLD if self.official else _NO_TEXT}")

    def _of_type(self, key: str, kind: type, expected: str) -> Any:
        value = self[key]
        if type(value) is not kind:
            raise DataError(f"{self.where}: {key!r} should be {expected}, got {in_json(value)}")
        return value


def in_json(value: Any) -> str:
    """A JSON value in an error message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


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
    def first(self) -> Mapping[str, Any]:
        """The first value of the object, or the first record, where that is an object; else empty."""
        values = self.records[0].values if self.object is None else next(iter(self.object.values.values()))
        return values if isinstance(values, dict) else {}

    @property
    def whole(self) -> Row:
        """The object. Raises DataError where the file is none."""
        if self.object is None:
            raise DataError(f"{self.name}: a list or JSONL; this format is one object")
        return self.object

    @property
    def rows(self) -> list[Row]:
        """The records; a single JSONL line is one too."""
        return self.records or [self.whole]
