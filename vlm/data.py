"""Annotations: one JSON object per line, checked as a whole before anything is trained or scored.

    {"image": "images/0001.jpg", "prefix": "caption en", "suffix": "a red car"}
    {"image": "images/0002.jpg", "prefix": "answer en what colour?", "answers": ["red", "red", "dark red"], "id": "q7"}

    image       path below the image root (the file's own folder by default); nothing else is ever opened, no URLs
    prefix      what the model is asked; may be empty
    suffix      what the model should say: the training target
    references  captions that an evaluation compares with (a list of text)
    answers     answers of different people to the same question (a list of text)
    id          text or a whole number, unique in the file; the line number by default

Other keys are kept in `Example.info`, unless they look like a misspelt one of these. Probes of a vision tower read
`{"image": ..., "label": ...}` instead.
"""

import difflib
import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from vlm.errors import DataError
from vlm.images import shown

MAX_LINE_BYTES = 2**20
MAX_LISTED = 1000
"""How many problems an error message lists; it always says how many there are."""
KEYS = ("id", "image", "prefix", "suffix", "references", "answers")
LABELLED_KEYS = ("id", "image", "label")


@dataclass(frozen=True)
class Example:
    """One annotation that passed every check; the image has not been decoded yet."""

    id: str
    image: Path | Image.Image
    prefix: str
    suffix: str | None
    references: tuple[str, ...]
    answers: tuple[str, ...]
    file: str
    line: int
    more_images: tuple[Path | Image.Image, ...] = ()
    """Images that follow `image`, where a prompt is about several."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else is known of the item and metrics or breakdowns read: choices, question type, language, ... From an
    annotation file: its other keys, as they are."""


@dataclass(frozen=True)
class Labelled:
    """An image of a known class; it has not been decoded yet."""

    id: str
    image: Path | Image.Image
    label: str


_T = TypeVar("_T", Example, Labelled)


@dataclass(frozen=True)
class Problem:
    """Why one line of an annotation file cannot be used."""

    file: str
    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}: {self.message}"


class _Refused(Exception):
    """A line that cannot be used: carries the code and the message of its `Problem`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_jsonl(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    require: Sequence[str] = ("suffix",),
    skip_bad: bool = False,
) -> tuple[list[Example], list[Problem]]:
    """All examples of an annotation file, in order, and the problems of the lines that were skipped.

    Args:
        path: the JSONL file (UTF-8).
        image_root: folder that holds the images. No image outside it is accepted, symbolic links included.
        require: which of `suffix`, `references` and `answers` every line must have; `image` and `prefix` always.
        skip_bad: skip unusable lines and return their problems, instead of refusing the file.

    Raises:
        DataError: the file itself is unusable, or (without `skip_bad`) lines are: all of them are listed with file,
            line and code, not only the first.
    """
    unknown = set(require) - {"suffix", "references", "answers"}
    assert not unknown, unknown
    return _read(path, image_root, skip_bad, functools.partial(_example, require=require))


def read_labelled(path: str | Path, image_root: str | Path | None = None) -> list[Labelled]:
    """Images with a class each, `{"image": ..., "label": ...}` per line (and `id` if wanted), in order.

    Raises:
        DataError: as `read_jsonl` without `skip_bad`: every unusable line is listed.
    """
    return _read(path, image_root, False, _labelled)[0]


def _read(
    path: str | Path, image_root: str | Path | None, skip_bad: bool, make: Callable[[bytes, int, str, "_ImageRoot"], _T]
) -> tuple[list[_T], list[Problem]]:
    """What `make(line, number, file, images)` makes of every line, and why it could not."""
    name = shown(path)
    images = _ImageRoot(Path(path).parent if image_root is None else image_root)
    made: list[_T] = []
    problems: list[Problem] = []
    lines_by_id: dict[str, int] = {}
    for number, line in _lines(path, name):
        try:
            item = make(line, number, name, images)
            if item.id in lines_by_id:
                raise _Refused("duplicate-id", f"id {item.id!r} is that of line {lines_by_id[item.id]} already")
        except _Refused as refused:
            problems.append(Problem(name, number, refused.code, str(refused)))
            continue
        lines_by_id[item.id] = number
        made.append(item)
    if problems and (not skip_bad or not made):
        raise DataError(_listing(problems, name, len(made)))
    if not made:
        raise DataError(f"{name}: no annotation in the file; expected one JSON object per line")
    return made, problems


def _listing(problems: list[Problem], name: str, num_good: int) -> str:
    """One problem as one line; several under a line that counts them."""
    if len(problems) == 1 and num_good:
        return str(problems[0])
    total = len(problems) + num_good
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    head = f"{name}: {len(problems)} of {total} annotations cannot be used:"
    return "\n".join([head, *map(str, problems[:MAX_LISTED]), *more])


# --- from bytes to JSON objects


def _lines(path: str | Path, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1.

    Split at b"\\n" only: `str.splitlines` would cut records at U+2028 and others that are legal inside JSON text.
    """
    try:
        # O_NONBLOCK: a FIFO must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise DataError(f"{name}: cannot read the annotations: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{name}: no file can have this name ({error})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DataError(f"{name}: a directory, pipe or device; expected a JSONL file")
        with open(descriptor, "rb", closefd=False) as file:
            _refuse_other_formats(file.peek(16)[:16], name)
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield number, line
                while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES + 1)  # the rest of a line that is refused as too long
    except OSError as error:
        raise DataError(f"{name}: cannot read the annotations: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _refuse_other_formats(start: bytes, name: str) -> None:
    """Say at once what a file is that would fail on every line."""
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        raise DataError(f"{name}: a compressed file; unpack it first")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or start[1:4:2] == b"\0\0":
        raise DataError(f"{name}: UTF-16 text; save it as UTF-8")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(f"{name}: a JSON list; expected JSONL, one object per line (`jq -c '.[]'` converts it)")


def _parse(line: bytes, number: int) -> dict[str, Any]:
    """One line as a JSON object; JSON's dark corners are refused, not guessed at."""
    if len(line) > MAX_LINE_BYTES:
        raise _Refused("line-too-long", f"more than {MAX_LINE_BYTES:,} bytes; is a newline missing?")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise _Refused("not-utf-8", f"byte 0x{byte:02x} at column {error.start + 1}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise _Refused("not-json", f"{error.msg} at column {error.colno}; is the line cut off?") from error
    except RecursionError as error:
        raise _Refused("not-json", "brackets nested too deep") from error
    except ValueError as error:  # a number of thousands of digits
        raise _Refused("not-json", "a number with too many digits") from error
    if not isinstance(value, dict):
        raise _Refused("not-an-object", f"expected {{...}} with keys, got {_kind(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused("duplicate-key", f"key {twice!r} is there twice; only one of the values can be meant")
    return value


def _no_constant(text: str) -> None:
    raise _Refused("not-json", f"{text} is no JSON value; use null or leave the key out")


# --- from JSON objects to examples


def _example(line: bytes, number: int, name: str, images: "_ImageRoot", require: Sequence[str]) -> Example:
    record = _parse(line, number)
    _refuse_misspelt_keys(record)
    _require(record, ("image", "prefix", *require))
    suffix = record.get("suffix")
    if suffix is not None and not _text(suffix, "suffix").strip() and "suffix" in require:
        raise _Refused("empty", "'suffix' is blank; there would be nothing to learn")
    return Example(
        id=_id(record.get("id"), number),
        image=images.find(_text(record["image"], "image")),
        prefix=_text(record["prefix"], "prefix"),
        suffix=suffix,
        references=_texts(record.get("references"), "references"),
        answers=_texts(record.get("answers"), "answers"),
        file=name,
        line=number,
        info={key: value for key, value in record.items() if key not in KEYS},
    )


def _labelled(line: bytes, number: int, name: str, images: "_ImageRoot") -> Labelled:
    record = _parse(line, number)
    _refuse_misspelt_keys(record, LABELLED_KEYS)
    _require(record, ("image", "label"))
    label = _text(record["label"], "label")
    if not label.strip():
        raise _Refused("empty", "'label' is blank; give each image its class")
    return Labelled(_id(record.get("id"), number), images.find(_text(record["image"], "image")), label)


def _require(record: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if record.get(key) is None:
            what = "null" if key in record else "missing"
            raise _Refused(
                "missing-key", f"{key!r} is {what}; the line has {', '.join(map(repr, record)) or 'no keys'}"
            )


def _refuse_misspelt_keys(record: dict[str, Any], keys: Sequence[str] = KEYS) -> None:
    """`answer` for `answers` would drop what somebody annotated; a key that resembles none of ours is theirs."""
    for key in record.keys() - set(keys):
        close = difflib.get_close_matches(key, [known for known in keys if known not in record], n=1, cutoff=0.85)
        if close:
            raise _Refused("unknown-key", f"key {key!r}: did you mean {close[0]!r}? Rename it")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _Refused("wrong-type", f"{key!r} should be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Refused("bad-text", f"{key!r} holds half a surrogate pair at character {error.start + 1}") from error
    return value


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _Refused("wrong-type", f"{key!r} should be a list of text, got {_kind(value)}")
    if not value:
        raise _Refused("empty", f"{key!r} is an empty list; give at least one or leave the key out")
    texts = tuple(_text(item, f"{key}[{index}]") for index, item in enumerate(value))
    if not all(text.strip() for text in texts):
        raise _Refused("empty", f"{key!r} holds a blank text")
    return texts


def _id(value: Any, number: int) -> str:
    if value is None:
        return str(number)
    if type(value) is int:
        return str(value)
    if not _text(value, "id").strip():
        raise _Refused("empty", "'id' is blank; give each line its own or leave the key out")
    return str(value)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]


class _ImageRoot:
    """Finds image files below one folder, and nothing outside it."""

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise DataError(f"image root {shown(root)}: no such folder")
        # Question sets name the same image many times; a path costs several system calls.
        self._found: dict[str, Path | _Refused] = {}

    def find(self, image: str) -> Path:
        """The real path of a regular file. Raises `_Refused`."""
        if image not in self._found:
            try:
                self._found[image] = self._check(image)
            except _Refused as refused:
                self._found[image] = refused
        found = self._found[image]
        if isinstance(found, _Refused):
            raise _Refused(found.code, str(found))  # raised again, `found` would gather a traceback each time
        return found

    def _check(self, image: str) -> Path:
        name = shown(image) if image.strip() else repr(image)
        try:
            real = os.path.realpath(os.path.join(self.root, image))
            # Before any question about the file: what is outside may not even be asked for.
            if os.path.commonpath([self.root, real]) != self.root:
                raise _Refused("outside-root", f"image {name} lies outside the image root {shown(self.root)}")
            mode = os.stat(real).st_mode
        except FileNotFoundError as error:
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", image):
                raise _Refused("url", f"image {name}: URLs are not fetched; download it and give its path") from error
            raise _Refused("missing-image", f"image {name} is not below {shown(self.root)}") from error
        except (OSError, ValueError) as error:  # a name too long, a loop of links, a NUL
            raise _Refused("missing-image", f"image {name} cannot be opened: {error}") from error
        if not stat.S_ISREG(mode):
            raise _Refused("not-a-file", f"image {name} is a directory, pipe or device")
        return Path(real)
