"""The parity report of an export: what was compared, how far apart the two sides were, and whether that passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlm.checkpoints.files import SINGLE
from vlm.checkpoints.weights import Weights
from vlm.errors import CheckpointError
from vlm.files import write_json
from vlm.words import aligned

FILE_NAME = "parity.json"
Parity = Literal["full", "weights", "none"]
"""How much of an export or import is proven: by running both sides, by reading the tensors back, or nothing."""


@dataclass(frozen=True)
class Limit:
    """How far apart two sides may be.

    Attributes:
        absolute: largest difference of two numbers, or None.
        relative: largest difference over the largest magnitude of the source, or None.
    """

    absolute: float | None = None
    relative: float | None = None

    def __str__(self) -> str:
        if self == EQUAL:
            return "equal"
        shown = [f"{self.relative:g} rel"] if self.relative is not None else []
        return ", ".join(shown + ([f"{self.absolute:g} abs"] if self.absolute is not None else []))


EQUAL = Limit(absolute=0.0)
# Both sides run in float32 on the same weights and with the same attention code, so what is left is the order of
# sums and positions that start at 0 here and at 1 in transformers. The erf GELU instead of the tanh one, the smallest
# mistake there is in a configuration, moves features by about 1e-3 of their range.
LIMITS = {
    "pixels": Limit(absolute=1e-6),
    "prompt ids": EQUAL,
    "tower features": Limit(relative=2e-5),
    "projected features": Limit(relative=2e-5),
    "logits": Limit(relative=1e-4),
    "logits with soft-cap": Limit(relative=1e-4),
    "loss": Limit(relative=1e-4),
    "greedy tokens": EQUAL,
}
"""Tolerance of each quantity."""


@dataclass(frozen=True)
class Row:
    """One compared quantity.

    Attributes:
        name: what was compared.
        max_abs: largest absolute difference (of ids: how many differ).
        max_rel: `max_abs` over the largest magnitude on the source's side; None for ids and tensors counted.
        limit: the tolerance as text; empty where the difference is only measured.
        ok: within the tolerance; None where it is only measured.
    """

    name: str
    max_abs: float
    max_rel: float | None
    limit: str
    ok: bool | None


@dataclass
class ParityReport:
    """The outcome of an export's comparison.

    Attributes:
        to: the format written, `paligemma` or `tower`.
        out: the directory.
        reader: transformers' class that opened it, with the version; empty when nothing was opened.
        dtype: of the written weights.
        rows: what was compared.
        notes: what a reader of the numbers has to know.
        samples: the images and texts that were run.
        texts: what both sides generated for the samples.
    """

    to: str
    out: str
    reader: str
    dtype: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No quantity is outside its tolerance."""
        return all(row.ok is not False for row in self.rows)

    def table(self) -> str:
        """The report for people."""
        lines = [("quantity", "max abs", "max rel", "tolerance", "")]
        marks = {True: "ok", False: "FAIL", None: "measured"}
        for row in self.rows:
            relative = "" if row.max_rel is None else f"{row.max_rel:.2g}"
            lines.append((row.name, f"{row.max_abs:.2g}", relative, row.limit, marks[row.ok]))
        return "\n".join([*aligned(lines), *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a difference that is no number (NaN somewhere) is null."""
        values = {"ok": self.ok, **asdict(self)}
        for row in values["rows"]:
            for key in ("max_abs", "max_rel"):
                if row[key] is not None and not math.isfinite(row[key]):
                    row[key] = None
        return values

    def write(self, folder: Path) -> None:
        """Save as `parity.json`."""
        write_json(folder / FILE_NAME, self.to_dict())

    def require(self) -> None:
        """Raise `CheckpointError` with the quantities that are outside their tolerance, if there are any."""
        failed = [row for row in self.rows if row.ok is False]
        if failed:
            shown = "; ".join(f"{row.name} differ by {row.max_abs:.3g} (tolerance {row.limit})" for row in failed)
            raise CheckpointError(
                f"{self.out}: the written checkpoint is not the model, nothing was left there: {shown}. This is a bug"
                f" of the export, or a disk that changes bytes; report it with the table:\n{self.table()}"
            )


def compare(name: str, source: Sequence[Tensor], written: Sequence[Tensor], limit: Limit | None) -> Row:
    """Largest difference between two lists of tensors; ids of unequal length differ in every place beyond the shorter.

    Args:
        source, written: one tensor per sample, the model's and the written checkpoint's.
        limit: the tolerance, or None to measure only.
    """
    if not source or len(source) != len(written):
        raise ValueError(f"{name}: {len(source)} tensors against {len(written)}")
    if limit == EQUAL:
        different = sum(_different_ids(a, b) for a, b in zip(source, written, strict=True))
        return Row(name, float(different), None, str(EQUAL), different == 0)
    if any(a.shape != b.shape for a, b in zip(source, written, strict=True)):
        return Row(name, math.inf, math.inf, str(limit or ""), False)
    # Not max(): a NaN must come through, and max() drops it.
    pairs = [(a.double(), b.double()) for a, b in zip(source, written, strict=True)]
    difference = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    size = float(torch.stack([a.abs().max() for a, _ in pairs]).max())
    relative = difference / size if size else (0.0 if difference == 0 else math.inf)
    ok = None
    if limit is not None:
        within = [limit.absolute is None or difference <= limit.absolute]
        ok = all([*within, limit.relative is None or relative <= limit.relative])
    return Row(name, difference, relative, str(limit or ""), ok)


def _different_ids(a: Tensor, b: Tensor) -> int:
    shorter = min(a.numel(), b.numel())
    a, b = a.flatten(), b.flatten()
    return int((a[:shorter] != b[:shorter]).sum()) + max(a.numel(), b.numel()) - shorter


def compare_files(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, single: str = SINGLE) -> Row:
    """Read the written weights again, one tensor at a time, and count those that are not the model's bit for bit."""
    stored = Weights(folder, single)
    different = len(set(stored.tensors) ^ set(tensors))
    for name in set(stored.tensors) & set(tensors):
        wanted = tensors[name].detach().to(device="cpu", dtype=dtype)
        different += not torch.equal(stored.read(name), wanted)
    return Row(f"{len(tensors)} tensors on disk", float(different), None, str(EQUAL), different == 0)
