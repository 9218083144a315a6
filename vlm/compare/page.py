"""The report of a comparison: one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.compare import table
from vlm.compare.answer import answer, names, shown
from vlm.compare.disagreements import cards, one_seed
from vlm.compare.runs import Spec
from vlm.compare.statistics import p_text
from vlm.data.examples import Example
from vlm.report.charts import Curve, Dot, Point, Scatter, smooth
from vlm.report.page import Section
from vlm.report.scores import Score, Scores, Stat, Stats, Table, Text
from vlm.report.sections import Curves, Gallery, write_report
from vlm.train import step_log

CARDS = 48


def write(path: Path, result: dict[str, Any], finished: Sequence[Spec], tasks: Mapping[str, Sequence[Example]]) -> Path:
    """Write the page.

    Args:
        result: what `comparison.json` holds.
        finished: the runs with measurements.
        tasks: the items of each task.
    """
    arms = [arm for arm in result["arms"] if arm["seeds"]]
    short = names(arms)
    sections: list[Section] = [_tiles(result, short), Text("Answer", answer(result, short))]
    sections += [_quality(task, arms, short) for task in tasks]
    sections.append(Curves(_plots(arms, short, list(tasks)), title="Quality against cost", note=SCATTER_NOTE))
    sections.append(_table("What it costs", table.cost(arms), short, COST_NOTE))
    if any(arm["probes"] for arm in arms):
        sections.append(_table("Did training hurt the tower?", table.probes(arms), short, _probe_note(arms, short)))
    sections += _pairs(result, short)
    sections += [_fixed(result), _matching(result, short)]
    sections.append(Curves(_losses(finished, short), title="Training", note=LOSS_NOTE))
    sections += _galleries(finished, tasks, arms[0]["tasks"], short)
    return write_report(
        path,
        title="Which vision tower?",
        subtitle=_subtitle(arms, result),
        sections=sections,
        footer=_footer(result),
    )


SCATTER_NOTE = (
    "Whiskers: 95 % t-interval of the mean over seeds, without a cap where it leaves the frame; small points: single"
    " seeds. Towers of the same cost are set side by side."
)
COST_NOTE = (
    "Tokens: mean over test images, after the projector. GFLOP: tower, projector and reading the prompt, 2 per"
    " multiply-add. Speeds: training, images of the whole run per second of its steps; inference, whole answers in"
    " batches. Memory: the largest of each phase, in a process of its own, libraries included on a CPU."
)
LOSS_NOTE = "Mean over seeds, smoothed. Seconds are those of the steps, at the median speed of each stage."
PROBE_NOTE = (
    "Accuracy on labelled images of classifiers on the tower's mean patch feature (zero-shot: with the checkpoint's"
    " text tower), as the run began → after training (change, with its 95 % interval over seeds)."
)


def _subtitle(arms: Sequence[dict[str, Any]], result: dict[str, Any]) -> str:
    seeds = len(result["settings"]["seeds"])
    what = [f"{len(arms)} towers" if len({arm["projector"] for arm in arms}) == 1 else f"{len(arms)} combinations"]
    what.append("1 seed" if seeds == 1 else f"{seeds} seeds")
    return f"{', '.join(what)}; {'everything else the same' if result['all_held'] else 'not everything held fixed'}"


# --- tiles, tables and charts -----------------------------------------------------------------------------------------


def _tiles(result: dict[str, Any], short: Mapping[str, str]) -> Stats:
    tiles = [
        Stat(f"best on {verdict['task']}", short[verdict["best"]], shown(verdict["mean"], verdict["maximum"]))
        for verdict in result["verdicts"]
    ]
    held = sum(item["held"] for item in result["held_fixed"])
    total = len(result["held_fixed"])
    tone = "good" if held == total else "bad"
    tiles.append(Stat("held fixed", f"{held} of {total}", "checked by digest", tone=tone))
    done = sum(len(arm["seeds"]) for arm in result["arms"])
    runs = done + len(result["failed"])
    tiles.append(Stat("runs finished", f"{done} of {runs}", tone="bad" if result["failed"] else ""))
    return Stats(tiles)


def _quality(task: str, arms: Sequence[dict[str, Any]], short: Mapping[str, str]) -> Scores:
    """Every metric of a task, the best arm first."""
    rows = []
    for metric, one in arms[0]["tasks"][task].items():
        sign = -1 if one["higher_is_better"] else 1
        several = len(arms[0]["tasks"][task]) > 1
        largest = max(arm["tasks"][task][metric]["mean"] for arm in arms)
        top = 1.0 if one["maximum"] == 1.0 else 1.5 * largest if largest > 0 else None
        for arm in sorted(arms, key=lambda arm: sign * arm["tasks"][task][metric]["mean"]):
            found = arm["tasks"][task][metric]
            ends = found["interval_95"]
            rows.append(
                Score(
                    f"{metric}, {short[arm['name']]}" if several else short[arm["name"]],
                    found["mean"],
                    interval=None if ends is None else (ends[0], ends[1]),
                    num_items=found["num_items"],
                    maximum=top,
                    percent=one["maximum"] == 1.0,
                )
            )
    first = next(iter(arms[0]["tasks"][task].values()))
    seeds = max(len(arm["seeds"]) for arm in arms)
    about = f"mean and 95 % t-interval over {seeds} seeds" if seeds > 1 else "one seed: no interval can be given"
    return Scores(rows, title=f"{task}: {', '.join(arms[0]['tasks'][task])}", note=f"{first['rule']}; {about}.")


def _plots(arms: Sequence[dict[str, Any]], short: Mapping[str, str], tasks: Sequence[str]) -> list[Scatter]:
    plots = []
    for task in tasks:
        metric, one = next(iter(arms[0]["tasks"][task].items()))
        scale = 100 if one["maximum"] == 1.0 else 1
        unit = f"{metric}, %" if scale == 100 else metric
        for title, label, cost in (
            ("image tokens", "image tokens per image", lambda arm: arm["image_tokens"]["mean"]),
            ("operations", "GFLOP per image", lambda arm: arm["flops"]["total"] / 1e9),
        ):
            dots = []
            for arm in arms:
                found = arm["tasks"][task][metric]
                each = [scale * value for value in found["per_seed"].values()]
                low, high = (scale * end for end in found["interval_95"]) if found["interval_95"] else (None, None)
                dots.append(Dot(short[arm["name"]], cost(arm), scale * found["mean"], low, high, each))
            plots.append(Scatter(f"{task} against {title}", dots, label, unit))
    return plots


def _losses(finished: Sequence[Spec], short: Mapping[str, str]) -> list[Curve]:
    """The loss of every arm, mean over its seeds, against the steps of all stages end to end and against their time."""
    losses: dict[str, list[list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for spec in finished:
        rows = step_log.read(spec.run.out / "metrics.csv")
        losses.setdefault(spec.arm, []).append([float(row["loss"]) for row in rows])
        if spec.arm not in seconds:
            seconds[spec.arm] = _clock(spec.measurements()["training"]["stages"])
            stages = [row["stage"] for row in rows]
    marks = [(float(stages.index(name)), name) for name in dict.fromkeys(stages)]
    by_step, by_time = dict[str, list[Point]](), dict[str, list[Point]]()
    for arm, curves in losses.items():
        means = [math.fsum(values) / len(values) for values in zip(*curves, strict=False)]
        running = smooth(means)
        by_step[short[arm]] = [(float(step), value) for step, value in enumerate(running, 1)]
        by_time[short[arm]] = list(zip(seconds[arm], running, strict=False))
    return [
        Curve("Training loss against steps", by_step, "optimizer step", "loss", log_y=True, marks=marks),
        Curve("Training loss against time", by_time, "seconds", "loss", log_y=True),
    ]


def _clock(stages: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds after each step of all stages."""
    now, times = 0.0, []
    for stage in stages:
        per_step = stage["images"] / stage["images_per_second"] / stage["steps"]
        for _ in range(stage["steps"]):
            now += per_step
            times.append(now)
    return times


def _table(title: str, rows: Sequence[Sequence[str]], short: Mapping[str, str], note: str) -> Table:
    head, *body = rows
    return Table(title, ["", *head[1:]], [[short[row[0]], *row[1:]] for row in body], note)


def _probe_note(arms: Sequence[dict[str, Any]], short: Mapping[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for arm in arms:
        if arm["no_zero_shot"]:
            reasons.setdefault(arm["no_zero_shot"], []).append(short[arm["name"]])
    both = max((found["images_in_both"] for arm in arms for found in (arm["probes"] or {}).values()), default=0)
    warning = [f"{both} images are in both the training and the test set, and may be learnt by heart."] if both else []
    told = [f"No zero-shot for {', '.join(who)}: {why}." for why, who in reasons.items()]
    return " ".join([PROBE_NOTE, *warning, *told])


def _pairs(result: dict[str, Any], short: Mapping[str, str]) -> list[Section]:
    if not result["pairs"]:
        return []
    rows = []
    for pair in result["pairs"]:
        ends = pair["interval"]
        said = f"{short[pair[pair['better']]]} is better" if pair["better"] else "no difference shown"
        rows.append(
            [
                pair["task"],
                f"{short[pair['first']]} − {short[pair['second']]}",
                f"{pair['difference']:+.3f}",
                "" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}",
                p_text(pair["p_holm"]).removeprefix("p = ").removeprefix("p "),
                f"{pair['seeds_agree']} of {pair['num_seeds']}",
                said,
            ]
        )
    note = (
        "On the same test items, scores averaged over seeds. Interval: 95 %, bootstrap over images; p: sign-flip test"
        f" over images, corrected by Holm over these {len(rows)} tests. “Better” needs an interval without 0, p below"
        " 0.05 and the same sign in every seed. This covers which images were asked; how training varies, the seeds"
        " show."
    )
    head = ["task", "pair", "difference", "95 % interval", "p", "same sign in seeds", ""]
    return [Table("Pair by pair", head, rows, note)]


def _fixed(result: dict[str, Any]) -> Table:
    rows = [["✓" if item["held"] else "✗ differs", item["what"], item["detail"]] for item in result["held_fixed"]]
    rows += [
        ["✓" if item["held"] else "✗ differs", f"{item['what']} (for speeds only)", _flat(item["detail"])]
        for item in result["conditions"]
    ]
    note = "Compared by sha256 of what each run really used (the first 12 digits are shown), not of what it was told."
    return Table("Held fixed", ["", "what", "value"], rows, note)


def _flat(detail: str) -> str:
    return detail.translate(str.maketrans("", "", "{}'\""))


def _matching(result: dict[str, Any], short: Mapping[str, str]) -> Table:
    how = result["settings"]["match"]
    rows = []
    for arm in result["arms"]:
        tokens = arm.get("image_tokens")
        spread = "" if tokens is None else f"{tokens['mean']:.4g} ({tokens['min']} to {tokens['max']})"
        exact = "" if how == "none" else "✓" if arm["match"]["exact"] else "not exactly"
        rows.append(
            [short.get(arm["name"], arm["name"]), arm["kind"], arm["images"], spread, arm["match"]["note"], exact]
        )
    notes = {
        "tokens": "Brought to the same number of image tokens by the images' size, as far as whole patches allow.",
        "resolution": "Brought to the same resolution, as far as whole patches allow.",
        "none": "Each tower reads images at its own size.",
    }
    return Table(
        f"Matched by {how}" if how != "none" else "Not matched",
        ["", "kind", "images", "tokens measured", "what was done", "matched"],
        rows,
        notes[how],
    )


def _galleries(
    finished: Sequence[Spec],
    tasks: Mapping[str, Sequence[Example]],
    metrics_of: Mapping[str, Any],
    short: Mapping[str, str],
) -> list[Section]:
    sections: list[Section] = []
    for task, examples in tasks.items():
        found = cards(finished, task, next(iter(metrics_of[task])), examples, CARDS // len(tasks), short)
        if found:
            note = f"Items on which towers differ, drawn at random (one seed: {one_seed(finished)[0].seed})."
            sections.append(Gallery(found, title=f"Where towers disagree: {task}", note=note))
    return sections


def _footer(result: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{name}: {path}" for name, path in result["settings"]["tasks"].items())
    skipped = f"Images that could not be decoded: {result['skipped_items']} answers, counted as wrong."
    return [f"Tasks: {sizes}", skipped if result["skipped_items"] else "All images could be decoded."]
