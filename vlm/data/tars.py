"""Tar shards as WebDataset lays them out: members that share a name up to its first dot are one sample.

    000123.jpg  000123.txt  000123.json     the sample `000123`: an image, a text, an object with keys

A shard is read by the positions of its members: pictures stay where they are until they are decoded, and nothing is
ever unpacked, so that no name in an archive can lead anywhere. Format: https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vlm.data import strictjson
from vlm.data.problems import Problem
from vlm.images.load import SUFFIXES, FilePart

MAX_TEXT_BYTES = 2**20
"""Largest member that is read as a text or as JSON."""
TEXTS = ("txt", "text", "caption", "cls")
"""Members that are texts; a column of this name."""


@dataclass
class Sample:
    """What a shard has under one key.

    Attributes:
        name: the key, or the member's name where there is one image alone, for ids.
        images: in the order of the archive.
        values: texts by their suffix, and the keys of the JSON member.
        line: number of the sample in the shard, from 1.
    """

    key: str
    line: int
    images: list[FilePart] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.images[0].member if len(self.images) == 1 else self.key


class Broken(Exception):
    """The archive cannot be read on from here; carries a code and what is wrong."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def is_tar(head: bytes) -> bool:
    """Whether a file that begins so (at least 262 bytes) is a tar archive."""
    return head[257:262] == b"ustar"


def samples(path: str) -> Iterator[Sample | Problem]:
    """The samples of a shard in order. Where it is broken, what comes before is given and a problem ends it.

    The sample at the break is not given: its text or its keys may be among what is lost.
    """
    sample: Sample | None = None
    count = 0
    try:
        with open(path, "rb") as file:
            for member in _members(file):
                key, suffix = _split(member.name)
                if os.path.basename(key).startswith(".") or not suffix or "__MACOSX" in key:
                    continue
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    count += 1
                    sample = Sample(key, count)
                problem = _add(sample, member, suffix, file, path)
                if problem is not None:
                    yield problem
    except Broken as broken:
        lost = f"; sample {sample.key!r} and what follows are lost" if sample is not None else ""
        yield Problem(path, 0, broken.code, f"{broken}{lost}; fetch or write the shard again")
        return
    except OSError as error:
        yield Problem(path, 0, "unreadable", f"cannot be read: {error.strerror}")
        return
    if sample is not None:
        yield sample


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every regular file of an archive whose bytes are all there. Raises Broken, also where tarfile would just end."""
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"] = []  # it would keep millions of them
                if member.isreg():
                    if member.offset_data + member.size > size:
                        raise Broken("truncated", f"the archive ends inside {member.name!r}")
                    yield member
            end = archive.offset
    except tarfile.TarError as error:
        raise Broken("corrupt", f"no tar archive that can be read ({error})") from error
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise Broken("truncated", "the archive ends without its end mark")
    if block.strip(b"\0"):
        raise Broken("corrupt", f"no header of a member at byte {end:,}")


def _split(name: str) -> tuple[str, str]:
    """`a/b.c/000.left.jpg` -> `a/b.c/000`, `left.jpg`."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    key, _, suffix = base.partition(".")
    if not key:  # a hidden file
        return name, ""
    return (f"{folder}/{key}" if folder else key), suffix.lower()


def _add(sample: Sample, member: tarfile.TarInfo, suffix: str, file: BinaryIO, path: str) -> Problem | None:
    """Put a member into its sample; members of other kinds are left alone."""
    last = suffix.rpartition(".")[2]
    if f".{last}" in SUFFIXES:
        name = member.name.removeprefix("./")
        sample.images.append(FilePart(Path(path), member.offset_data, member.size, name))
        return None
    if last not in (*TEXTS, "json"):
        return None
    where = f"{path}/{member.name}"
    if member.size > MAX_TEXT_BYTES:
        return Problem(where, 0, "too-large", f"{member.size:,} bytes; at most {MAX_TEXT_BYTES:,} are read as text")
    back = file.tell()
    file.seek(member.offset_data)
    data = file.read(member.size)
    file.seek(back)
    try:
        value = strictjson.parse(data) if last == "json" else strictjson.decode(data)
    except strictjson.NotJSON as error:
        return Problem(where, 0, error.code, str(error))
    if last == "json":
        if not isinstance(value, dict):
            return Problem(where, 0, "not-an-object", f"expected {{...}}, got {strictjson.kind_of(value)}")
        sample.values = {**value, **sample.values}
    else:
        sample.values[suffix] = value.strip("\r\n") if last == "cls" else value
    return None
