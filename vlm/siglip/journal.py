"""The lines of `rows.jsonl`: which row is what, and what became of it.

    {"row": 0, "id": "a.jpg", "source": "photos", "stamp": ..., "image": {"path": ...}, "text": ..., "info": {...}}
    {"about": "a.jpg", "source": ..., "image": ..., "info": ...}    the same picture, other things known of it
    {"drop": ["a.jpg", ...]}                                        no longer part of the collection
    {"bad": "b.jpg", "stamp": ..., "code": ..., "message": ...}     looked at in its turn, could not be read

A row whose id comes again is dead from then on, and so is one that was dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.errors import DataError

Record = dict[str, Any]
KNOWN = ("source", "image", "text", "info")
"""What may change while the vector stays."""


@dataclass
class Rows:
    """What the lines say.

    Attributes:
        count: rows that were ever written.
        records: row -> its record.
        living: id -> row.
        bad: id -> record of what could not be read, and has no newer row.
    """

    count: int = 0
    records: dict[int, Record] = field(default_factory=dict)
    living: dict[str, int] = field(default_factory=dict)
    bad: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]], path: Path) -> Rows:
        """Read lines in order. Raises DataError for one that cannot follow those before it."""
        rows = cls()
        for number, line in enumerate(lines, 1):
            if not rows.take(dict(line)):
                raise DataError(
                    f"{path}:{number}: this line does not follow from those before it (row {rows.count} comes next);"
                    " lines were changed or lost, so that vectors would get other ids; embed into another folder"
                )
        return rows

    @property
    def places(self) -> list[int]:
        """The living rows, in order."""
        return sorted(self.living.values())

    def take(self, line: Record) -> bool:
        """Count one more line; False where it cannot be."""
        if "row" in line:
            if line["row"] != self.count or not isinstance(line.get("id"), str):
                return False
            self._bury(line["id"])
            self.bad.pop(line["id"], None)
            self.records[self.count] = line
            self.living[line["id"]] = self.count
            self.count += 1
        elif "about" in line and line["about"] in self.living:
            record = self.records[self.living[line["about"]]]
            kept = {key: value for key, value in record.items() if key not in KNOWN}
            self.records[record["row"]] = {**kept, **{key: line[key] for key in KNOWN if key in line}}
        elif "drop" in line and isinstance(line["drop"], list):
            for name in line["drop"]:
                self._bury(name)
                self.bad.pop(name, None)
        elif isinstance(line.get("bad"), str):
            self.bad[line["bad"]] = line
        else:
            return False
        return True

    def record(self, name: str) -> Record | None:
        """The record of a living row by its id."""
        row = self.living.get(name)
        return None if row is None else self.records[row]

    def _bury(self, name: str) -> None:
        row = self.living.pop(name, None)
        if row is not None:
            self.records.pop(row)
