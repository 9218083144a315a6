"""Labels that people give: a file of them, and what has to hold before a tower is asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data import strictjson
from vlm.data.problems import Refused
from vlm.errors import DataError
from vlm.words import listed

log = logging.getLogger(__name__)


def read_labels(path: str | Path) -> list[str]:
    """The labels of a file: one a line, or a JSON list of texts.

    Raises:
        DataError: the file cannot be read, is neither, or holds none.
    """
    data = strictjson.read_bytes(path)
    try:
        if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
            found = strictjson.parse(data)
        else:
            found = strictjson.decode(data).splitlines()
    except strictjson.NotJSON as error:
        raise DataError(f"{path}: {error.in_words()}; expected one label a line, or a JSON list of texts") from error
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise DataError(f"{path}: expected one label a line, or a JSON list of texts, got {strictjson.kind_of(found)}")
    return checked(found, str(path))


def checked(labels: Sequence[str], where: str) -> list[str]:
    """Labels without blank ones and without repetitions, which are told.

    Raises:
        DataError: there are none.
    """
    kept = [" ".join(label.split()) for label in labels if label.strip()]
    names = list(dict.fromkeys(kept))
    if not names:
        raise DataError(f"{where}: no labels; give at least one")
    twice = [name for name in names if kept.count(name) > 1] if len(names) < len(kept) else []
    if twice:
        log.warning("%s: labels that are there more than once count once: %s", where, listed(twice))
    return names


def labels_of(info: Mapping[str, Any]) -> tuple[str, ...]:
    """What a line says of its picture: `label`, or `labels`, a list that may be empty. Raises `Refused`."""
    given = [key for key in ("label", "labels") if key in info]
    if len(given) != 1:
        raise Refused("missing-key", f"expected 'label' or 'labels', got {', '.join(map(repr, given)) or 'neither'}")
    value = info[given[0]]
    found = [value] if given == ["label"] else value
    if not isinstance(found, list) or not all(isinstance(label, str) and label.strip() for label in found):
        wanted = "text" if given == ["label"] else "a list of texts"
        raise Refused("wrong-type", f"{given[0]!r} should be {wanted}, got {json.dumps(value)[:60]}")
    return tuple(" ".join(label.split()) for label in found)


def check_texts(names: Sequence[str], groups: Sequence[tuple[str, ...]], clean: Callable[[str], str]) -> None:
    """What a text tower makes of labels: those that are one and the same text to it (`Cat` and `cat`, ImageNet's two
    cranes) get the same scores, which a warning tells.

    Args:
        groups: the texts of each label. clean: what the family's rule does to a text.

    Raises:
        DataError: a label of which nothing is left.
    """
    empty = [name for name in names if not clean(name).strip()]
    if empty:
        raise DataError(
            f"the label {empty[0]!r} is empty to this model's text tower, which reads no punctuation; give it a word"
        )
    members: dict[tuple[str, ...], list[str]] = {}
    for name, group in zip(names, groups, strict=True):
        members.setdefault(tuple(map(clean, group)), []).append(name)
    shared = [", ".join(map(repr, found)) for found in members.values() if len(found) > 1]
    if shared:
        log.warning(
            "labels that are one text to the text tower, which cannot tell them apart: %s; give each words of its own"
            " ('crane bird', 'construction crane')",
            listed(shared, 5, separator="; "),
        )
