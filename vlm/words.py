"""Words for people: lists that stop somewhere, and rows in columns."""

from collections.abc import Iterable, Sequence

LISTED = 10
"""So many names are told, and how many more there are."""


def listed(names: Sequence[str], most: int = LISTED, separator: str = ", ") -> str:
    """The first names, and how many follow: `a, b and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def lines(items: Sequence[str], most: int = LISTED) -> list[str]:
    """The first of these, one a line, and `... and 3 more` where more follow."""
    return [*items[:most], *([f"... and {len(items) - most} more"] if len(items) > most else [])]


def columns(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """Rows of cells in columns, the first row as their heading; columns are right-aligned but for those in `left`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    texts = set(left)
    shown = [
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    shown.insert(1, "-" * max(map(len, shown)))
    return "\n".join(shown)
