"""What a loader reads from and what it makes: official files behind checks, and `Item`s.

An official file that lacks a field, or holds another type there, is refused with the file, the item and the field
named; nothing is skipped in silence.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from vlm.data import strictjson
from vlm.errors import ConfigError, DataError
from vlm.images.load import shown

_NO_GOLD = "is an empty list: there is nothing to compare an answer with. Is this a file of a hidden test split?"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class File:
    """One file or folder that a split needs."""

    path: str
    """Where it has to lie, below the data root."""
    url: str = ""
    """Where it comes from: the file itself, the archive that holds it, or the page with the download."""
    also: tuple[str, ...] = ()
    """Other paths under which releases have had it; the first that is there is taken."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item as an official file has it, before the prompt is made."""

    id: str
    images: tuple[Path | Image.Image, ...]
    """The image, or several that the prompt is about, in order; none where it is about text alone."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the prompt template may name: question, choices, language, ..."""
    suffix: str | None = None
    references: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    """What metrics and breakdowns read; see `Example.info`."""


def choice_fields(choices: Sequence[str]) -> dict[str, str]:
    """Two spellings of the choices for prompts.

    `choices` joins the texts with blank, tab, blank (PaliGemma's A-OKVQA and AI2D); `lettered_choices` is
    "(A) red, (B) blue" (ScienceQA's, and PaliGemma's for it).
    """
    lettered = ", ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return {"choices": " \t ".join(choices), "lettered_choices": lettered}


class Row:
    """One JSON object of an official file; every access is checked.

    Args:
        values: the object.
        parent: what it lies in: the file's name, or another row.
        step: where in there, for errors.
    """

    __slots__ = ("_parent", "_step", "values")

    def __init__(self, values: Any, parent: str | Row, *step: object) -> None:
        self._parent = parent
        self._step = step
        if not isinstance(values, dict):
            raise DataError(f"{self.where}: expected an object with keys, got {_shown(values)}")
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
            raise DataError(
                f"{self.where}: no {key!r}; the object has {', '.join(map(repr, self.values)) or 'no keys'}. Is this"
                f" the official file?"
            )
        return self.values[key]

    def text(self, key: str) -> str:
        return self._of_type(key, str, "text")

    def integer(self, key: str) -> int:
        """A whole number, or one written as text (some official files quote them)."""
        value = self[key]
        if isinstance(value, str) and len(value) < 20 and value.removeprefix("-").isdecimal():
            return int(value)
        return self._of_type(key, int, "a whole number")

    def flag(self, key: str) -> bool:
        """A truth value; 0 and 1 count (TallyQA writes booleans, VizWiz numbers)."""
        value = self[key]
        if value in (0, 1):
            return bool(value)
        raise DataError(f"{self.where}: {key!r} should be true or false, got {_shown(value)}")

    def key(self, key: str) -> str:
        """An id: text, or a whole number as text."""
        value = self[key]
        if type(value) is int or (isinstance(value, str) and value.strip()):
            return str(value)
        raise DataError(f"{self.where}: {key!r} should be text or a whole number, got {_shown(value)}")

    def answers(self, key: str = "answers") -> tuple[str, ...]:
        """A list of gold texts with at least one."""
        found = self.texts(key)
        if not found:
            raise DataError(f"{self.where}: {key!r} {_NO_GOLD}")
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._of_type(key, list, "a list of text")
        if not all(isinstance(item, str) for item in value):
            raise DataError(f"{self.where}: {key!r} should be a list of text, got {_shown(value)}")
        return tuple(value)

    def box(self, key: str) -> tuple[float, ...]:
        """Four numbers."""
        value = self._of_type(key, list, "a list of four numbers")
        if len(value) != 4 or not all(type(number) in (int, float) for number in value):
            raise DataError(f"{self.where}: {key!r} should be a list of four numbers, got {_shown(value)}")
        return tuple(float(number) for number in value)

    def row(self, key: str) -> Row:
        return Row(self[key], self, repr(key))

    def rows(self, key: str) -> list[Row]:
        """A list of objects."""
        value = self._of_type(key, list, "a list of objects")
        name = repr(key)
        return [Row(item, self, name, index) for index, item in enumerate(value)]

    def some_rows(self, key: str) -> list[Row]:
        """A list of objects with at least one: gold answers."""
        found = self.rows(key)
        if not found:
            raise DataError(f"{self.where}: {key!r} {_NO_GOLD}")
        return found

    def _of_type(self, key: str, kind: type, expected: str) -> Any:
        value = self[key]
        if type(value) is not kind:
            raise DataError(f"{self.where}: {key!r} should be {expected}, got {_shown(value)}")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


@dataclass(frozen=True)
class Folder:
    """A folder of images: `folder / name` is a path below it, whatever an annotation file gives as a name.

    The folder itself may be a symbolic link; one inside it that leads out of it is refused.
    """

    path: Path
    _checked: dict[str, Path] = field(default_factory=dict, repr=False, compare=False)
    """Names that were looked at before: question sets name the same image many times."""

    def __truediv__(self, name: str) -> Path:
        if name not in self._checked:
            self._checked[name] = self._check(name)
        return self._checked[name]

    def _check(self, name: str) -> Path:
        relative = PurePosixPath(name)
        if not name or relative.is_absolute() or ".." in relative.parts:
            raise DataError(f"image {name!r} does not lie below {self.path}; is this the official file?")
        path = self.path / relative
        try:
            root, real = os.path.realpath(self.path), os.path.realpath(path)
        except (OSError, ValueError) as error:
            raise DataError(f"image {shown(name)} below {self.path}: no file can have this name ({error})") from error
        if os.path.commonpath([root, real]) != root:
            raise DataError(
                f"image {shown(name)}: a symbolic link leads out of {self.path}, to {shown(real)}; copy what it leads"
                f" to, or make {self.path} itself the link"
            )
        try:
            os.stat(path)
        except FileNotFoundError:
            pass  # counted, and told with what to download
        except (OSError, ValueError) as error:  # a name of thousands of characters
            raise DataError(f"image {shown(name)} below {self.path} cannot be opened: {error}") from error
        return path


@dataclass(frozen=True)
class Source:
    """The files of one split of one task, as a loader sees them."""

    task: str
    split: str
    root: Path
    files: Mapping[str, File]
    """Role -> file; which roles there are is up to the loader."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the task's file passes to the loader for this split."""

    def path(self, role: str) -> Path:
        """A file or folder that has to be there. Raises DataError that says what to download, and to where."""
        path = self.place(role)
        if not path.exists():
            raise DataError(f"task {self.task!r}, split {self.split!r}: {self.missing(role)}")
        return path

    def place(self, role: str) -> Path:
        """Where a file or folder lies, or should lie."""
        file = self._file(role)
        there = [self.root / name for name in (file.path, *file.also) if (self.root / name).exists()]
        return there[0] if there else self.root / file.path

    def images(self, role: str = "images") -> Folder:
        return Folder(self.place(role))

    def missing(self, role: str) -> str:
        """What to do about a file that is not there."""
        file = self._file(role)
        source = f"; download {file.url} and put it there (archives: unpacked)" if file.url else ""
        return f"{self.root / file.path} is missing{source}"

    def has(self, role: str) -> bool:
        return role in self.files

    def option(self, name: str) -> Any:
        """A value that the split has to give. Raises ConfigError."""
        if name not in self.options:
            given = ", ".join(map(repr, self.options)) or "none"
            raise ConfigError(
                f"task {self.task!r}, split {self.split!r}: the loader needs the option {name!r}; it has {given}"
            )
        return self.options[name]

    def text(self, role: str) -> str:
        """The file as text."""
        path = self.path(role)
        return _decode(read_file(path), str(path))

    def table(self, role: str, *columns: str) -> list[dict[str, str]]:
        """The file as CSV with a first line of column names, among them `columns`."""
        try:
            reader = csv.DictReader(io.StringIO(self.text(role), newline=""))
            if not set(columns) <= set(reader.fieldnames or ()):
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise DataError(f"{self.place(role)}: expected the columns {' and '.join(columns)}, got {found}")
            rows = list(reader)
        except csv.Error as error:
            raise DataError(f"{self.place(role)}: not a table of comma-separated values ({error})") from error
        for number, row in enumerate(rows, 2):
            for column in columns:
                if row[column] is None:
                    raise DataError(f"{self.place(role)}, row {number}: no {column}; the row is cut off")
        return rows

    def json(self, role: str) -> Any:
        path = self.path(role)
        return parse_json(read_file(path), str(path))

    def object(self, role: str) -> Row:
        """The file as one object."""
        return Row(self.json(role), self.files[role].path)

    def rows(self, role: str) -> list[Row]:
        """The file as a list of objects."""
        name = self.files[role].path
        value = self.json(role)
        if not isinstance(value, list):
            raise DataError(f"{name}: expected a list at the top, got {_shown(value)}. Is this the official file?")
        return [Row(item, name, "item", index) for index, item in enumerate(value)]

    def lines(self, role: str) -> Iterator[Row]:
        """The file as one object per line."""
        path = self.path(role)
        name = self.files[role].path
        for number, line in enumerate(read_file(path).split(b"\n"), 1):
            if line.strip():
                yield Row(parse_json(line, f"{path}, line {number}"), name, "line", number)

    def _file(self, role: str) -> File:
        if role not in self.files:
            raise DataError(
                f"task {self.task!r}, split {self.split!r}: the loader needs a file called {role!r}, the task names"
                f" {', '.join(map(repr, self.files)) or 'none'}"
            )
        return self.files[role]


def read_file(path: Path, max_bytes: int | None = None) -> bytes:
    """A file of bounded size (`strictjson.MAX_DOCUMENT_BYTES`). Raises DataError."""
    return strictjson.read_bytes(path, max_bytes)


def _decode(data: bytes, where: str) -> str:
    try:
        return strictjson.decode(data)
    except strictjson.NotJSON as error:
        raise DataError(f"{where}: {error}; download the file again") from error


def parse_json(data: bytes, where: str) -> Any:
    """Strict JSON in UTF-8. Raises DataError that begins with `where`."""
    try:
        return strictjson.parse(data)
    except strictjson.NotJSON as error:
        raise DataError(f"{where}: {error.in_words()}; download the file again") from error


def read_member(archive: zipfile.ZipFile, name: str, path: Path, max_bytes: int) -> bytes:
    """One file of an archive, of bounded size: what its directory says of the size is not relied upon.

    Raises:
        DataError: it is not in the archive, damaged, locked or too large.
    """
    try:
        with archive.open(name) as member:
            data = member.read(max_bytes + 1)
    except KeyError as error:
        raise DataError(f"{path}: no {name} in it; is this the official archive?") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path}: {name} is damaged ({error}); download the archive again") from error
    except (RuntimeError, NotImplementedError) as error:  # a password, or a compression that Python does not have
        raise DataError(f"{path}: {name} cannot be unpacked ({error})") from error
    except MemoryError as error:
        raise DataError(f"{path}: {name} does not fit into the memory") from error
    if len(data) > max_bytes:
        raise DataError(f"{path}: {name} has more than {max_bytes:,} bytes; is this the official archive?")
    return data
