"""Two results about the same items: what changed, and whether chance alone could have changed as much.

    found = compare("runs/a/eval", "runs/b/eval")
    print(table(found))

Items are resampled in pairs (Koehn 2004; Efron & Tibshirani 1993, chapter 16): every resample draws items, and the
difference B - A is taken on the same draw. The interval holds the middle 95 % of these differences, and p is twice the
share of resamples on the far side of zero, itself counted in, so that it is never 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.examples import Example
from vlm.errors import ConfigError, DataError
from vlm.eval import items
from vlm.eval.items import ITEMS, RESULTS
from vlm.eval.metrics import captions, registry, tokenize
from vlm.report.page import Section
from vlm.report.scores import Table
from vlm.report.sections import Gallery, GalleryItem, write_report
from vlm.words import columns, listed, more

NUM_RESAMPLES = 2000
_WORK = 1_000_000  # items scored again by all resamples together, for a metric that is no mean over items
_AT_ONCE = 1 << 20  # drawn items; bounds the memory
_LISTED = 10
_GALLERY = 60

_Statistic = Callable[[np.ndarray], np.ndarray]
"""int64[R, N] drawn positions -> float[R], the differences B - A of the resamples."""
_Scored = tuple[dict[str, str], dict[str, tuple[str, ...]], dict[str, Any]]
"""What was said, the gold texts and further facts, by item."""


@dataclass(frozen=True)
class Side:
    """The results of one folder."""

    folder: Path
    results: dict[str, Any]
    items: dict[str, dict[str, Any]]


def compare(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Compare two folders that `evaluate` has written.

    Returns:
        `metrics`: name -> a, b, difference (b - a), interval_95, p, better, worse (numbers of items), method;
        `changed`: the items whose answer or score differs, the largest changes of the first metric first; `num_items`;
        `notes`: what else differs between the two; `left_out`: metrics that cannot be compared, with the reason.

    Raises:
        ConfigError: a folder holds no results, or the two have no metric in common.
        DataError: the items or their gold texts differ; they are listed.
    """
    left, right = read(Path(a)), read(Path(b))
    _check_items(left, right)
    ours, theirs = left.results["metrics"], right.results["metrics"]
    left_out = {name: "only one of the two has it" for name in sorted(ours.keys() ^ theirs.keys())}
    common = [name for name in ours if name in theirs]
    for name in common:
        if ours[name]["version"] != theirs[name]["version"] or ours[name]["rule"] != theirs[name]["rule"]:
            left_out[name] = "the two were computed by different rules; evaluate one again (predictions are kept)"
    chosen = [name for name in common if name not in left_out]
    if not chosen:
        told = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigError(f"{a} and {b} have no metric to compare: {told}")
    return {
        "a": {"folder": str(a), "model": left.results["model"]["name"]},
        "b": {"folder": str(b), "model": right.results["model"]["name"]},
        "num_items": len(left.items),
        "metrics": {name: _metric(name, left, right) for name in chosen},
        "changed": _changed(left, right, chosen),
        "notes": _notes(left, right),
        "left_out": left_out,
    }


def pairs(a: str | Path, b: str | Path) -> dict[str, tuple[Path, Path]]:
    """What to compare in two folders: them (under the name ""), or the tasks that both hold.

    Raises:
        ConfigError: no results, or one of the two holds tasks that the other does not.
    """
    one, other = (_tasks(Path(folder)) for folder in (a, b))
    if one != other:
        told = [f"{folder} holds {', '.join(found) or 'no tasks'}" for folder, found in ((a, one), (b, other))]
        raise ConfigError(f"{'; '.join(told)}: give two folders of the same tasks, or the folders of one task each")
    return {name: (Path(a) / name, Path(b) / name) for name in one or [""]}


def _tasks(folder: Path) -> list[str]:
    return list(_results(folder).get("tasks", ()))


def _results(folder: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: {RESULTS} is missing; give a folder that `vlm eval` has written") from error
    except NotADirectoryError as error:
        ours = folder.name in (RESULTS, ITEMS)
        instead = f"give its folder, {folder.parent}" if ours else "give a folder that `vlm eval` has written"
        raise ConfigError(f"{folder} is a file; {instead}") from error
    except ValueError as error:
        raise ConfigError(f"{folder}: {RESULTS} is damaged ({error}); evaluate again, predictions are kept") from error
    return results


def read(folder: Path) -> Side:
    """The results in a folder. Raises ConfigError when there are none."""
    results = _results(folder)
    try:
        lines = (folder / ITEMS).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: {ITEMS} is missing; give a folder that `vlm eval` has written") from error
    found = [json.loads(line) for line in lines if line]
    return Side(folder, results, {item["id"]: item for item in found})


def _check_items(left: Side, right: Side) -> None:
    problems = []
    for one, other in ((left, right), (right, left)):
        alone = [key for key in one.items if key not in other.items]
        if alone:
            problems.append(f"{len(alone)} items are only in {one.folder}: {listed(alone)}")
    gold = [key for key, item in left.items.items() if key in right.items and _gold(item) != _gold(right.items[key])]
    if gold:
        problems.append(f"{len(gold)} items have other gold texts: {listed(gold)}")
    if problems:
        raise DataError(f"{left.folder} and {right.folder} are not about the same items: {'; '.join(problems)}")


def _gold(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(item.get(name) for name in ("suffix", "references", "answers"))


def _notes(left: Side, right: Side) -> list[str]:
    """What may explain a difference besides the weights."""
    notes = []
    prompts = sum(item["prefix"] != right.items[key]["prefix"] for key, item in left.items.items())
    if prompts:
        notes.append(f"the prompts of {prompts} items differ")
    if not prompts and left.results["data"]["sha256"] != right.results["data"]["sha256"]:
        notes.append("the images, or the order of the items, differ")
    for key in ("decoding", "images_shuffled_with_seed", "versions"):
        one, other = left.results[key], right.results[key]
        if one != other:
            notes.append(f"{key.replace('_', ' ')}: A {json.dumps(one)}, B {json.dumps(other)}")
    return notes


# --- One metric -------------------------------------------------------------------------------------------------------


def _metric(name: str, left: Side, right: Side) -> dict[str, Any]:
    ours, theirs = left.results["metrics"][name], right.results["metrics"][name]
    scores = [np.array([side.items[key]["scores"][name] for key in left.items]) for side in (left, right)]
    change = (scores[1] - scores[0]) * (1 if ours["higher_is_better"] else -1)
    statistic, resamples, method = _statistic(name, left, right, scores)
    difference = theirs["value"] - ours["value"]
    interval, p = _bootstrap(statistic, _strata(left), resamples)
    return {
        "a": ours["value"],
        "b": theirs["value"],
        "difference": difference,
        "interval_95": interval,
        "p": p,
        "better": int((change > 0).sum()),
        "worse": int((change < 0).sum()),
        "method": method,
        "details": {
            key: {"a": value, "b": theirs["details"][key]}
            for key, value in ours["details"].items()
            if key in theirs["details"]
        },
    }


def _strata(side: Side) -> list[np.ndarray]:
    """Positions of the items that are drawn among themselves: all, or each group of an average over groups."""
    over = (side.results["task"] or {}).get("average_over")
    groups: dict[str, list[int]] = {}
    for position, item in enumerate(side.items.values()):
        groups.setdefault(str(item["info"][over]) if over else "", []).append(position)
    return [np.array(positions) for positions in groups.values()]


def _statistic(name: str, left: Side, right: Side, scores: Sequence[np.ndarray]) -> tuple[_Statistic, int, str]:
    """How a resample's difference is computed in one group, how many resamples, and the method in words."""
    if name.startswith("bleu_"):
        return _bleu(name, left, right), NUM_RESAMPLES, "paired bootstrap over items, corpus score of every resample"
    values = [side.results["metrics"][name]["value"] for side in (left, right)]
    means = [np.mean([score[positions].mean() for positions in _strata(left)]) for score in scores]
    if all(abs(mean - value) <= 1e-9 * max(1.0, abs(value)) for mean, value in zip(means, values, strict=True)):
        change = scores[1] - scores[0]
        fixed = "; document frequencies stay those of all items, an approximation" if name.startswith("cider") else ""
        return lambda draws: change[draws].mean(axis=1), NUM_RESAMPLES, f"paired bootstrap over items{fixed}"
    resamples = max(200, min(NUM_RESAMPLES, _WORK // len(left.items)))
    return _recomputed(name, left, right), resamples, "paired bootstrap over items, every resample scored anew"


def _bleu(name: str, left: Side, right: Side) -> _Statistic:
    index = int(name.removeprefix("bleu_")) - 1
    statistics = []
    for side in (left, right):
        said, gold = _texts(side, "references")
        rows = [captions.bleu_statistics(tokenize(said[key]), [tokenize(text) for text in gold[key]]) for key in gold]
        statistics.append(np.stack(rows))

    def difference(draws: np.ndarray) -> np.ndarray:
        first, second = (captions.bleu_of(rows[draws].sum(axis=1))[:, index] for rows in statistics)
        return np.asarray(second - first)

    return difference


def _recomputed(name: str, left: Side, right: Side) -> _Statistic:
    metric = registry.get(name)
    sides = [(*_texts(side, metric.reads), _info(side)) for side in (left, right)]
    keys = list(left.items)

    def value(side: _Scored, draw: np.ndarray) -> float:
        drawn = {str(place): keys[position] for place, position in enumerate(draw)}  # an item may be drawn twice
        said, gold, facts = ({place: part[key] for place, key in drawn.items()} for part in side)
        return registry.compute(name, said, gold, facts).value  # type: ignore[arg-type]

    return lambda draws: np.array([value(sides[1], draw) - value(sides[0], draw) for draw in draws])


def _texts(side: Side, reads: Any) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """What was scored, and what it was compared with, by item."""
    said = {key: item.get("scored_as", item["prediction"]) for key, item in side.items.items()}
    return said, {key: items.gold_texts(_example(item), reads) for key, item in side.items.items()}


def _info(side: Side) -> dict[str, Any]:
    """The facts of each item as they were scored, see `results.compute`."""
    return {key: {**item.get("info", {}), "answered": "error" not in item} for key, item in side.items.items()}


def _example(item: Mapping[str, Any]) -> Example:
    references, answers = (tuple(item.get(name, ())) for name in ("references", "answers"))
    return Example(item["id"], None, item["prefix"], item.get("suffix"), references, answers, file="", line=0)


def _bootstrap(
    statistic: _Statistic, strata: Sequence[np.ndarray], resamples: int
) -> tuple[list[float] | None, float | None]:
    """Ends of the 95 % interval and p; None for fewer than two items, where resampling says nothing."""
    total = sum(map(len, strata))
    if total < 2:
        return None, None
    rng = np.random.default_rng(0)
    at_once = max(1, _AT_ONCE // total)
    values = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = [positions[rng.integers(0, len(positions), (rows, len(positions)))] for positions in strata]
        values.append(np.mean([statistic(draws) for draws in drawn], axis=0))
    differences = np.concatenate(values)
    low, high = np.percentile(differences, [2.5, 97.5])
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return [float(low), float(high)], min(1.0, 2 * (tail + 1) / (resamples + 1))


# --- Items ------------------------------------------------------------------------------------------------------------


def _changed(left: Side, right: Side, metrics: Sequence[str]) -> list[dict[str, Any]]:
    main = left.results["metrics"][metrics[0]]
    sign = 1 if main["higher_is_better"] else -1
    found = []
    for key, ours in left.items.items():
        theirs = right.items[key]
        scores = {name: [ours["scores"][name], theirs["scores"][name]] for name in metrics}
        if ours["prediction"] == theirs["prediction"] and all(one == other for one, other in scores.values()):
            continue
        change = sign * (scores[metrics[0]][1] - scores[metrics[0]][0])
        found.append(
            {
                "id": key,
                "prefix": ours["prefix"],
                "images": ours.get("images", []),
                "gold": _shown_gold(ours),
                "a": ours["prediction"],
                "b": theirs["prediction"],
                "scores": scores,
                "change": "better" if change > 0 else "worse" if change < 0 else "same score",
                "by": change,
            }
        )
    return sorted(found, key=lambda item: (-abs(item["by"]), item["id"]))


def _shown_gold(item: Mapping[str, Any]) -> list[str]:
    suffix = [item["suffix"]] if item.get("suffix") else []
    return list(item.get("references") or item.get("answers") or suffix)


def table(found: Mapping[str, Any]) -> str:
    """A comparison as plain text."""
    rows = [("metric", "A", "B", "B - A", "95 % interval", "p", "better", "worse")]
    for name, one in found["metrics"].items():
        ends = one["interval_95"]
        interval = "" if ends is None else f"{ends[0]:+.4f} - {ends[1]:+.4f}"
        numbers = (f"{one['a']:.4f}", f"{one['b']:.4f}", f"{one['difference']:+.4f}")
        rows.append((name, *numbers, interval, _p(one["p"]), str(one["better"]), str(one["worse"])))
    lines = [f"A: {found['a']['folder']}", f"B: {found['b']['folder']}", "", columns(rows), ""]
    lines += [f"{name}: {one['method']}" for name, one in found["metrics"].items()]
    lines += [f"{name}: not compared, {reason}" for name, reason in found["left_out"].items()]
    lines += [f"note: {note}" for note in found["notes"]]
    order = ", the largest changes first:" if found["changed"] else ""
    lines.append(f"{len(found['changed'])} of {found['num_items']} items changed{order}")
    for item in found["changed"][:_LISTED]:
        lines.append(f"  {item['id']}: {item['change']} ({item['by']:+.3f}): {item['a']!r} -> {item['b']!r}")
    if rest := more(len(found["changed"]), _LISTED):
        lines.append(f"  {rest} (--json lists all, --html shows them)")
    return "\n".join(lines)


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value >= 0.001 else "< 0.001"


def write_page(path: str | Path, comparisons: Mapping[str, Mapping[str, Any]]) -> Path:
    """A page with the differences, and the items that changed most beside what both sides said.

    Args:
        comparisons: name of a task (or "") -> what `compare` returns.
    """
    sections: list[Section] = []
    for name, found in comparisons.items():
        about = f" on {name}" if name else ""
        sections.append(_differences(found, f"Differences{about}"))
        cards = [_card(item) for item in found["changed"][:_GALLERY]]
        sections.append(Gallery(cards, f"Items that changed{about}", "The largest changes come first."))
    first = next(iter(comparisons.values()))
    sides = " · ".join(f"{side.upper()}: {first[side]['model']}, {first[side]['folder']}" for side in ("a", "b"))
    return write_report(path, title="Comparison", subtitle=sides, sections=sections)


def _differences(found: Mapping[str, Any], title: str) -> Table:
    rows = [
        [name, one["a"], one["b"], f"{one['difference']:+.4f}", _ends(one), _p(one["p"]), one["better"], one["worse"]]
        for name, one in found["metrics"].items()
    ]
    head = ["metric", "A", "B", "B - A", "95 % interval", "p", "better", "worse"]
    methods: dict[str, list[str]] = {}
    for name, one in found["metrics"].items():
        methods.setdefault(one["method"], []).append(name)
    told = [f"{', '.join(names)}: {method}" for method, names in methods.items()]
    note = f"{len(found['changed'])} of {found['num_items']} items changed. {'; '.join([*told, *found['notes']])}."
    return Table(title, head, rows, note)


def _ends(one: Mapping[str, Any]) -> str:
    return "" if one["interval_95"] is None else " – ".join(f"{end:+.4f}" for end in one["interval_95"])


def _card(item: Mapping[str, Any]) -> GalleryItem:
    image = Path(item["images"][0]) if item["images"] else None
    return GalleryItem(
        image=image,
        prompt=item["prefix"],
        prediction=f"A: {item['a']}\nB: {item['b']}",
        references=item["gold"],
        score=item["by"],
        id=item["id"],
        pick=item["change"],
    )
