"""A collection into a folder of vectors: what is new or changed is embedded, and nothing else.

The work is a plan of whole batches, in the order of the collection. A batch is kept or it is not, so a run that was
killed goes on with the batches that it would have made, and its vectors are those of a run that nobody stopped, bit for
bit: what else is in a batch may change the last bits of a vector. Pictures that could not be read keep their place in
the plan for the same reason; they are tried again behind it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.data.collection import Entry, plain
from vlm.data.problems import Problem
from vlm.errors import ImageError
from vlm.images.load import FilePart
from vlm.siglip.encode import encode_images, encode_texts
from vlm.siglip.journal import KNOWN, Record
from vlm.siglip.writing import VectorWriter
from vlm.words import shown

COMMIT_S = 2.0
"""So much work may be lost to a kill; whoever waits for the disk after every batch of a fast GPU waits too often."""
WHOLE = frozenset({"duplicate-id"})
"""Problems that hide nothing of a source."""


@dataclass(frozen=True)
class Batch:
    """Vectors of some entries, in order.

    Attributes:
        entries, vectors: one float32[D] each.
        bad: entries that could not be read, and why.
        cut: those whose text was longer than the model reads.
    """

    entries: Sequence[Entry]
    vectors: Tensor
    bad: Sequence[tuple[Entry, ImageError]] = ()
    cut: Sequence[Entry] = ()


Encode = Callable[[Sequence[Entry]], Iterator[Batch]]


@dataclass
class Summary:
    """What became of a collection.

    Attributes:
        added, changed, unchanged: entries with a vector now.
        gone: ids that these sources no longer have, and whose vectors are still there.
        dropped: those whose vectors were dropped.
        cut: ids of the texts that were longer than the model reads.
        problems: what could not be used.
        seconds: spent in embedding.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    gone: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Entries embedded in a second."""
        return (self.added + self.changed) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Plan:
    """What has to be done.

    Attributes:
        todo: entries without a vector of their present state, in order.
        again: those of them that could not be read before and have not changed since.
        known: id -> what is known anew of an entry whose vector stays.
        gone: ids of the same sources that are no longer there.
        unchanged: entries whose vector stays.
        stamps: id -> stamp of what has to be done, as it was before anything was read.
    """

    todo: list[Entry]
    again: list[Entry]
    known: dict[str, Record]
    gone: list[str]
    unchanged: int
    stamps: dict[str, str]

    @property
    def count(self) -> int:
        return len(self.todo) + len(self.again)


def plan(entries: Sequence[Entry], sources: Sequence[str], writer: VectorWriter) -> Plan:
    """Compare a collection with what is there.

    Args:
        entries: everything usable that the sources hold. sources: as they were given.
    """
    rows = writer.rows
    todo: list[Entry] = []
    again: list[Entry] = []
    known: dict[str, Record] = {}
    stamps: dict[str, str] = {}
    for entry in entries:
        stamp, record, bad = entry.stamp(), rows.record(entry.id), rows.bad.get(entry.id)
        if record is not None and stamp and record.get("stamp") == stamp:
            now = _known(entry)
            if now != {key: record[key] for key in KNOWN if key in record}:
                known[entry.id] = now
            continue
        stamps[entry.id] = stamp
        (again if bad is not None and stamp and bad.get("stamp") == stamp else todo).append(entry)
    there, of_these = {entry.id for entry in entries}, set(map(plain, sources))
    living = (rows.records[row] for row in rows.places)
    gone = [record["id"] for record in living if record.get("source") in of_these and record["id"] not in there]
    return Plan(todo, again, known, gone, len(entries) - len(stamps), stamps)


def carry_out(
    work: Plan,
    problems: Sequence[Problem],
    writer: VectorWriter,
    encode: Encode,
    *,
    prune: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Summary:
    """Embed what the plan says, and keep it as it is made.

    Args:
        problems: what the sources hold and nobody can use.
        encode: entries to batches that do not depend on how often it is called; see `of_images`, `of_texts`.
        prune: drop the vectors of what is gone. Not where a source could not be read whole: what cannot be seen is not
            gone.
        advance: called with the number of entries that are done.

    Raises:
        DiskError: the disk is full; what was made before is there. DataError: the model gives NaN.
    """
    summary = Summary(unchanged=work.unchanged, gone=work.gone, problems=list(problems))
    for name, known in work.known.items():
        writer.know(name, known)
    if prune and work.gone and all(problem.code in WHOLE for problem in problems):
        writer.drop(work.gone)
        summary.gone, summary.dropped = [], work.gone
    writer.commit()
    start = kept = time.monotonic()
    for batch in chain(encode(work.todo), encode(work.again)):
        _take(batch, work.stamps, writer, summary)
        if time.monotonic() - kept >= COMMIT_S:
            writer.commit()
            kept = time.monotonic()
        advance(len(batch.entries) + len(batch.bad))
    writer.commit()
    summary.seconds = time.monotonic() - start
    return summary


def of_images(model: Any, processor: Any, *, batch_size: int, decoders: int | None = None) -> Encode:
    """How pictures become vectors; a batch is as many entries as they come, the bad ones left out."""

    def encode(entries: Sequence[Entry]) -> Iterator[Batch]:
        pictures = ((entry, entry.image) for entry in entries)
        for found in encode_images(model, processor, pictures, batch_size=batch_size, decoders=decoders):
            yield Batch(found.keys, found.vectors, found.bad)

    return encode


def of_texts(model: Any, processor: Any, *, batch_size: int) -> Encode:
    """How texts become vectors."""

    def encode(entries: Sequence[Entry]) -> Iterator[Batch]:
        for start in range(0, len(entries), batch_size):
            chunk = entries[start : start + batch_size]
            found = encode_texts(model, processor, [entry.text or "" for entry in chunk], batch_size=batch_size)
            yield Batch(chunk, found.vectors, cut=[chunk[number] for number in found.cut])

    return encode


def _take(batch: Batch, stamps: dict[str, str], writer: VectorWriter, summary: Summary) -> None:
    for entry in batch.entries:
        if writer.rows.record(entry.id) is None:
            summary.added += 1
        else:
            summary.changed += 1
    if batch.entries:
        records = [{"id": entry.id, "stamp": stamps[entry.id], **_known(entry)} for entry in batch.entries]
        writer.add(records, batch.vectors)
    for entry, error in batch.bad:
        stamp, said = stamps[entry.id], str(error).removeprefix(f"{shown(str(entry.image))}: ")
        before = writer.rows.bad.get(entry.id)
        if before is None or (before.get("stamp"), before.get("code")) != (stamp, error.code):
            writer.refuse(entry.id, stamp, error.code, said)
        kept = "" if writer.rows.record(entry.id) is None else "; the vector of its earlier content is kept"
        summary.problems.append(Problem(shown(entry.id), 0, error.code, said + kept))
    summary.cut += [entry.id for entry in batch.cut]


def _known(entry: Entry) -> Record:
    """What a row says of an entry beside its id and stamp; keys without a value are left out."""
    known = {"source": entry.source, "image": _place(entry.image), "text": entry.text, "info": dict(entry.info)}
    return {key: value for key, value in known.items() if value not in (None, {})}


def _place(image: Path | FilePart | None) -> Record | None:
    if isinstance(image, FilePart):
        inside = {"offset": image.offset, "size": image.size, "member": image.member}
        return {"path": os.path.abspath(image.path), **inside}
    return None if image is None else {"path": os.path.abspath(image)}
