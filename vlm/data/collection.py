"""What people give a command to work through: files, folders, JSONL, tar shards, a list on stdin.

    photo.jpg         one picture; its id is the path as it was given
    photos/           every picture below, in the order of the names; ids are paths, `photos/2024/a.jpg`
    pictures.jsonl    one object a line: `image` (or `images`), `id`, other keys are metadata; paths lie below the
                      file's folder, or below the image root, and never lead outside
    shard-0.tar       WebDataset's layout (`vlm.data.tars`); ids are `shard-0.tar/000123.jpg`, or the `id` of the JSON
    -                 stdin: one path a line, or one JSON object a line

Every entry has an id of its own: the `id` of the source, else its path. What cannot be used (a line that is no JSON, a
file that is not there, an id that came before) is given as a `Problem` in its place, so that whoever works through a
collection tells it and goes on. Pictures are not decoded here.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm.data import checks, folders, strictjson, tars
from vlm.data.formats import jsonl
from vlm.data.problems import Problem, Refused
from vlm.errors import DataError
from vlm.images.load import SUFFIXES, FilePart
from vlm.words import shown

STDIN = "-"
_JSONL = (".jsonl", ".ndjson", ".json")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing of a collection: a picture (or several that belong together), a text, what is known of it.

    Attributes:
        id: unique in the collection.
        source: what it was found in, as it was given.
        images: what `vlm.load_image` reads; not looked at yet.
        texts: the texts of the column that was asked for.
        info: every other key that the source has for it.
    """

    id: str
    source: str
    images: tuple[Path | FilePart, ...] = ()
    texts: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Path | FilePart | None:
        """The first picture; None where there is none."""
        return self.images[0] if self.images else None

    @property
    def text(self) -> str | None:
        """The first text; None where there is none."""
        return self.texts[0] if self.texts else None

    def stamp(self) -> str:
        """What changes when the entry does: the texts' digest, else size and time of change of the pictures' files.

        Not the content of the files: looking after a million pictures should not read all of them. A file that was
        written again with the same bytes counts as changed, which costs one more picture and no error; one whose bytes
        change while size and time (to the nanosecond) stay has been forged. For a member of a shard its place counts
        too, and the shard's size and time.
        """
        if self.texts:
            return hashlib.sha256("\0".join(self.texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return ";".join(map(_stamp, self.images))


def entries_of(
    sources: Sequence[str], *, image_root: str | Path | None = None, text: str | None = None, split: bool = True
) -> Iterator[Entry | Problem]:
    """Everything that the sources hold, in order; each id once.

    Args:
        sources: as people write them; see above.
        image_root: folder of the images that JSON lines name; None: the file's own folder, for stdin the working one.
        text: entries are texts: those of this column of JSON lines, or of this member (`txt`) or JSON key of a shard.
            Pictures beside them are kept where they are there.
        split: of several pictures (or texts) of one line each is an entry, `id#1`, `id#2`; else they stay together.
    """
    homes: dict[str, Place] = {}
    for entry, place in _placed(sources, image_root, text):
        if isinstance(entry, Problem):
            yield entry
            continue
        for one in _apart(entry) if split else (entry,):
            if one.id in homes:
                home = ":".join(str(part) for part in homes[one.id] if part)
                said = f"id {one.id!r} is that of {home} already; give each its own, or each source once"
                yield Problem(*place, "duplicate-id", said)
                continue
            homes[one.id] = place
            yield one


def lines_of(path: str) -> Iterator[Entry | Problem]:
    """Texts from a file (or stdin, `-`), one a line; ids are `file:line`. Blank lines are left out.

    Raises:
        DataError: the file cannot be read.
    """
    name = "stdin" if path == STDIN else shown(path)
    data = sys.stdin.buffer.read() if path == STDIN else strictjson.read_bytes(path)
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                text = strictjson.decode(line).rstrip("\r")
            except strictjson.NotJSON as error:
                yield Problem(name, number, error.code, str(error))
                continue
            yield Entry(f"{name}:{number}", path, texts=(text,))


def gathered(found: Iterable[Entry | Problem]) -> tuple[list[Entry], list[Problem]]:
    """A collection as a whole: what can be used, and what cannot."""
    entries: list[Entry] = []
    problems: list[Problem] = []
    for one in found:
        if isinstance(one, Problem):
            problems.append(one)
        else:
            entries.append(one)
    return entries, problems


Place = tuple[str, int]
"""Where an entry was found: a file and its line; line 0 is the file itself."""
_Placed = tuple[Entry | Problem, Place]


def _placed(sources: Sequence[str], image_root: str | Path | None, text: str | None) -> Iterator[_Placed]:
    for source in sources:
        if source == STDIN:
            yield from _stdin(image_root, text)
        elif os.path.isdir(source):
            yield from _folder(plain(source), text)
        else:
            yield from _file(plain(source), image_root, text)


def plain(path: str) -> str:
    """A source as entries name it: no `./`, no doubled slashes, so that two spellings are one. `..` stays: links."""
    return path if ".." in path.split(os.sep) else os.path.normpath(path)


def _folder(folder: str, text: str | None) -> Iterator[_Placed]:
    found = 0
    if text is not None:
        yield _no_column(folder, "a folder of pictures", text)
        return
    for path in folders.pictures(folder):
        found += 1
        if isinstance(path, Problem):
            yield path, (path.file, 0)
        else:
            yield Entry(path, folder, (Path(path),)), (shown(path), 0)
    if not found:
        said = "no picture below this folder; JSONL files and tar shards in it are given by name"
        yield Problem(shown(folder), 0, "no-images", said), (folder, 0)


def _file(path: str, image_root: str | Path | None, text: str | None) -> Iterator[_Placed]:
    lower = path.lower()
    start = folders.head(path)
    if lower.endswith(_PACKED):
        said = "a compressed archive, in which no member can be found without reading all; unpack it to a plain .tar"
        yield Problem(shown(path), 0, "unsupported-format", said), (path, 0)
    elif lower.endswith(".tar") or tars.is_tar(start):
        yield from _shard(path, text)
    elif lower.endswith(_JSONL) or start.lstrip()[:1] == b"{":
        yield from _lines(path, image_root, text)
    elif text is not None:
        yield _no_column(path, "a picture", text)
    elif not os.path.lexists(path):
        yield Problem(shown(path), 0, "missing", "no such file or folder"), (path, 0)
    else:
        yield Entry(path, path, (Path(path),)), (shown(path), 0)


def _no_column(path: str, what: str, text: str) -> _Placed:
    said = f"{what} has no column {text!r}; texts come from JSONL, from tar shards, or from a file of lines"
    return Problem(shown(path), 0, "no-text", said), (path, 0)


def _lines(path: str, image_root: str | Path | None, text: str | None) -> Iterator[_Placed]:
    name = shown(path)
    try:
        reader = _Lines(path, os.path.dirname(path) or "." if image_root is None else image_root, text)
        for number, record in jsonl.records(Path(path), name):
            yield reader.entry(record, number), (name, number)
    except DataError as error:
        yield Problem(name, 0, "unreadable", str(error).removeprefix(f"{name}: ")), (name, 0)


def _stdin(image_root: str | Path | None, text: str | None) -> Iterator[_Placed]:
    """Paths and JSON lines may be mixed; a path is what it is on the command line, a single picture."""
    reader = _Lines(STDIN, "." if image_root is None else image_root, text)
    for number, line in enumerate(sys.stdin.buffer, 1):
        where = ("stdin", number)
        if not line.strip():
            continue
        if line.lstrip().startswith(b"{"):
            try:
                yield reader.entry(jsonl.parse(line, number), number), where
            except Refused as refused:
                yield Problem("stdin", number, refused.code, str(refused)), where
            continue
        path = plain(os.fsdecode(line.rstrip(b"\r\n")))
        yield (_no_column(path, "a path", text)[0] if text else Entry(path, STDIN, (Path(path),))), where


class _Lines:
    """JSON lines as entries."""

    def __init__(self, source: str, root: str | Path, text: str | None) -> None:
        self._source, self._text = source, text
        self._name = "stdin" if source == STDIN else shown(source)
        self._root = str(root)
        self._images = checks.ImageRoot(root)

    def entry(self, record: dict[str, Any] | Refused, number: int) -> Entry | Problem:
        """The entry of a line, or why there is none."""
        try:
            if isinstance(record, Refused):
                raise record
            return self._made(record, number)
        except Refused as refused:
            return Problem(self._name, number, refused.code, str(refused))

    def _made(self, record: dict[str, Any], number: int) -> Entry:
        named = checks.named_images(record)
        keys = ("id", "image", "images")
        info = {key: value for key, value in record.items() if key not in keys}
        if self._text is None:
            if not named:
                held = ", ".join(map(repr, record)) or "no keys"
                raise Refused("missing-key", f"neither 'image' nor 'images' names a picture; the line has {held}")
            found = tuple(map(self._images.find, named))
            own = plain(os.path.join(self._root, named[0]))
            return Entry(checks.record_id(record.get("id"), own), self._source, found, (), info)
        texts = _texts(info, self._text)
        own = f"{self._name}:{number}"
        return Entry(checks.record_id(record.get("id"), own), self._source, self._there(named), texts, info)

    def _there(self, named: Sequence[str]) -> tuple[Path, ...]:
        """The pictures beside a text, where they are there: the text does not need them."""
        try:
            return tuple(map(self._images.find, named))
        except Refused:
            return ()


def _shard(path: str, text: str | None) -> Iterator[_Placed]:
    for sample in tars.samples(path):
        if isinstance(sample, Problem):
            yield sample, (path, 0)
            continue
        where = (f"{path}/{sample.key}", 0)
        info = dict(sample.values)
        try:
            own = checks.record_id(info.pop("id", None), f"{path}/{sample.name}")
            if text is None and not sample.images:
                raise Refused("missing-key", f"no picture among the members; known: {' '.join(sorted(SUFFIXES))}")
            texts = () if text is None else _texts(info, text)
            yield Entry(own, path, tuple(sample.images), texts, info), where
        except Refused as refused:
            yield Problem(*where, refused.code, str(refused)), where


def _texts(info: dict[str, Any], column: str) -> tuple[str, ...]:
    """The text or the texts of a column, which is taken out of `info`. Raises Refused."""
    if info.get(column) is None:
        raise Refused("missing-key", f"no {column!r}; there are {', '.join(map(repr, info)) or 'no other keys'}")
    value = info.pop(column)
    if isinstance(value, list):
        return tuple(checks.checked_text(item, f"{column}[{index}]") for index, item in enumerate(value))
    return (checks.checked_text(value, column),)


def _apart(entry: Entry) -> Iterator[Entry]:
    """One entry for each text; or, where none were asked for, for each picture."""
    parts = entry.texts or entry.images
    if len(parts) <= 1:
        yield entry
        return
    for number, part in enumerate(parts, 1):
        found: dict[str, Any] = {"texts": (part,)} if entry.texts else {"images": (part,)}
        yield replace(entry, id=f"{entry.id}#{number}", **found)


def _stamp(image: Path | FilePart) -> str:
    """Size and time of change of a picture's file, and its place in there; "" for one that is not there."""
    path = image.path if isinstance(image, FilePart) else image
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return ""
    place = f"@{image.offset}+{image.size}" if isinstance(image, FilePart) else ""
    return f"{state.st_size}-{state.st_mtime_ns}{place}"
