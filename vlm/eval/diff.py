"""Two results about the same items: what changed, and whether chance alone could have changed as much.

    found = compare("runs/a/eval", "runs/b/eval")
    print(table(found))

How items are resampled is in `vlm.eval.paired`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError, DataError
from vlm.eval import paired
from vlm.eval.items import ITEMS, RESULTS
from vlm.eval.paired import Side
from vlm.report.page import Section
from vlm.report.scores import Table
from vlm.report.sections import Gallery, GalleryItem, write_report
from vlm.words import columns, listed, more

_LISTED = 10
_GALLERY = 60


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
        "metrics": {name: paired.metric(name, left, right) for name in chosen},
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
    for key in ("decoding", "protocol", "images_shuffled_with_seed", "versions"):
        one, other = left.results.get(key), right.results.get(key)
        if one != other:
            notes.append(f"{key.replace('_', ' ')}: A {json.dumps(one)}, B {json.dumps(other)}")
    return notes


# --- Items ------------------------------------------------------------------------------------------------------------


def _changed(left: Side, right: Side, metrics: Sequence[str]) -> list[dict[str, Any]]:
    signs = {name: 1 if left.results["metrics"][name]["higher_is_better"] else -1 for name in metrics}
    found = []
    for key, ours in left.items.items():
        theirs = right.items[key]
        scores = {name: [ours["scores"][name], theirs["scores"][name]] for name in metrics if name in ours["scores"]}
        if ours["prediction"] == theirs["prediction"] and all(one == other for one, other in scores.values()):
            continue
        main = next(iter(scores), "")
        change = signs[main] * (scores[main][1] - scores[main][0]) if main else 0.0
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
