"""What a command says of pictures that it cannot use, one by one, and how it ends then."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from vlm import children
from vlm.cli import console
from vlm.data.problems import Problem


@dataclass
class Told:
    """Results and refusals as they are printed, and how many there were."""

    as_json: bool
    good: int = 0
    bad: int = 0

    def refused(self, name: str, code: str, message: str) -> None:
        """One picture, or line of a source, that cannot be used."""
        self.bad += 1
        if self.as_json:
            print(json.dumps({"image": name, "error": message, "code": code}), flush=True)
        else:
            print(f"error: {code}: {message}", file=sys.stderr)

    def problem(self, problem: Problem) -> None:
        """A line or a file of a source that cannot be used."""
        place = f"{problem.file}:{problem.line}" if problem.line else problem.file
        self.refused(place, problem.code, f"{place}: {problem.message}")

    def code(self) -> int:
        """The exit code; says what was left out."""
        if self.bad and self.good + self.bad > 1:
            print(f"{self.bad} of {self.good + self.bad} pictures could not be used", file=sys.stderr)
        return console.OK if not self.bad else console.SKIPPED if self.good else children.REFUSED
