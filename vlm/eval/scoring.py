"""Score a file of predictions against a file of annotations, without a model.

    outcome = score_files("results.json", "annotations.json", "vqa_accuracy")
    print(table(outcome))

The denominator is what the annotations hold. It becomes smaller only on request (`only_predicted`, `split`) or where
the official script leaves items out by its own rule, and every such number is among the notes of the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.data.items import Item, check_same
from vlm.errors import ConfigError, DataError
from vlm.eval import metrics as all_metrics
from vlm.eval.gold import read_gold, read_predictions, read_questions
from vlm.eval.metrics import Metric, MetricResult, registry
from vlm.eval.tables import constant
from vlm.files import sha256
from vlm.version import __version__
from vlm.words import aligned, listed

BREAKDOWNS = (
    *("question_type", "answer_type", "split", "structural", "semantic", "subject", "grade", "kind", "category"),
    *("language", "label"),
)
"""Facts by which scores are broken down where the annotations have them."""
MAX_PARTS = 200
"""A fact with more values than this is no breakdown."""


def score_files(
    predictions: str | Path,
    references: str | Path,
    metrics: str | Sequence[str],
    *,
    questions: str | Path | None = None,
    format: str | None = None,
    predictions_format: str | None = None,
    only_predicted: bool = False,
    split: str | None = None,
    by: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score predictions that somebody made against annotations, in the benchmarks' own file formats.

    Args:
        predictions, references: the files; the formats are told from their content.
        metrics: names, as a list or comma-separated.
        questions: VQA's questions file, whose ids must be those of the annotations.
        format, predictions_format: force the format of the references (`vlm.eval.gold.gold_formats()`) or predictions
            (`prediction_formats()`).
        only_predicted: leave out items without a prediction, and say how many; refused otherwise.
        split: only the items whose `split` is this.
        by: facts for the breakdown instead of those of `BREAKDOWNS` that the annotations have.

    Returns:
        `metrics` (name -> `MetricResult.summary()` and `by`, the breakdown), `num_items`, `num_empty_predictions`,
        `predictions` and `references` (file, format, sha256), `notes`, `version`.

    Raises:
        ConfigError: an unknown metric or format.
        DataError: a file that cannot be read, ids that occur twice, are missing or too many (listed), facts missing.
    """
    chosen = registry.expand(metrics)
    said, said_format = read_predictions(predictions, predictions_format)
    gold, gold_format = read_gold(references, format)
    notes: list[str] = []
    if questions is not None:
        check_same(read_questions(questions), gold, str(questions))
    if split is not None:
        gold, said = _of_split(gold, said, split, notes)
    if only_predicted:
        gold = _only_predicted(gold, said, notes)
    _check_ids(gold, said, f"{predictions} against {references}")
    facts = _facts(gold, by)
    scored = {metric.name: _compute(metric, said, gold, notes) for metric in chosen}
    return {
        "metrics": {name: {**result.summary(), "by": _by(result, gold, facts)} for name, result in scored.items()},
        "num_items": len(gold),
        "num_empty_predictions": sum(not said[key].strip() for key in gold if key in said),
        "predictions": _file(predictions, said_format),
        "references": _file(references, gold_format),
        "notes": list(dict.fromkeys(notes)),
        "version": __version__,
    }


# --- Which items ------------------------------------------------------------------------------------------------------


def _of_split(
    gold: dict[str, Item], said: dict[str, str], split: str, notes: list[str]
) -> tuple[dict[str, Item], dict[str, str]]:
    splits = sorted({str(item.info["split"]) for item in gold.values() if "split" in item.info})
    kept = {key: item for key, item in gold.items() if item.info.get("split") == split}
    if not kept:
        raise DataError(f"no annotation has the split {split!r}; they have {', '.join(splits) or 'no split'}")
    notes.append(f"split {split}: {len(kept)} of {len(gold)} annotated items")
    others = gold.keys() - kept.keys()
    return kept, {key: text for key, text in said.items() if key not in others}


def _only_predicted(gold: dict[str, Item], said: Mapping[str, str], notes: list[str]) -> dict[str, Item]:
    kept = {key: item for key, item in gold.items() if key in said}
    if len(kept) < len(gold):
        notes.append(
            f"only predicted items: {len(gold) - len(kept)} of {len(gold)} annotated items have no prediction and are "
            "left out, so this is no figure of the whole set"
        )
    return kept


def _check_ids(gold: Mapping[str, Item], said: Mapping[str, str], files: str) -> None:
    missing = [key for key, item in gold.items() if key not in said and not item.left_out]
    extra = [key for key in said if key not in gold]
    if missing or extra:
        parts = [f"{len(missing)} of {len(gold)} items have no prediction: {_ids(missing)}"] if missing else []
        parts += [f"{len(extra)} of {len(said)} predictions have no annotation: {_ids(extra)}"] if extra else []
        raise DataError(
            f"{files}: {'; '.join(parts)}. An item without an answer needs an empty prediction, which counts as wrong; "
            "--only-predicted leaves items without a prediction out and says so"
        )


def _ids(ids: Sequence[str]) -> str:
    return listed(ids, show=repr)


# --- Scores -----------------------------------------------------------------------------------------------------------


def _compute(metric: Metric, said: Mapping[str, str], gold: Mapping[str, Item], notes: list[str]) -> MetricResult:
    kept = {key: item for key, item in gold.items() if item.scored(metric.reads)}
    reasons = [item.left_out for item in gold.values() if not item.scored(metric.reads)]
    notes += [
        f"{metric.name}: {reasons.count(why)} of {len(gold)} items are {why} and not scored"
        for why in dict.fromkeys(reasons)
    ]
    missing = [key for key in kept if key not in said]
    if missing:
        raise DataError(f"{metric.name}: {len(missing)} of {len(kept)} items have no prediction: {_ids(missing)}")
    references = {key: item.texts(metric.reads) for key, item in kept.items()}
    info = {key: item.info for key, item in kept.items()}
    result = registry.compute(metric.name, {key: said[key] for key in kept}, references, info)
    return replace(result, best_constant=registry.best_constant(metric, references, info))


def _facts(gold: Mapping[str, Item], by: Sequence[str] | None) -> list[str]:
    """Facts to break scores down by: those asked for, which every item must have, else the usual ones that all have."""
    for fact in by or ():
        lacking = [key for key, item in gold.items() if item.info.get(fact) is None]
        if lacking:
            known = sorted({name for item in gold.values() for name in item.info})
            raise ConfigError(
                f"--by {fact}: {len(lacking)} of {len(gold)} items have no {fact!r}; the annotations have "
                f"{', '.join(known) or 'no further facts'}"
            )
    return list(by) if by else [f for f in BREAKDOWNS if all(item.info.get(f) is not None for item in gold.values())]


def _by(result: MetricResult, gold: Mapping[str, Item], facts: Sequence[str]) -> dict[str, Any]:
    """Mean per-item score and number of items for each value of each fact that has several."""
    tables: dict[str, Any] = {}
    for fact in facts:
        parts: dict[str, list[float]] = {}
        for key, score in result.per_item.items():
            parts.setdefault(str(gold[key].info[fact]), []).append(score)
        if 1 < len(parts) <= MAX_PARTS:
            tables[fact] = {
                value: {"mean": math.fsum(scores) / len(scores), "num_items": len(scores)}
                for value, scores in sorted(parts.items())
            }
    return tables


def _file(path: str | Path, format: str) -> dict[str, str]:
    return {"file": str(path), "format": format, "sha256": sha256(path)}


# --- Text -------------------------------------------------------------------------------------------------------------


def table(outcome: Mapping[str, Any]) -> str:
    """The outcome of `score_files` as plain text: scores, details, breakdowns, rules, notes."""
    rows = [("metric", "value", "95 % interval", "items", "normaliser")]
    lines: list[str] = []
    for name, result in outcome["metrics"].items():
        ends = result["interval_95"]
        interval = "" if ends is None else f"{ends[0]:.4f} - {ends[1]:.4f}"
        rows.append((name, f"{result['value']:.4f}", interval, str(result["num_items"]), result["normalizer"]))
        if result["details"]:
            lines += ["", f"{name}, details", *_pairs(result["details"])]
        for fact, parts in result["by"].items():
            lines += ["", f"{name} by {fact}"]
            lines += _rows([(f"  {value}", f"{p['mean']:.4f}", str(p["num_items"])) for value, p in parts.items()])
    rules = [f"{name} (version {result['version']}): {result['rule']}" for name, result in outcome["metrics"].items()]
    counts = f"{outcome['num_items']} items, {outcome['num_empty_predictions']} empty predictions"
    own = [f"{name}: {note}" for name, result in outcome["metrics"].items() for note in result["notes"]]
    notes = [f"note: {note}" for note in [*own, *outcome["notes"]]]
    constants = [
        f"{name}: the best constant answer would score {constant(result)}"
        for name, result in outcome["metrics"].items()
        if constant(result)
    ]
    return "\n".join([*_rows(rows), *lines, "", counts, *constants, *notes, "", *rules])


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first and fifth column left, those between right."""
    return aligned(rows, left=(0, 4))


def _pairs(details: Mapping[str, float]) -> list[str]:
    """Counts as whole numbers, all else with four digits."""
    shown = {name: f"{value:.0f}" if name.startswith("num_") else f"{value:.4f}" for name, value in details.items()}
    return _rows([(f"  {name}", value) for name, value in shown.items()])


def metric_rows() -> list[dict[str, Any]]:
    """Every metric: name, the rule in a line, which gold field it reads, the facts it needs and uses."""
    found = map(all_metrics.get, all_metrics.names())
    return [
        {"name": m.name, "rule": m.summary, "reads": m.reads, "needs": list(m.needs), "uses": list(m.uses)}
        for m in found
    ]
