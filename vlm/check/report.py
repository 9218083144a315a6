"""What a check found, and the report of all of them: a table for people, JSON values for programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlm.words import aligned

Status = Literal["ok", "FAIL", "n/a"]
Relation = Literal["<=", ">="]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check function returns.

    Attributes:
        measured, limit: the number and what it is held against; None where nothing could be measured.
        relation: how the number must stand to the limit.
        detail: what the number is.
        problem: what is wrong besides the number; makes the check fail.
        reason: why the check does not apply to this model.
    """

    measured: float | None = None
    limit: float | None = None
    relation: Relation = "<="
    detail: str = ""
    problem: str = ""
    reason: str = ""

    @property
    def status(self) -> Status:
        if self.reason:
            return "n/a"
        return "FAIL" if self.problem or not self._holds() else "ok"

    def _holds(self) -> bool:
        if self.measured is None or self.limit is None:
            return True
        # A NaN compares false both ways and so fails.
        return self.measured <= self.limit if self.relation == "<=" else self.measured >= self.limit


def not_applicable(reason: str) -> Finding:
    """The check says nothing about this model."""
    return Finding(reason=reason)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the report.

    Attributes:
        name: of the check, as `only` takes it.
        title: what should hold.
        status: `ok`, `FAIL` or `n/a`.
        measured, relation, limit: the number, `<=` or `>=`, and its limit; None where nothing was measured.
        detail: what the number is, what is wrong, or why the check does not apply.
        seconds: time taken.
    """

    name: str
    title: str
    status: Status
    measured: float | None
    relation: Relation
    limit: float | None
    detail: str
    seconds: float

    @classmethod
    def of(cls, name: str, title: str, finding: Finding, seconds: float) -> Result:
        texts = (finding.reason, finding.problem, finding.detail)
        return cls(
            name=name,
            title=title,
            status=finding.status,
            measured=finding.measured,
            relation=finding.relation,
            limit=finding.limit,
            # One line, whatever an error message held.
            detail=" ".join("; ".join(text for text in texts if text).split()),
            seconds=round(seconds, 3),
        )

    @property
    def numbers(self) -> str:
        """`measured relation limit`, or what there is of it."""
        if self.measured is None or self.limit is None:
            return "-"
        return f"{number(self.measured)} {self.relation} {number(self.limit)}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All results, and what was checked.

    Attributes:
        model: its path, or "" for one that has none.
        dtype, device, attention: as found; the checks leave them as they are.
        results: in the order of the table of checks.
    """

    model: str
    dtype: str
    device: str
    attention: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status == "FAIL")

    def __getitem__(self, name: str) -> Result:
        """The result of one check."""
        return {result.name: result for result in self.results}[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that JSON cannot write (NaN, infinity) becomes text."""
        values = asdict(self)
        for result in values["results"]:
            if result["measured"] is not None and not math.isfinite(result["measured"]):
                result["measured"] = str(result["measured"])
        return {**values, "results": list(values["results"]), "ok": self.ok}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def table(self) -> str:
        """One line per check: status, name, numbers, detail; then the counts."""
        rows = [(result.status, result.name, result.numbers, result.detail) for result in self.results]
        counts = [sum(result.status == status for result in self.results) for status in ("ok", "FAIL", "n/a")]
        subject = f"{self.model or 'model'} ({self.dtype}, {self.device}, {self.attention} attention)"
        return "\n".join([*aligned(rows), "", f"{subject}: {counts[0]} ok, {counts[1]} FAIL, {counts[2]} n/a"])


def number(value: float) -> str:
    """Counts as they are, measurements with two digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1e}"
