"""A comparison as plain text and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from vlm.compare.answer import answer, names
from vlm.words import columns

PROBES = {"knn": "k-NN", "linear": "linear", "zero_shot": "zero-shot"}


def text(result: dict[str, Any]) -> str:
    """The tables for the terminal: quality, cost, the towers alone, what was fixed, what may be said."""
    arms = [arm for arm in result["arms"] if arm["seeds"]]
    blocks = [columns(quality(arms)), columns(cost(arms))]
    if any(arm["probes"] for arm in arms):
        blocks.append("Towers alone, before → after training (% of labelled test images)\n" + columns(probes(arms)))
    blocks.append(fixed_lines(result))
    if result["pairs"]:
        blocks.append(f"{pairs_note(result)}\n" + "\n".join(pair["says"] for pair in result["pairs"]))
    blocks.append("\n".join(answer(result, names(arms))))
    return "\n\n".join(blocks)


def quality(arms: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Heading and rows: each metric of each task."""
    columns = [(task, metric) for task, metrics in arms[0]["tasks"].items() for metric in metrics]
    head = ["run", "seeds", *(f"{task} {metric}" for task, metric in columns)]
    rows = [
        [arm["name"], str(len(arm["seeds"])), *(spread(arm["tasks"][task][metric]) for task, metric in columns)]
        for arm in arms
    ]
    return [head, *rows]


def cost(arms: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Heading and rows: tokens, parameters, operations, speed and memory."""
    head = [
        "run",
        "tokens",
        "params M",
        "trained M",
        "GFLOP/image",
        "train img/s",
        "train GB",
        "infer img/s",
        "infer GB",
    ]
    return [head, *([arm["name"], *_costs(arm)] for arm in arms)]


def _costs(arm: dict[str, Any]) -> list[str]:
    tokens, train, infer = arm["image_tokens"], arm["training"], arm["inference"]
    peak = train.get("peak_memory_bytes")
    return [
        number(tokens["mean"]) if tokens["min"] == tokens["max"] else f"{tokens['mean']:.1f}",
        number(arm["parameters"]["total"] / 1e6),
        number(arm["parameters"]["trained"] / 1e6),
        number(arm["flops"]["total"] / 1e9),
        number(train["images_per_second"]),
        "" if peak is None else f"{peak / 1e9:.2f}",
        number(infer["images_per_second"]),
        f"{infer['peak_memory_bytes'] / 1e9:.2f}",
    ]


def probes(arms: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Heading and rows: accuracy of the towers alone."""
    names = [name for name in PROBES if any(name in (arm["probes"] or {}) for arm in arms)]
    head = ["run", *(PROBES[name] for name in names)]
    return [head, *([arm["name"], *(_probe((arm["probes"] or {}).get(name)) for name in names)] for arm in arms)]


def _probe(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    change = found["change"]
    half = "" if change["half_width"] is None else f" ± {100 * change['half_width']:.1f}"
    return f"{100 * found['before']:.1f} → {100 * found['after']['mean']:.1f} ({100 * change['mean']:+.1f}{half})"


def fixed_lines(result: dict[str, Any]) -> str:
    """What was held fixed, in a line, or what was not."""
    broken = [item for item in result["held_fixed"] if not item["held"]]
    if broken:
        lines = [f"  {item['what']}: {item['detail']}" for item in broken]
        return "\n".join(["NOT HELD FIXED, so nothing is said about which is better:", *lines])
    lines = [f"Held fixed: {'; '.join(item['what'] for item in result['held_fixed'])}."]
    other = [f"  {item['what']}: {item['detail']}" for item in result["conditions"] if not item["held"]]
    if other:
        lines += ["Speeds and memory were measured under different conditions:", *other]
    return "\n".join(lines)


def pairs_note(result: dict[str, Any]) -> str:
    """What the p values rest on."""
    return (
        "Pairs, on the same test items (bootstrap and sign-flip test over images; p corrected by Holm over"
        f" {len(result['pairs'])} tests), for the seeds that were trained:"
    )


def spread(found: dict[str, Any]) -> str:
    """Mean and half the interval; scores up to 1 in percent."""
    scale, digits = (100, 1) if found["maximum"] == 1.0 else (1, 3)
    mean = f"{scale * found['mean']:.{digits}f}"
    return mean if found["half_width"] is None else f"{mean} ± {scale * found['half_width']:.{digits}f}"


def number(value: float) -> str:
    """Three digits that count, without exponents."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def as_csv(runs: Sequence[dict[str, Any]]) -> str:
    """One line per run (`measurements.json` of each), for other programs."""
    rows = [_csv_row(run) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _csv_row(run: dict[str, Any]) -> dict[str, Any]:
    row = {name: run[name] for name in ("arm", "encoder", "encoder_kind", "projector", "seed")}
    for task, facts in run["tasks"].items():
        row |= {f"{task}.{metric}": found["value"] for metric, found in facts["metrics"].items()}
    row |= {f"image_tokens.{name}": run["image_tokens"][name] for name in ("mean", "min", "max")}
    row |= {
        f"parameters.{name}": run["parameters"][name]
        for name in ("total", "trained", "encoder", "projector", "decoder")
    }
    row |= {f"flops.{name}": value for name, value in run["flops"].items()}
    for phase in ("training", "inference"):
        row |= {f"{phase}.{name}": run[phase].get(name) for name in ("images_per_second", "peak_memory_bytes")}
    row["training.seconds"] = run["training"]["seconds"]
    for when in ("before", "after"):
        found = (run["probes"] or {}).get(when, {})
        row |= {f"probe.{name}.{when}": result["accuracy"] for name, result in found.items()}
    return row
