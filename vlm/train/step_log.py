"""`metrics.csv`: one row per optimizer step, continued after a kill without doubled or torn rows."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm import files
from vlm.report.charts import Curve, Point, draw, smooth
from vlm.report.page import page
from vlm.train.stage_config import PARTS

COLUMNS = (
    "stage",
    "step",
    "loss",
    *(f"lr_{part}" for part in PARTS),
    "grad_norm",
    "examples_per_s",
    "tokens",
    "seen",
    "val_loss",
)
EVALUATION_COLUMNS = ("stage", "step", "task", "metric", "value", "num_items")
EVALUATIONS = "evaluations.csv"
"""Beside the metrics file: one row per metric of every evaluation during training."""


class MetricsFile:
    """Appends rows; `keep` decides about rows that an earlier process of the same run has left.

    Args:
        path: of the file; made with a header when it is not there.
        finished: names of the stages whose rows stay as they are.
        stage, step: of the stage to continue, rows after this step are cut (they will be written again).
        columns: of the file.
    """

    def __init__(
        self,
        path: Path,
        finished: Iterable[str] = (),
        stage: str = "",
        step: int = 0,
        columns: Sequence[str] = COLUMNS,
    ) -> None:
        done = set(finished)
        kept = [
            row for row in read(path) if row["stage"] in done or (row["stage"] == stage and int(row["step"]) <= step)
        ]
        self._path, self._columns = path, columns
        self._publish(kept)

    def write(self, *rows: Mapping[str, Any]) -> None:
        """Append rows, all at once; columns left out stay empty. Floats keep all their digits, so runs can be compared
        exactly."""
        with files.disk_errors(self._path):
            self._file.write(self._text(rows))
            self._file.flush()

    def amend(self, **values: Any) -> None:
        """Fill in columns of the last row."""
        rows = read(self._path)
        rows[-1] |= values
        self.close()
        self._publish(rows)

    def _publish(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file in one step, and go on at its end."""
        header = ",".join(self._columns) + "\n"
        files.write_text(self._path, header + self._text(rows))
        with files.disk_errors(self._path):
            self._file = self._path.open("a", newline="", encoding="utf-8")

    def _text(self, rows: Iterable[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()

    def close(self) -> None:
        with suppress(OSError):  # what a full disk has refused was told when it was written
            self._file.close()


def read(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics file; a torn last line is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(complete)) if None not in row and row["step"]]


def summary(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """Stage -> `steps`, `loss` of its last step, and `held_out_loss` where it was measured last."""
    stages: dict[str, dict[str, float]] = {}
    for row in rows:
        found = stages.setdefault(row["stage"], {})
        found["steps"] = int(row["step"])
        for name, column in (("loss", "loss"), ("held_out_loss", "val_loss")):
            if row.get(column):
                found[name] = float(row[column])
    return stages


def plot(path: Path, target: Path) -> None:
    """The charts of `curves` as a page that stands alone."""
    panels = "".join(f'<figure class="panel"><h3>{curve.title}</h3>{draw(curve)}</figure>' for curve in curves(path))
    body = f'<header><h1>Training</h1></header><div class="panels">{panels}</div>'
    files.write_text(target, page("Training", body))


def curves(path: Path) -> list[Curve]:
    """The loss of every stage, one after the other (a running mean, and the held-out loss as it is); then the
    evaluations beside the file, if there are any: one line per task and metric."""
    rows, evaluations = read(path), read(path.with_name(EVALUATIONS))
    stages: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    losses, held_out, firsts, first = dict[str, list[Point]](), dict[str, list[Point]](), dict[str, int](), 0
    for stage, own in stages.items():
        firsts[stage] = first
        steps = [first + int(row["step"]) for row in own if row["loss"]]
        losses[stage] = list(zip(steps, smooth([float(row["loss"]) for row in own if row["loss"]]), strict=True))
        validated = [(first + int(row["step"]), float(row["val_loss"])) for row in own if row["val_loss"]]
        if validated:
            held_out[f"{stage}, held out"] = [(float(step), value) for step, value in validated]
        first += max(int(row["step"]) for row in own)
    marks = [(float(start), stage) for stage, start in firsts.items()]
    charts = [Curve("Training loss", losses | held_out, "optimizer step", "loss", log_y=True, marks=marks)]
    scores: dict[str, list[Point]] = {}
    for row in evaluations:
        point = float(firsts.get(row["stage"], 0) + int(row["step"])), float(row["value"])
        scores.setdefault(f"{row['task']}: {row['metric']}", []).append(point)
    if scores:
        charts.append(Curve("Evaluation during training", scores, "optimizer step", "score", marks=marks))
    return charts
