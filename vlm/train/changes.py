"""What may differ between a run and its continuation, setting by setting.

    setting                                                  may change
    ------------------------------------------------------   ------------------------------------------------------
    where and how it runs, what is saved, measured, logged   freely: no result depends on it
    accumulate, batch_tokens, cache_features of a stage      freely: the same gradient to rounding
    paths of the data, `model`                               freely while what is found there is the same
    everything of a stage that has not begun; more stages    freely, and it is recorded
    everything else: rates, steps, batch_size, data, seed    on purpose, with `--accept-changes`, and it is recorded
    name, place and trained parts of a stage that has begun  never; and nothing that could no longer act

A stage has begun with its first checkpoint: without one a resumed run starts it again from nothing.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from vlm.train.config import DataConfig, RunConfig
from vlm.train.stage_config import StageConfig, settings_that

Effect = Literal["none", "rounding", "same data", "same model", "later", "results", "never"]

FREE = settings_that(RunConfig, "machine")
"""Top-level settings that no result depends on (devices only in the last bits)."""
_NOTHING = {
    "run": settings_that(RunConfig, "machine", "none"),
    "data": settings_that(DataConfig, "machine", "none"),
}
_ROUNDING = settings_that(StageConfig, "rounding")
_SHAPE = settings_that(StageConfig, "shape")
_LENGTH = ("steps", "epochs")
_WORDS: dict[Effect, str] = {
    "none": "no result depends on it",
    "rounding": "the same gradient, but for rounding and the draws of dropout",
    "same data": "the same data",
    "same model": "the same model",
    "later": "nothing of it had begun",
    "results": "accepted, it changes the result",
    "never": "it cannot change any more",
}


@dataclass(frozen=True)
class Change:
    """One setting that is another than before."""

    section: str
    """`run`, `model`, `data` or `stage NAME`."""
    setting: str
    before: Any
    after: Any
    effect: Effect
    why: str = ""
    """For `never`."""

    @property
    def consequence(self) -> str:
        """The effect in words."""
        return _WORDS[self.effect]

    def __str__(self) -> str:
        where = "" if self.section == "run" else f"{self.section}: "
        return f"{where}{self.setting} {self.before!r} -> {self.after!r}"


@dataclass(frozen=True)
class Begun:
    """How far a stage has come, from its directory."""

    step: int
    """Of its newest checkpoint."""
    finished: bool


def essential(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration without what no result depends on (rounding apart): equal for runs of equal results."""

    def kept(values: Mapping[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in free}

    rest = kept(tree, _NOTHING["run"])
    return {
        **rest,
        "data": kept(tree["data"], _NOTHING["data"]),
        "stages": [kept(s, _ROUNDING) for s in tree["stages"]],
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A line diff of two configurations, without what a continued run may always change; empty when they agree."""
    before, after = (
        yaml.safe_dump({key: value for key, value in tree.items() if key not in FREE}, sort_keys=True).splitlines()
        for tree in (old, new)
    )
    lines = difflib.unified_diff(before, after, n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def changes(old: Mapping[str, Any], new: Mapping[str, Any], begun: Mapping[str, Begun]) -> list[Change]:
    """How two configurations (as `settings.to_dict` gives them) differ, and what that does to a run.

    Args:
        begun: name -> state, of the stages that have begun.
    """
    found = [*_stages(old["stages"], new["stages"], begun)]
    left = any(not state.finished for state in begun.values()) or len(begun) < len(new["stages"])
    goes_on = left or any(change.setting in _LENGTH and change.effect == "results" for change in found)
    rest = [_without(tree, "out", "model", "data", "stages") for tree in (old, new)]  # the directory may have moved
    found += _leaves("run", *rest)
    found += _data(old["data"], new["data"])
    if not goes_on:
        found = [
            too_late(change, "every stage is finished") if change.effect == "results" else change for change in found
        ]
    if old["model"] != new["model"]:
        for name in sorted({*old["model"], *new["model"]}):
            before, after = old["model"].get(name), new["model"].get(name)
            if before != after:
                found.append(Change("model", name, before, after, "same model"))
    return found


def _without(tree: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in names}


def _leaves(section: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Differences of a section; what it lists as changing nothing is free, the rest changes results."""
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name), new.get(name)
        if before != after:
            yield Change(section, name, before, after, "none" if name in _NOTHING.get(section, ()) else "results")


def _data(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    sources = [_sources(data) for data in (old, new)]
    if [source["repeat"] for source in sources[0]] != [source["repeat"] for source in sources[1]]:
        yield Change("data", "train", old["train"], new["train"], "results")
    elif old["train"] != new["train"]:
        yield Change("data", "train", old["train"], new["train"], "same data")
    if old.get("image_root") != new.get("image_root"):
        yield Change("data", "image_root", old.get("image_root"), new.get("image_root"), "same data")
    yield from _leaves("data", _without(old, "train", "image_root"), _without(new, "train", "image_root"))


def _sources(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    train = data["train"]
    return [{"repeat": 1.0, **source} for source in train] if isinstance(train, list) else [{"repeat": 1.0}]


def _stages(old: list[dict[str, Any]], new: list[dict[str, Any]], begun: Mapping[str, Begun]) -> Iterator[Change]:
    for index in range(max(len(old), len(new))):
        before = old[index] if index < len(old) else None
        after = new[index] if index < len(new) else None
        state = begun.get(before["name"]) if before else None
        if state is not None and (after is None or after["name"] != before["name"]):  # type: ignore[index]
            why = "it has begun: it keeps its name and its place"
            name = after and after["name"]
            yield Change(f"stage {before['name']}", "name", before["name"], name, "never", why)  # type: ignore[index]
        elif state is not None:
            later = [stage["name"] for stage in old[index + 1 :] if stage["name"] in begun]
            yield from _stage(before, after, state, later)  # type: ignore[arg-type]
        elif before is None or after is None or before["name"] != after["name"]:
            yield Change("run", f"stages.{index}", before and before["name"], after and after["name"], "later")
        else:
            for change in _settings(before, after):
                yield _with(change, "later")


def _stage(old: dict[str, Any], new: dict[str, Any], state: Begun, later: list[str]) -> Iterator[Change]:
    """Differences of a stage that has begun."""
    found = list(_settings(old, new))
    longer = any(change.setting in _LENGTH for change in found)
    for change in found:
        if change.setting in _ROUNDING:
            yield _with(change, "rounding")
        elif change.setting in _SHAPE:
            yield _with(change, "never", "the stage has begun with this model; add a stage for another one")
        elif change.setting.startswith("train.") and None in (change.before, change.after):
            yield _with(change, "never", "which parts train is fixed once the stage has begun; add a stage for it")
        elif state.finished and longer and later:
            yield too_late(change, f"stage {later[0]} has begun from its model")
        elif state.finished and not longer:
            yield too_late(change, "the stage is finished")
        else:
            yield change


def _settings(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    section = f"stage {new['name']}"
    yield from _leaves(section, _without(old, "train"), _without(new, "train"))
    for part in sorted({*old["train"], *new["train"]}):
        before, after = old["train"].get(part), new["train"].get(part)
        if before != after:
            yield Change(section, f"train.{part}", before, after, "results")


def too_late(change: Change, why: str) -> Change:
    """The same change, forbidden, because it would do nothing."""
    return _with(change, "never", f"{why}: it can no longer act")


def _with(change: Change, effect: Effect, why: str = "") -> Change:
    return replace(change, effect=effect, why=why)


def listed(found: list[Change]) -> str:
    """The changes for people, a `-` and a `+` line for each, under the name of their section."""
    lines: list[str] = []
    section = ""
    for change in found:
        if change.section != section:
            section = change.section
            lines.append(f"{section}:")
        lines += [f"-  {change.setting}: {_shown(change.before)}", f"+  {change.setting}: {_shown(change.after)}"]
        if change.why:
            lines[-1] += f"   ({change.why})"
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
