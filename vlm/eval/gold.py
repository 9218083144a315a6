"""Files with gold texts and files of predictions, as people have them: the format is told from the keys.

A file is never read generously. An id that occurs twice, a prediction that is no text, a record with other keys than
its neighbours: each is refused with its place, because what is skipped here would silently change a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from vlm import registry
from vlm.data import reading
from vlm.data.benchmarks.contract import Benchmark, Predictions, without_extension
from vlm.data.items import File, Item, once
from vlm.data.problems import Problem, Refused
from vlm.data.rows import Document, Row
from vlm.data.source import Source, open_document
from vlm.errors import ConfigError, DataError, nearest
from vlm.words import listed

_T = TypeVar("_T")


@dataclass(frozen=True)
class Reader:
    """How files with gold texts of one format are told from others, and read."""

    about: str
    recognise: Callable[[Document], bool] | None
    read: Callable[[Document], Iterable[Item]]


def gold_formats() -> dict[str, Reader]:
    """Every format of references by the name that `vlm score` has for it, in the order in which they are tried."""
    parts = registry.parts("vlm.data.benchmarks")
    scored = sorted((part.FORMAT.order, kind) for kind, part in parts.items() if part.FORMAT.gold)
    found = {}
    for _, kind in scored:
        described: Benchmark = parts[kind].FORMAT
        read = partial(_alone, role=described.gold, read=parts[kind].read)
        found[described.name or kind] = Reader(described.about, described.recognise, read)
    found["jsonl"] = Reader('JSONL or list of {"id", and "references", "answers" or "suffix"}', _is_ours, _ours)
    found["mapping"] = Reader("{id: text or list of texts}", _is_mapping, _mapping)
    return found


def prediction_formats() -> dict[str, Predictions]:
    """Every format of predictions by name, in the order in which they are tried."""
    declared = [one for part in registry.parts("vlm.data.benchmarks").values() for one in part.FORMAT.predictions]
    return {one.name: one for one in sorted([*_OWN_PREDICTIONS, *declared], key=lambda one: (one.order, one.name))}


def read_gold(path: str | Path, format: str | None = None) -> tuple[dict[str, Item], str]:
    """The items by id, with what predictions are compared with, and the name of the format, told from the content
    unless `format` is one of `gold_formats()` or of the annotation formats.

    Raises:
        ConfigError: unknown format.
        DataError: the file cannot be read as such, an id occurs twice (listed), or an item has no gold text (listed).
    """
    known = gold_formats()
    others = [name for name in reading.formats() if name not in known]
    if format is not None and format not in (*known, *others):
        names = [*known, *others]
        raise ConfigError(f"unknown format {format!r}{nearest(format, names)}; known: {', '.join(names)}")
    name = str(path)
    found = format or reading.recognised(path)
    if found in others:
        gold = _some(_annotated(path, found), name)
    else:
        document = open_document(path)
        found = format or _told(document, known)
        gold = _some(((item.id, item) for item in known[found].read(document)), name)
    bare = [key for key, item in gold.items() if not item.references and not item.answers]
    if bare:
        raise DataError(f"{name}: {len(bare)} items have no gold text: {listed(bare, show=repr)}")
    return gold, found


def read_predictions(path: str | Path, format: str | None = None) -> tuple[dict[str, str], str]:
    """Predictions by id, and the name of the format, told from the content unless `format` is one of
    `prediction_formats()`.

    Raises:
        ConfigError: unknown format.
        DataError: the file cannot be read as such, or an id occurs twice (listed).
    """
    known = prediction_formats()
    if format is not None and format not in known:
        raise ConfigError(
            f"unknown format of predictions {format!r}{nearest(format, known)}; known: {', '.join(known)}"
        )
    document = open_document(path)
    found = format or _predictions_told(document, known)
    return _some(_said(document, known[found]), document.name), found


def read_questions(path: str | Path) -> dict[str, None]:
    """The ids of a VQA questions file. Raises DataError."""
    document = open_document(path)
    if document.object is None:
        raise DataError(f"{document.name}: a list; a questions file is an object with 'questions'")
    return _some(((row.key("question_id"), None) for row in document.object.rows("questions")), document.name)


def _some(pairs: Iterable[tuple[str, _T]], name: str) -> dict[str, _T]:
    """Pairs of id and value as a dict. Raises DataError for ids that occur more than once (listed), and for none."""
    found = once(pairs, name)
    if not found:
        raise DataError(f"{name}: holds no item")
    return found


# --- Gold texts -------------------------------------------------------------------------------------------------------


def _told(document: Document, known: Mapping[str, Reader]) -> str:
    for name, reader in known.items():
        if reader.recognise is not None and reader.recognise(document):
            return name
    raise DataError(
        f"{document.name}: references of no known format; {_keys(document)}. Known: "
        f"{'; '.join(f'{name}: {reader.about}' for name, reader in known.items())}"
    )


def _keys(document: Document) -> str:
    return f"the keys are {', '.join(sorted(document.keys)[:10])}"


def _alone(document: Document, role: str, read: Callable[[Source], Iterable[Item]]) -> Iterable[Item]:
    """The items of a benchmark from its file with the gold texts alone."""
    path = Path(document.name)
    return read(Source("", "", path.parent, {role: File(path=path.name)}, opened={role: document}, alone=True))


def _is_ours(document: Document) -> bool:
    return "id" in document.keys or (
        "prefix" in document.keys and bool({"suffix", "answers", "references"} & document.keys)
    )


def _ours(document: Document) -> Iterator[Item]:
    """Our own annotations, and `items.jsonl` of `vlm eval`."""
    return (_own_item(row, row.line) for row in document.rows)


def _own_item(row: Row, number: int) -> Item:
    """An item from a record with our own keys: further keys, and those of `info`, are facts.

    Without `id` the line number is the id, as everywhere in this package.
    """
    known = {"id", "references", "answers", "suffix", "info", "prediction", "prefix", "image", "scores"}
    suffix = (row.text("suffix"),) if "suffix" in row else ()
    references = row.answers("references") if "references" in row else ()
    answers = row.answers("answers") if "answers" in row else ()
    info = {key: value for key, value in row.values.items() if key not in known}
    if "info" in row:
        info |= row.row("info").values
    key = str(number) if number and "id" not in row.values else row.key("id")
    return Item(id=key, references=references or (() if answers else suffix), answers=answers, info=info)


def _annotated(path: str | Path, format: str) -> Iterator[tuple[str, Item]]:
    """The items of an annotation file; its images need not be there."""
    name = str(path)
    for number, record in reading.records(path, format):
        if isinstance(record, Refused):
            raise DataError(str(Problem(name, number, record.code, str(record))))
        item = _own_item(Row(record, f"{name}:{number}", line=number), number)
        yield item.id, item


def _is_mapping(document: Document) -> bool:
    return document.object is not None and all(isinstance(v, str | list) for v in document.object.values.values())


def _mapping(document: Document) -> Iterator[Item]:
    whole = document.whole
    for key, value in whole.values.items():
        yield Item(id=key, references=(whole.text(key),) if isinstance(value, str) else whole.answers(key))


# --- Predictions ------------------------------------------------------------------------------------------------------

_OWN_PREDICTIONS = (
    Predictions(
        name="jsonl",
        about='JSONL or list of {"id", "prediction"}, such as predictions.jsonl of vlm eval',
        id="id",
        text="prediction",
        order=0,
    ),
    Predictions(name="mapping", about="{id: text}", order=30),
)


def _predictions_told(document: Document, known: Mapping[str, Predictions]) -> str:
    by_keys = next((name for name, one in known.items() if one.id and document.keys >= {one.id, one.text}), None)
    if by_keys is not None:
        return by_keys
    if document.object is not None:
        values = document.object.values
        for name, one in known.items():
            if one.inside and isinstance(values.get(one.inside), dict):
                return name
        if all(isinstance(value, str) for value in values.values()):
            return "mapping"
        several = [one for one in known.values() if one.text and not one.id and one.text in document.first]
        if len(several) > 1:
            raise DataError(
                f"{document.name}: holds {' and '.join(one.text for one in several)}; name one with "
                f"--predictions-format {' or '.join(one.name for one in several)}"
            )
        if several:
            return several[0].name
    raise DataError(
        f"{document.name}: predictions of no known format; {_keys(document)}. Known: "
        f"{'; '.join(f'{name}: {one.about}' for name, one in known.items())}"
    )


def _said(document: Document, written: Predictions) -> Iterator[tuple[str, str]]:
    if written.id:
        # One JSONL line is one JSON object.
        for record in document.rows:
            said = record.text(written.text)
            yield (without_extension(record.text(written.id)) if written.images else record.key(written.id)), said
        return
    if document.object is None:
        raise DataError(f"{document.name}: a list; predictions of format {written.name} are one object by id")
    source = document.object.row(written.inside) if written.inside else document.object
    for key in source.values:
        yield key, source.row(key).text(written.text) if written.text else source.text(key)
