"""What a comparison says, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def names(arms: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Name of an arm -> name on the page: without the projector where all have the same."""
    one = len({arm["projector"] for arm in arms}) == 1
    return {arm["name"]: arm["encoder"] if one else arm["name"] for arm in arms}


def answer(result: dict[str, Any], short: Mapping[str, str]) -> list[str]:
    """What the comparison says, a sentence or two per task."""
    if not result["all_held"]:
        broken = ", ".join(item["what"] for item in result["held_fixed"] if not item["held"])
        return [f"Nothing can be said about which is better: not held fixed: {broken}. See what was held fixed."]
    told = [_verdict(verdict, result, short) for verdict in result["verdicts"]]
    seeds = max(len(arm["seeds"]) for arm in result["arms"])
    told.append(
        "“Shown to be better” is said of these trained models, on other images of the same kind. "
        + (
            "With one seed, how much training varies by chance is not known, and no interval can be given."
            if seeds < 2
            else f"How much training varies by chance, the intervals over {seeds} seeds say."
        )
    )
    if result["failed"]:
        told += [f"Failed, and left out: {run}: {why}" for run, why in result["failed"].items()]
    return told


def _verdict(verdict: dict[str, Any], result: dict[str, Any], short: Mapping[str, str]) -> str:
    value = shown(verdict["mean"], verdict["maximum"])
    text = f"{verdict['task']} ({verdict['metric']}): {short[verdict['best']]} has the best mean, {value}."
    if verdict["better_than"]:
        text += f" It is shown to be better than {_listed(short[name] for name in verdict['better_than'])}."
    rest = verdict["not_shown_better_than"]
    if rest:
        text += f" It is not shown to be better than {_listed(short[name] for name in rest)}"
        flops = {arm["name"]: arm["flops"]["total"] for arm in result["arms"] if arm["seeds"]}
        cheapest = min([verdict["best"], *rest], key=lambda name: flops[name])
        if cheapest != verdict["best"]:
            share = 1 - flops[cheapest] / flops[verdict["best"]]
            text += f", of which {short[cheapest]} costs {100 * share:.0f} % fewer operations per image"
        text += "."
    return text


def _listed(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} or {last}" if most else str(last)


def shown(value: float, maximum: float | None) -> str:
    """A score as people read it: those up to 1 in percent."""
    return f"{100 * value:.1f} %" if maximum == 1.0 else f"{value:.3f}"
