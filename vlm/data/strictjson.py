"""JSON without its dark corners, and what a file is that holds none.

Everything that reads annotations, predictions or official files reads them here. A key that occurs twice, NaN and
Infinity, a number that overflows, brackets nested too deep: Python's `json` accepts or crashes on each of them, and
each is refused here with a code. Files are bounded before they are read.
"""

import json
import math
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

from vlm.errors import DataError

MAX_DOCUMENT_BYTES = 2**31
"""Largest file that is read as a whole; the largest official ones have about a quarter of it."""
MAX_MEMBER_BYTES = 2**28
"""Largest JSON member of an archive."""
# What needs a second look: numbers that could pass 64 bits, and exponents that could overflow.
_ODD_NUMBER = re.compile(r"\d{19}|[eE]\+?\d{3}")


class NotJSON(ValueError):
    """Text that is no strict JSON. `code` is short and stable: not-utf-8, not-json or duplicate-key."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def in_words(self) -> str:
        """The message with what was expected, for errors that show no code."""
        return f"not JSON: {self}" if self.code == "not-json" else str(self)


class ExtraData(NotJSON):
    """A JSON value that is followed by something else, as in a file of several lines of JSON."""


def decode(data: bytes) -> str:
    """UTF-8 (with or without a byte order mark) as text. Raises `NotJSON`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, column = data[error.start], error.start - data.rfind(b"\n", 0, error.start)
        line = data.count(b"\n", 0, error.start) + 1
        where = f"column {column}" if line == 1 else f"line {line}, column {column}"
        raise NotJSON("not-utf-8", f"byte 0x{byte:02x} at {where} is not UTF-8; save the file as UTF-8") from error


def parse(data: str | bytes) -> Any:
    """One JSON value.

    Raises:
        NotJSON: no JSON, or JSON with a repeated key, NaN, Infinity, a number beyond 64 bits (or a float beyond its
            range), or brackets nested too deep, or more than fits into the memory. `ExtraData` where more follows.
    """
    hooks: dict[str, Any] = {}
    try:
        text = decode(data) if isinstance(data, bytes) else data
        if _ODD_NUMBER.search(text):  # hooks cost a call for each number, so only where they could matter
            hooks = {"parse_int": _integer, "parse_float": _float}
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, **hooks)
    except json.JSONDecodeError as error:
        one = error.lineno == 1
        where = f"column {error.colno}" if one else f"line {error.lineno}, column {error.colno}"
        kind = ExtraData if error.msg == "Extra data" else NotJSON
        raise kind("not-json", f"{error.msg} at {where}; is the {'line' if one else 'file'} cut off?") from error
    except RecursionError as error:
        raise NotJSON("not-json", "brackets nested too deep") from error
    except MemoryError as error:
        raise NotJSON("not-json", "more than fits into the memory") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise NotJSON("duplicate-key", f"the key {twice!r} is there twice; only one of the values can be meant")
    return value


def _no_constant(text: str) -> None:
    raise NotJSON("not-json", f"{text} is no JSON value; use null or leave the key out")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise NotJSON("not-json", f"a number with too many digits ({len(text)}); an id of this length is text")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotJSON("not-json", f"the number {text[:40]} is too large")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, for people."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]


# --- files


def open_regular(path: str | Path, name: str, expected: str = "a file", failed: str = "cannot be read") -> int:
    """A descriptor of a regular file. Never waits: a FIFO opens at once, and is refused. Raises `DataError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise DataError(f"{name}: {failed}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{name}: no file can have this name ({error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{name}: a directory, pipe or device; expected {expected}")
    return descriptor


def read_bytes(path: str | Path, max_bytes: int | None = None) -> bytes:
    """A whole file of bounded size (`MAX_DOCUMENT_BYTES`). Raises `DataError` that names it."""
    limit = MAX_DOCUMENT_BYTES if max_bytes is None else max_bytes
    descriptor = open_regular(path, str(path))
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise DataError(f"{path}: {size:,} bytes; at most {limit:,} are read, split the file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)  # it may be growing
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise DataError(f"{path}: {size:,} bytes do not fit into the memory; split the file") from error
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise DataError(f"{path}: more than {limit:,} bytes; split the file")
    return data


# --- what else a file may be

HEAD_BYTES = 2**16
"""How much of a file `refuse_other_formats` wants to see."""
_JSONL = "expected JSONL, one object per line"
_PACKED = [
    (rb"PK\x03\x04.{0,4000}(xl/|\[Content_Types\])", "an Excel or Office file; save the sheet as CSV first"),
    (rb"\x1f\x8b", "gzip, `gunzip`"),
    (rb"BZh", "bzip2, `bunzip2`"),
    (rb"\xfd7zXZ", "xz, `unxz`"),
    (rb"\x28\xb5\x2f\xfd", "zstd, `unzstd`"),
    (rb"\x04\x22\x4d\x18", "lz4, `unlz4`"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "7z or RAR"),
    (rb"PK\x03\x04", "zip, `unzip`"),
]
# (pattern at the start, what it is, what to do)
_BINARY: list[tuple[bytes, str, str]] = [
    (
        rb"PAR1",
        "a Parquet file",
        "write each row's image as a file and the rest as a line of JSON (datasets or pandas read Parquet)",
    ),
    (
        rb"ARROW1|FEA1|\xff\xff\xff\xff.{4}\x10\0\0\0",
        "an Arrow file",
        "write each row's image as a file and the rest as a line of JSON (datasets or pandas read Arrow)",
    ),
    (
        rb".{257}ustar",
        "a tar archive (a WebDataset shard?)",
        "unpack it, and write one line of JSON for each image with the text that lies beside it",
    ),
    (rb"SQLite format 3\0", "an SQLite database", "export the rows as lines of JSON"),
    (rb"\x89HDF\r\n", "an HDF5 file", "write the images as files and the rest as lines of JSON"),
    (rb"\x93NUMPY", "a NumPy array", "write the images as files and the rest as lines of JSON"),
    (rb"Obj\x01|ORC", "an Avro or ORC file", "write each row as a line of JSON"),
    (rb"\x80[\x02-\x05][\x8c\x95\x58\x5d\x7d\x28\x63]", "a pickle, which can run code", "convert it where it was made"),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF....WEBP", "an image", "give the file of annotations that names it"),
    (rb"%PDF", "a PDF document", "give the file of annotations"),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file with `git lfs pull`"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page or XML, perhaps a failed download", "download it again or convert it"),
]  # fmt: skip
LLAVA_ADVICE = (
    "each question with its answer becomes a line of its own: "
    '`{"image": ..., "prefix": QUESTION, "suffix": ANSWER}`, the question without `<image>`'
)


def refuse_other_formats(head: bytes, name: str, *, expected: str = _JSONL, documents: bool = False) -> None:
    """Say at once what a file is that would fail on every line.

    Args:
        head: its first `HEAD_BYTES`.
        documents: JSON lists and objects of several lines are welcome.

    Raises:
        DataError: the file is none of JSON; it says what, and what to do.
    """
    for pattern, what in _PACKED:
        if re.match(pattern, head, re.DOTALL):
            packed = what if "Office" in what else f"a compressed file; unpack it first ({what})"
            raise DataError(f"{name}: {packed}")
    for pattern, what, advice in _BINARY:
        if re.match(pattern, head, re.DOTALL):
            raise DataError(f"{name}: {what}; {expected}: {advice}")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[1:4:2] == b"\0\0":
        raise DataError(f"{name}: UTF-16 text; save it as UTF-8")
    if _looks_like_records(head):
        raise DataError(f"{name}: TFRecord or another binary file; {expected}: write the images as files")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not documents:
        _refuse_documents(start, name, expected)
    if found := _table(start):
        kind, columns, reader = found
        raise DataError(
            f"{name}: a table ({kind}) with the columns {', '.join(columns)}; {expected}; this converts it:"
            f' python -c "import csv, json, sys; [print(json.dumps(row)) for row in {reader}]" < FILE > FILE.jsonl'
            " (then name the columns image, prefix and suffix)"
        )


def _looks_like_records(head: bytes) -> bool:
    """TFRecord: a length of 8 bytes, its checksum of 4, then a protocol buffer that begins with 0x0a."""
    if len(head) < 16 or head[:1] in b"{[\xef":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return 0 < length < 2**32 and head[12:13] == b"\x0a" and b"\0\0\0\0" in head[:8]


def _refuse_documents(start: bytes, name: str, expected: str) -> None:
    """Refuse a JSON list, and an object that is no line of its own."""
    if not start.startswith((b"[", b"{")):
        return
    first, _, rest = start.partition(b"\n")
    is_coco = b'"annotations"' in start and re.search(rb'"images"\s*:\s*\[', start) is not None
    over_lines = first.strip() == b"{" and rest.lstrip()[:1] not in (b"", b"{")
    if start.startswith(b"{") and not over_lines and (rest.strip() or not is_coco):
        return  # lines; what is wrong with each, it says itself
    if is_coco or (start.startswith(b"{") and re.search(rb'"(images|annotations|categories)"\s*:\s*\[', start)):
        raise DataError(
            f"{name}: one JSON object with `images` and `annotations` (COCO's format); {expected}: each annotation"
            ' becomes a line `{"image": FILE_NAME, "prefix": "caption en", "suffix": CAPTION}` (to evaluate on COCO'
            " captions: `vlm eval --tasks`, or a task of `format: coco_captions`)"
        )
    if b'"conversations"' in start:
        raise DataError(f"{name}: LLaVA's format (a JSON list with `conversations`); {expected}: {LLAVA_ADVICE}")
    if start.startswith(b"["):
        raise DataError(f"{name}: a JSON list; {expected} (`jq -c '.[]'` converts it)")
    raise DataError(f"{name}: a JSON object over several lines; {expected} (`jq -c .` puts it on one)")


def _table(start: bytes) -> tuple[str, list[str], str] | None:
    """(kind, columns, the expression that reads it) of a table: two lines with as many delimiters, and no JSON."""
    lines = [line.strip(b"\r") for line in start.split(b"\n")[:2]]
    if len(lines) < 2 or b"{" in lines[0] or lines[1].lstrip().startswith(b"{") or b"\0" in start:
        return None
    for kind, delimiter, reader in (
        ("CSV", b",", "csv.DictReader(sys.stdin)"),
        ("TSV", b"\t", "csv.DictReader(sys.stdin, delimiter='\\t')"),
        ("CSV with semicolons", b";", "csv.DictReader(sys.stdin, delimiter=';')"),
    ):
        if lines[0].count(delimiter) and lines[1].count(delimiter) >= lines[0].count(delimiter):
            names = [cell.strip(b' "').decode("utf-8", "replace")[:30] for cell in lines[0].split(delimiter)[:10]]
            return kind, names, reader
    return None
