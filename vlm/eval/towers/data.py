"""From data of one's own, or a benchmark's official files, to pictures with classes and pictures with captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlm.data import reading, strictjson
from vlm.data.examples import Labelled, Paired
from vlm.data.folders import pictures
from vlm.data.problems import Problem
from vlm.data.source import Source
from vlm.errors import ConfigError, DataError
from vlm.eval.tasks.loading import reader
from vlm.eval.towers.benchmark import Chosen
from vlm.eval.towers.contract import Picture
from vlm.words import listed

TRAIN, TESTS = "train", ("test", "val", "validation")
"""Folders of a folder that holds both sets."""

# --- pictures with classes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sets:
    """Pictures with classes.

    Attributes:
        test: what is judged. train: what k-NN and the linear probe learn from; empty where there is none.
        labels: every class that may be answered, sorted.
        names: the text of each of `labels`.
    """

    test: tuple[Labelled, ...]
    train: tuple[Labelled, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]


def classes(
    data: Path,
    *,
    train: Path | None = None,
    names: Path | None = None,
    image_root: Path | None = None,
    limit: int | None = None,
) -> Sets:
    """Pictures with classes: a JSONL file with `image` and `label`, a folder with one folder per class, or a folder
    that holds two of these, `train` and `test` (or `val`).

    Args:
        names: the text of each class, see `class_names`; None: the labels as they are.
        limit: only the first so many of the pictures that are judged, taken in turn from each class.

    Raises:
        DataError: nothing to read, a class without a picture, fewer than two classes, labels without a name.
    """
    halves = _halves(data) if train is None else None
    test = labelled(halves[1] if halves else data, image_root)
    learnt = labelled(train, image_root) if train else labelled(halves[0]) if halves else []
    labels = sorted({item.label for item in (*test, *learnt)})
    texts = dict(zip(labels, labels, strict=True)) if names is None else class_names(names, labels)
    if len(texts) < 2:
        raise DataError(f"{data}: every picture has the class {labels[0]!r}; there is nothing to tell apart")
    unknown = sorted({item.label for item in test} - texts.keys())
    if unknown:
        raise DataError(f"{len(unknown)} classes of {data} have no name in {names}: {listed(unknown)}")
    chosen = tuple(test if limit is None else _in_turn(test, limit))
    return Sets(chosen, tuple(learnt), tuple(texts), tuple(texts.values()))


def _halves(data: Path) -> tuple[Path, Path] | None:
    """(train, test) of a folder that holds both and nothing else, else None."""
    if not data.is_dir():
        return None
    inside = sorted(one.name for one in data.iterdir() if one.is_dir() and not one.name.startswith("."))
    tests = [name for name in TESTS if name in inside]
    return (data / TRAIN, data / tests[0]) if TRAIN in inside and set(inside) <= {TRAIN, *TESTS} and tests else None


def labelled(path: Path, image_root: Path | None = None) -> list[Labelled]:
    """Pictures of a JSONL file, or of a folder with one folder per class; a picture's id there is its path in it.

    Raises:
        DataError: see `classes`.
    """
    if not path.exists():
        raise DataError(f"{path} is not there; give a folder with one folder per class, or JSONL with image and label")
    if not path.is_dir():
        return reading.read_labelled(path, image_root)
    folders = sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not folders:
        raise DataError(f"{path} holds no folders; expected one for each class, with its pictures inside")
    found: list[Labelled] = []
    for folder in folders:
        inside = list(pictures(str(folder)))
        bad = [one.message for one in inside if isinstance(one, Problem)]
        if bad or not inside:
            raise DataError(f"{folder}: {bad[0] if bad else 'no picture in the folder of this class; delete it'}")
        paths = [Path(one) for one in inside if not isinstance(one, Problem)]
        found += [Labelled(str(one.relative_to(path)), one, folder.name) for one in paths]
    return found


def _in_turn(items: Sequence[Labelled], limit: int) -> list[Labelled]:
    """The first of each class, then the second: a part of an ImageNet folder is not two classes."""
    seen: Counter[str] = Counter()
    turns = []
    for place, item in enumerate(items):
        turns.append((seen[item.label], place))
        seen[item.label] += 1
    kept = sorted(turns)[:limit]
    return [items[place] for place in sorted(place for _, place in kept)]


def class_names(path: Path, labels: Sequence[str]) -> dict[str, str]:
    """Label -> the text of its class, from a file.

    JSON: an object of label and name, or a list of names. Text: a line per class, `label<TAB>name`; or `label name`,
    where every line begins with a label of the data (as `n01440764 tench, Tinca tinca`); or names alone. Names alone
    are for the labels in sorted order, so there must be as many.

    Raises:
        DataError: the file cannot be read, or is none of these.
    """
    text = _text(path)
    if path.suffix == ".json":
        try:
            value = strictjson.parse(text)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        if isinstance(value, dict) and all(isinstance(one, str) for one in value.values()):
            return _named(value, path)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise DataError(f"{path}: expected an object of label and name, or a list of names")
        return _in_order(value, labels, path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for separator in ("\t", None):
        pairs = [line.split(separator, 1) for line in lines]
        whole = all(len(pair) == 2 for pair in pairs)
        if whole and (separator or {pair[0] for pair in pairs} >= set(labels)):
            return _named({label.strip(): name for label, name in pairs}, path, len(lines))
    return _in_order(lines, labels, path)


def _text(path: Path) -> str:
    try:
        return strictjson.decode(strictjson.read_bytes(path))
    except (strictjson.NotJSON, OSError) as error:
        raise DataError(f"{path}: {error}") from error


def _named(found: dict[str, str], path: Path, lines: int | None = None) -> dict[str, str]:
    if lines is not None and len(found) < lines:
        raise DataError(f"{path}: {lines - len(found)} labels stand twice; give each class one line")
    empty = [label for label, name in found.items() if not name.strip()]
    if empty:
        raise DataError(f"{path}: {len(empty)} classes have an empty name: {listed(empty)}")
    return {label: name.strip() for label, name in sorted(found.items())}


def _in_order(names: Sequence[str], labels: Sequence[str], path: Path) -> dict[str, str]:
    if len(names) != len(labels):
        raise DataError(
            f"{path} has {len(names)} names, the data {len(labels)} classes; write `label<TAB>name` lines to say which"
            " is which"
        )
    return _named(dict(zip(labels, names, strict=True)), path)


def check_learnt(label: str, sets: Sets, neighbours: int) -> None:
    """Raise DataError or ConfigError where there is nothing to learn from."""
    if not sets.train:
        raise DataError(
            f"{label} learns from pictures with classes: give --train FOLDER|FILE.jsonl, or a folder that holds the"
            " folders train and test (or val)"
        )
    if len({item.label for item in sets.train}) < 2:
        raise DataError(f"every picture to learn from has the class {sets.train[0].label!r}; give at least two classes")
    if neighbours < 1:
        raise ConfigError(f"neighbours is {neighbours}, expected at least 1")


# --- pictures with captions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Pictures and captions that are searched for each other.

    Attributes:
        name: the language; "" where nobody says.
        ids, images: of each picture.
        texts: captions. owner: int64[T], the picture of each.
    """

    name: str
    ids: tuple[str, ...]
    images: tuple[Picture, ...]
    texts: tuple[str, ...]
    owner: np.ndarray


def pools(items: Iterable[Paired], *, captions_per_image: int | None = None) -> list[Pool]:
    """One pool per language, in the order of their names. Lines about the same picture are put together.

    Raises:
        DataError: nothing to read, lines with and without a language, fewer than two pictures.
    """
    groups: dict[str, dict[Picture, tuple[str, list[str]]]] = {}
    for item in items:
        groups.setdefault(item.language, {}).setdefault(item.image, (item.id, []))[1].extend(item.texts)
    if "" in groups and len(groups) > 1:
        raise DataError(f"{len(groups[''])} pictures have no language, others have {listed(sorted(groups)[1:])}")
    return [_pool(name, groups[name], captions_per_image) for name in sorted(groups)]


def _pool(name: str, members: dict[Picture, tuple[str, list[str]]], most: int | None) -> Pool:
    if len(members) < 2:
        raise DataError(
            f"retrieval{f' in {name}' if name else ''} needs at least two pictures with captions, got {len(members)}"
        )
    texts = [texts[:most] for _, texts in members.values()]
    owner = np.repeat(np.arange(len(texts)), [len(one) for one in texts])
    flat = tuple(text for one in texts for text in one)
    return Pool(name, tuple(key for key, _ in members.values()), tuple(members), flat, owner)


# --- a task -----------------------------------------------------------------------------------------------------------


def pairs_of(one: Chosen, data: Path, *, image_root: Path | None = None, limit: int | None = None) -> list[Pool]:
    """The pools of a retrieval, of the official files below `data` or of a file of one's own.

    Args:
        limit: only the first so many pictures, of each language.

    Raises:
        ConfigError: an unknown split. DataError: files that are missing or not as they should be; no pairs.
    """
    if one.task.splits:
        items: Iterable[Paired] = _official(one, data)
    elif data.is_dir() or not data.exists():
        what = "a folder" if data.is_dir() else "not there"
        raise DataError(f"{data} is {what}; retrieval reads JSONL, a line per picture with image and captions")
    else:
        items = reading.read_pairs(data, image_root)
    found = pools(items, captions_per_image=one.task.captions_per_image)
    return found if limit is None else [_first(pool, limit) for pool in found]


def _first(pool: Pool, limit: int) -> Pool:
    keep = pool.owner < limit
    texts = tuple(text for text, kept in zip(pool.texts, keep, strict=True) if kept)
    return replace(pool, ids=pool.ids[:limit], images=pool.images[:limit], texts=texts, owner=pool.owner[keep])


def _source(one: Chosen, root: Path) -> Source:
    split = one.task.split(one.split)
    return Source(one.task.name, one.split or one.task.default_split, root, split.files, split.options)


def _official(one: Chosen, root: Path) -> Iterable[Paired]:
    source = _source(one, root)
    for item in reader(one.task.format)(source):
        yield Paired(item.id, item.shown.images[0], item.references, str(item.info.get("language", "")))


def sets_of(
    one: Chosen, data: Path, *, train: Path | None, names: Path | None, image_root: Path | None, limit: int | None
) -> Sets:
    """The pictures with classes of a task. Raises as `classes`, and DataError for official files that are missing."""
    if not one.task.splits:
        return classes(data, train=train, names=names, image_root=image_root, limit=limit)
    if train is not None:
        raise ConfigError(f"--train is for knn and linear; {one.label} learns from no picture")
    source = _source(one, data)
    return classes(source.path("images"), names=names or source.path("names"), limit=limit)
