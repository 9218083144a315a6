"""Our own annotations: one JSON object per line (UTF-8), its keys those of `vlm.data.reading`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data import strictjson
from vlm.data.formats.contract import AnnotationFormat
from vlm.data.problems import Refused
from vlm.errors import DataError

MAX_LINE_BYTES = 2**20

FORMAT = AnnotationFormat(about="JSONL: one object with our own keys per line")


def records(path: Path, name: str) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """Every line that is not blank, with its number from 1: an object, or why it is none."""
    for number, line in _lines(path, name):
        try:
            yield number, parse(line, number)
        except Refused as refused:
            yield number, refused


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1.

    Split at b"\\n" only: `str.splitlines` would cut records at U+2028 and others that are legal inside JSON text.
    """
    descriptor = strictjson.open_regular(path, name, "a JSONL file", "cannot read the annotations")
    try:
        strictjson.refuse_other_formats(os.read(descriptor, strictjson.HEAD_BYTES), name)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", closefd=False) as file:
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


def parse(line: bytes, number: int) -> dict[str, Any]:
    """One line as a JSON object. Raises `Refused`."""
    if len(line) > MAX_LINE_BYTES:
        raise Refused("line-too-long", f"more than {MAX_LINE_BYTES:,} bytes; is a newline missing?")
    if number > 1 and line.startswith(b"\xef\xbb\xbf"):
        raise Refused("not-json", "a byte order mark at column 1; were two files joined?")
    try:
        value = strictjson.parse(line)
    except strictjson.NotJSON as error:
        raise Refused(error.code, str(error)) from error
    if not isinstance(value, dict):
        raise Refused("not-an-object", f"expected {{...}} with keys, got {strictjson.kind_of(value)}")
    return value
