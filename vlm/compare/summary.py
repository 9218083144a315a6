"""From the measurements of all runs to one comparison: figures per arm, pairs with their significance, verdicts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vlm.compare import fixed, statistics
from vlm.compare.items import item_scores
from vlm.compare.matched import Matched
from vlm.compare.runs import Spec

EXECUTION = ("images_per_second", "encoder_images_per_second", "peak_memory_bytes", "seconds")
"""Figures that depend on the machine and differ from run to run."""


def summarise(
    specs: Sequence[Spec],
    matched: Sequence[Matched],
    groups: Mapping[str, Mapping[str, str]],
    failed: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that `comparison.json` holds.

    Args:
        specs: all runs; those without measurements are left out, and named in `failed`.
        matched: the arms, in the order of the tables.
        groups: task -> item id -> image, for the tests over items.
        failed: run -> why.
        settings: what the comparison was asked for.
    """
    done = [(spec, spec.measurements()) for spec in specs if spec.finished]
    runs = [run for _, run in done]
    held = fixed.check(runs)
    arms = [_arm(item, [run for run in runs if run["arm"] == item.arm.name]) for item in matched]
    sound = all(item.held for item in held)
    pairs = pairs_of(done, [item.arm.name for item in matched], groups) if sound else []
    present = [arm for arm in arms if arm["seeds"]]
    return {
        "settings": dict(settings),
        "arms": arms,
        "pairs": pairs,
        "verdicts": [verdict(task, present, pairs) for task in (present[0]["tasks"] if present else ())]
        if sound
        else [],
        "held_fixed": [item.to_dict() for item in held],
        "all_held": sound,
        "conditions": [item.to_dict() for item in fixed.conditions(runs)],
        "failed": dict(failed),
        "skipped_items": sum(task["skipped"] for run in runs for task in run["tasks"].values()),
        "failed_training_images": sum(run["training"]["failed_images"] for run in runs),
    }


# --- per arm


def _arm(matched: Matched, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": matched.arm.name,
        "encoder": matched.arm.encoder,
        "projector": matched.arm.projector,
        "kind": matched.kind,
        "images": matched.transform.describe(),
        "seeds": [run["seed"] for run in runs],
        "match": {"exact": matched.exact, "note": matched.note, "expected_tokens": matched.tokens},
    }
    if not runs:
        return facts
    first = runs[0]
    return {
        **facts,
        "tasks": {name: _task(name, runs) for name in first["tasks"]},
        "image_tokens": first["image_tokens"],
        "parameters": first["parameters"],
        "flops": first["flops"],
        "training": _execution([run["training"] for run in runs]),
        "inference": _execution([run["inference"] for run in runs]),
        "probes": _probes(runs),
        "no_zero_shot": (first.get("probes") or {}).get("no_zero_shot"),
    }


def _task(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metric -> mean and interval over seeds."""
    told: dict[str, Any] = {}
    for metric, one in runs[0]["tasks"][name]["metrics"].items():
        values = [run["tasks"][name]["metrics"][metric]["value"] for run in runs]
        told[metric] = {
            **_spread(values),
            "per_seed": {str(run["seed"]): value for run, value in zip(runs, values, strict=True)},
            "num_items": one["num_items"],
            "maximum": one["maximum"],
            "higher_is_better": one["higher_is_better"],
            "rule": one["rule"],
        }
    return told


def _spread(values: Sequence[float]) -> dict[str, Any]:
    found = statistics.over_seeds(values)
    ends = None if found.half_width is None else [found.mean - found.half_width, found.mean + found.half_width]
    return {"mean": found.mean, "half_width": found.half_width, "interval_95": ends, "num_seeds": found.num_seeds}


def _execution(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of rates and seconds over seeds; the largest peak."""
    told: dict[str, Any] = {}
    for name in EXECUTION:
        values = [part[name] for part in parts if part.get(name) is not None]
        if values:
            told[name] = max(values) if name == "peak_memory_bytes" else math.fsum(values) / len(values)
    return told


def _probes(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Probe -> accuracy before and after training, and the change, over seeds."""
    if any(run.get("probes") is None for run in runs):
        return None
    told = {}
    for name, before in runs[0]["probes"]["before"].items():
        pairs = [(run["probes"]["before"][name], run["probes"]["after"].get(name)) for run in runs]
        if any(after is None for _, after in pairs):
            continue
        told[name] = {
            "before": _spread([b["accuracy"] for b, _ in pairs])["mean"],
            "after": _spread([a["accuracy"] for _, a in pairs]),
            "change": _spread([a["accuracy"] - b["accuracy"] for b, a in pairs]),
            "num_test": before["num_test"],
            "num_classes": before["num_classes"],
            "images_in_both": before["settings"].get("images_in_both", 0),
        }
    return told


# --- pairs


def pairs_of(
    done: Sequence[tuple[Spec, dict[str, Any]]], arms: Sequence[str], groups: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Every pair of arms on the first metric of every task, over the seeds that both have; p corrected over all."""
    folders = {(run["arm"], run["seed"]): spec.folder for spec, run in done}
    tested: list[dict[str, Any]] = []
    for task, groups_of in groups.items():
        metric, better = _main_metric(done, task)
        scores = {key: item_scores(folder, task, metric) for key, folder in folders.items()}
        for first, second in itertools.combinations(arms, 2):
            seeds = sorted({seed for arm, seed in folders if arm == first} & {s for arm, s in folders if arm == second})
            if not seeds:
                continue
            sides = [[_signed(scores[arm, seed], better) for seed in seeds] for arm in (first, second)]
            found = statistics.paired(sides[0], sides[1], groups_of)
            tested.append({"task": task, "metric": metric, "first": first, "second": second, "result": found})
    adjusted = statistics.holm([entry["result"].p for entry in tested])
    told = []
    for entry, p in zip(tested, adjusted, strict=True):
        found = entry.pop("result")
        says = statistics.sentence(entry["first"], entry["second"], entry["task"], found, p)
        told.append({**entry, **asdict(found), "p_holm": p, "better": statistics.winner(found, p), "says": says})
    return told


def _main_metric(done: Sequence[tuple[Spec, dict[str, Any]]], task: str) -> tuple[str, bool]:
    """The first metric of a task, and whether more of it is better."""
    name, facts = next(iter(done[0][1]["tasks"][task]["metrics"].items()))
    return str(name), bool(facts["higher_is_better"])


def _signed(scores: Mapping[str, float], better: bool) -> Mapping[str, float]:
    return scores if better else {key: -value for key, value in scores.items()}


# --- verdicts


def verdict(task: str, arms: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Which arm is best on a task, which are shown to be worse, and which may be as good."""
    metric = next(iter(arms[0]["tasks"][task]))
    sign = 1 if arms[0]["tasks"][task][metric]["higher_is_better"] else -1
    best = max(arms, key=lambda arm: sign * arm["tasks"][task][metric]["mean"])
    worse: list[str] = []
    open_: list[str] = []
    for arm in arms:
        if arm is best:
            continue
        pair = next(
            (p for p in pairs if p["task"] == task and {p["first"], p["second"]} == {arm["name"], best["name"]}), None
        )
        won = pair is not None and pair["better"] and pair[pair["better"]] == best["name"]
        (worse if won else open_).append(arm["name"])
    return {
        "task": task,
        "metric": metric,
        "best": best["name"],
        "mean": best["tasks"][task][metric]["mean"],
        "maximum": best["tasks"][task][metric]["maximum"],
        "better_than": worse,
        "not_shown_better_than": open_,
    }
