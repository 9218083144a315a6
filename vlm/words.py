"""Words for people: lists that stop somewhere, rows in columns, what differs."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

LISTED = 10
"""So many names are told, and how many more there are."""


def more(count: int, most: int = LISTED) -> str:
    """`and 3 more` where there are more than are told, else ""."""
    return f"and {count - most} more" if count > most else ""


def listed(names: Sequence[Any], most: int = LISTED, separator: str = ", ", show: Callable[[Any], str] = str) -> str:
    """The first names, each as `show` writes it, and how many follow: `a, b and 3 more`."""
    return " ".join(filter(None, (separator.join(map(show, names[:most])), more(len(names), most))))


def lines(items: Sequence[str], most: int = LISTED) -> list[str]:
    """The first of these, one a line, and `... and 3 more` where more follow."""
    rest = more(len(items), most)
    return [*items[:most], *([f"... {rest}"] if rest else [])]


def columns(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """Rows of cells in columns, the first row as their heading; columns are right-aligned but for those in `left`."""
    shown = aligned(rows, left)
    shown.insert(1, "-" * max(map(len, shown)))
    return "\n".join(shown)


def aligned(rows: Sequence[Sequence[str]], left: Iterable[int] | None = None) -> list[str]:
    """Rows of cells as lines in columns, no heading; right-aligned but for those in `left` (None: all)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = set(range(len(widths)) if left is None else left)
    return [
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shown(path: str | Path) -> str:
    """A path for a message: as it is when it prints on one line, else escaped (control characters, broken UTF-8)."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else f"{text[:150]}...{text[-150:]}"


def differences(found: Any, wanted: Any, about: Mapping[str, str] = MappingProxyType({}), key: str = "") -> list[str]:
    """Where two trees of JSON values differ: `key: there 1, now 2` with the dotted key, in the order of the keys.

    Args:
        about: dotted keys whose values tell a reader nothing (digests) -> what they are of; these are told in words.
    """
    if found == wanted:
        return []
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = sorted({*found, *wanted})
        parts = (differences(found.get(n), wanted.get(n), about, f"{key}.{n}".lstrip(".")) for n in names)
        return [line for part in parts for line in part]
    if key in about:
        return [f"other {about[key]} ({key})"]
    return [f"{key}: there {_in_short(found)}, now {_in_short(wanted)}"]


def _in_short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def megabytes(count: int) -> str:
    """Bytes as MB (10^6) or GB (10^9)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
