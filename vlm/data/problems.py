"""What is wrong with lines of an annotation file, and how many of them are told in how few lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm import words

MAX_LISTED = 1000
"""How many problems an error message lists; it always says how many there are."""
MAX_ALIKE = 3
"""More lines with the same mistake are one problem in a message, with their count and numbers."""


@dataclass(frozen=True)
class Problem:
    """Why one line of an annotation file cannot be used; line 0: why something that was named or found cannot."""

    file: str
    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.code}: {self.message}"


class Refused(Exception):
    """A line that cannot be used: carries the code and the message of its `Problem`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def refusal(problems: Sequence[Problem], name: str, num_good: int) -> str:
    """One problem as one line; several under a line that counts them."""
    if len(problems) == 1 and num_good:
        return str(problems[0])
    total = len(problems) + num_good
    lines = listing(problems)
    if len(lines) == 1 and len(problems) > 1:
        return f"{lines[0]} ({total:,} annotations in the file)"
    head = f"{name}: {len(problems)} of {total} annotations cannot be used:"
    return "\n".join([head, *words.lines(lines, MAX_LISTED)])


def listing(problems: Sequence[Problem]) -> list[str]:
    """One line per problem, in order; a mistake that more than `MAX_ALIKE` lines have is one line with their count,
    their numbers and what the first of them says."""
    alike: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        # Names and numbers differ between lines with the same mistake.
        mistake = re.sub(r"\S*[\d/\\.]\S*", "...", problem.message)
        alike.setdefault((problem.file, problem.code, mistake), []).append(problem)
    files = {name: place for place, name in enumerate(dict.fromkeys(problem.file for problem in problems))}
    lines: list[tuple[int, int, str]] = []
    for group in alike.values():
        first = group[0]
        if len(group) <= MAX_ALIKE:
            lines += [(files[problem.file], problem.line, str(problem)) for problem in group]
            continue
        same = all(problem.message == first.message for problem in group)
        said = first.message if same else f"{first.message}, and so on"
        text = f"{first.file}: {len(group):,} lines ({spans([p.line for p in group])}): {first.code}: {said}"
        lines.append((files[first.file], first.line, text))
    return [text for *_, text in sorted(lines)]


def spans(numbers: Sequence[int], most: int = 8) -> str:
    """Rising numbers in few characters: "1-4, 7, 9-12 and more"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown_runs = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:most]]
    return ", ".join(shown_runs) + (" and more" if len(runs) > most else "")
