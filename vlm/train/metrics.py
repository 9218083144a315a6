"""`metrics.csv`: one row per optimizer step, continued after a kill without doubled or torn rows."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlm.train.config import PARTS

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
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text.getvalue())
        os.replace(temporary, path)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, **row: Any) -> None:
        """Append a row; columns left out stay empty. Floats keep all their digits, so runs can be compared exactly."""
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics file; a torn last line is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(complete)) if None not in row and row["step"]]


def plot(path: Path, target: Path) -> None:
    """The loss of every stage, one after the other, as a PNG: each step and a running mean; below, the evaluations."""
    from matplotlib.figure import Figure

    rows, evaluations = read(path), read(path.with_name(EVALUATIONS))
    figure = Figure(figsize=(8, 8 if evaluations else 4.5), layout="constrained")
    panels = figure.subplots(2 if evaluations else 1, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].set(ylabel="loss", title="training loss")
    panels[-1].set_xlabel("optimizer step")
    firsts = _plot_losses(panels[0], rows)
    if evaluations:
        _plot_evaluations(panels[1], evaluations, firsts)
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=120)


def _plot_losses(axes: Any, rows: list[dict[str, str]]) -> dict[str, int]:
    """Draw the losses; returns the number of steps before each stage."""
    first, firsts = 0, {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        firsts[stage] = first
        own = [row for row in rows if row["stage"] == stage]
        losses = [float(row["loss"]) for row in own if row["loss"]]
        steps = [first + int(row["step"]) for row in own if row["loss"]]
        (line,) = axes.plot(steps, _smooth(losses), label=stage)
        axes.plot(steps, losses, color=line.get_color(), alpha=0.25, linewidth=0.7)
        validated = [(first + int(row["step"]), float(row["val_loss"])) for row in own if row["val_loss"]]
        if validated:
            axes.plot(
                *zip(*validated, strict=True), "o--", color=line.get_color(), markersize=3, label=f"{stage}, held out"
            )
        first = steps[-1] if steps else first
    return firsts


def _plot_evaluations(axes: Any, rows: list[dict[str, str]], firsts: dict[str, int]) -> None:
    """One line per task and metric, through all stages."""
    axes.set(ylabel="score", title="evaluation during training")
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        own = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        steps = [firsts.get(row["stage"], 0) + int(row["step"]) for row in own]
        axes.plot(steps, [float(row["value"]) for row in own], "o-", markersize=3, label=f"{task}: {metric}")


def _smooth(values: list[float]) -> list[float]:
    """Exponential running mean over about a fiftieth of the stage, corrected for its start."""
    keep = 1 - 1 / max(1, len(values) // 50)
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth
