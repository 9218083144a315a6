"""What a reader of a benchmark reads from: the files of a split, or one file with gold texts, behind checks."""

from __future__ import annotations

import csv
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vlm.data import strictjson
from vlm.data.items import File
from vlm.data.rows import Document, Row
from vlm.errors import ConfigError, DataError
from vlm.words import shown

_JSON = "expected JSON, or JSONL with one object per line"


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
    """The files of one split of one task, or of a file that is scored, as a reader sees them."""

    task: str
    split: str
    root: Path
    files: Mapping[str, File]
    """Role -> file; which roles there are is up to the loader."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the task's file passes to the loader for this split."""
    opened: Mapping[str, Document] = field(default_factory=dict)
    """Files that somebody has read already, by role."""
    alone: bool = False
    """There is only the file with the gold texts, to score predictions with."""

    def path(self, role: str) -> Path:
        """A file or folder that has to be there. Raises DataError that says what to download, and to where."""
        path = self.place(role)
        if not path.exists():
            raise DataError(f"{self._who}: {self.missing(role)}")
        return path

    def place(self, role: str) -> Path:
        """Where a file or folder lies, or should lie."""
        file = self._file(role)
        there = [self.root / name for name in (file.path, *file.also) if (self.root / name).exists()]
        return there[0] if there else self.root / file.path

    def images(self, role: str = "images") -> Folder:
        """A folder of images; where a file is scored alone, nobody looks into it."""
        return Folder(self.root if self.alone else self.place(role))

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
            raise ConfigError(f"{self._who}: the loader needs the option {name!r}; it has {given}")
        return self.options[name]

    def text(self, role: str) -> str:
        """The file as text."""
        path = self.path(role)
        try:
            return strictjson.decode(strictjson.read_bytes(path))
        except strictjson.NotJSON as error:
            raise DataError(f"{path}: {error}; download the file again") from error

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

    def object(self, role: str) -> Row:
        """The file as one object."""
        if role not in self.opened:
            return read_object(self.path(role), self._file(role).path)
        return self.opened[role].whole

    def records(self, role: str) -> Iterator[Row]:
        """The objects of a JSON list, or of a file with one object per line, one after the other."""
        if role in self.opened:
            yield from self.opened[role].rows
            return
        path, name = self.path(role), self._file(role).path
        content = _content(path, str(path), official=True)
        if content.lstrip()[:1] == "[":
            for number, item in enumerate(_parsed(content, str(path), official=True)):
                yield Row(item, name, "item", number, official=True)
            return
        yield from _lines(content, str(path), lambda number: (name, "line", number), official=True)

    @property
    def _who(self) -> str:
        return "references alone" if self.alone else f"task {self.task!r}, split {self.split!r}"

    def _file(self, role: str) -> File:
        if role not in self.files:
            raise DataError(
                f"{self._who}: the loader needs a file called {role!r}, the task names"
                f" {', '.join(map(repr, self.files)) or 'none'}"
            )
        return self.files[role]


def open_document(path: str | Path) -> Document:
    """Read a file as JSON, or as JSONL where it holds one object per line. Raises DataError."""
    name = str(path)
    content = _content(path, name)
    start = content.lstrip()[:1]
    if start not in ("{", "["):
        what = "is empty" if not start else f"starts with {start!r}"
        raise DataError(f"{name}: {what}; {_JSON}")
    try:
        value = strictjson.parse(content)
    except strictjson.NotJSON as error:
        if not isinstance(error, strictjson.ExtraData) or start != "{":
            raise DataError(f"{name}: {error.in_words()}") from error
        return Document(name, None, list(_lines(content, name, lambda number: (f"{name}:{number}",))))
    if not value:
        raise DataError(f"{name}: holds no item")
    if isinstance(value, list):
        return Document(name, None, [Row(item, f"{name}[{number}]") for number, item in enumerate(value)])
    return Document(name, Row(value, name, line=1), [])


def read_object(path: Path, name: str) -> Row:
    """An official file that is one object; `name` is what errors about its fields call it. Raises DataError."""
    return Row(parse_json(strictjson.read_bytes(path), str(path)), name, official=True)


def _content(path: str | Path, name: str, official: bool = False) -> str:
    data = strictjson.read_bytes(path)
    strictjson.refuse_other_formats(data[: strictjson.HEAD_BYTES], name, expected=_JSON, documents=True)
    try:
        return strictjson.decode(data)
    except strictjson.NotJSON as error:
        raise DataError(f"{name}: {error.in_words()}{_again(official)}") from error


def _lines(content: str, name: str, place: Callable[[int], tuple[Any, ...]], official: bool = False) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines() would cut at U+2028 inside a text
        if line.strip():
            where = f"{name}, line {number}" if official else f"{name}:{number}"
            yield Row(_parsed(line, where, official), *place(number), line=number, official=official)


def parse_json(data: bytes, where: str) -> Any:
    """Strict JSON in UTF-8, of an official file. Raises DataError that begins with `where`."""
    return _parsed(data, where, official=True)


def _parsed(data: str | bytes, where: str, official: bool) -> Any:
    try:
        return strictjson.parse(data)
    except strictjson.NotJSON as error:
        raise DataError(f"{where}: {error.in_words()}{_again(official)}") from error


def _again(official: bool) -> str:
    return "; download the file again" if official else ""


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
