"""What the directory of a run says of the run: its starts, its configuration, its data, and how far its stages are."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm import settings
from vlm.errors import ConfigError
from vlm.train import step_log
from vlm.train.changes import Begun
from vlm.train.config import RunConfig

RECORD = "versions.json"
_STEP = re.compile(r"step-(\d{8,})$")


def read_record(out: Path) -> list[dict[str, Any]] | None:
    """The entries of `versions.json`, or None where no run has written any."""
    try:
        entries = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(entries, list) and entries and all(isinstance(e, dict) and "libraries" in e for e in entries)
    return entries if whole else None


def accepted(out: Path) -> list[dict[str, Any]]:
    """What was changed on the way: an entry per start with changes, with `started`, `after_steps` and `changes`."""
    names = ("started", "after_steps", "changes")
    return [{name: e[name] for name in names} for e in read_record(out) or [] if "changes" in e]


def trained(out: Path) -> bool:
    """Whether a run here has done a step, by its metrics, checkpoints and models."""
    patterns = ("*/checkpoints/step-*[0-9]", "*/model/manifest.json", "model/manifest.json")
    return bool(step_log.read(out / "metrics.csv")) or any(any(out.glob(pattern)) for pattern in patterns)


def begun(out: Path, names: Iterable[str]) -> dict[str, Begun]:
    """How far the stages of these names have come; without a checkpoint a stage has not begun."""
    found = {}
    for name in names:
        steps = [int(match[1]) for p in out.glob(f"{name}/checkpoints/step-*") if (match := _STEP.match(p.name))]
        done = _steps_of_the_model(out / name / "model")
        if steps or done is not None:
            step = max([*steps, done or 0])
            found[name] = Begun(step, done is not None and step <= done)
    return found


def _steps_of_the_model(folder: Path) -> int | None:
    """Optimizer steps behind the model of a finished stage."""
    try:
        return int(json.loads((folder / "training.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def configuration(out: Path, past: list[dict[str, Any]]) -> dict[str, Any]:
    """The configuration of the last start, with the defaults of settings that did not exist then."""
    recorded = past[-1].get("config")
    if recorded is None:  # begun before the record held it
        recorded = settings.read_yaml(out / "config.yaml")
    with suppress(ConfigError):  # a combination that is refused today
        recorded = settings.to_dict(settings.from_dict(RunConfig, recorded))
    return dict(recorded)


def names_of(config: Mapping[str, Any]) -> list[str]:
    """Of the stages, in their order."""
    return [stage["name"] for stage in config["stages"]]


def newest(out: Path, stages: Mapping[str, Begun]) -> Path:
    """The newest checkpoint, or the model of the last finished stage."""
    folders = [path for name in stages for path in (out / name).glob("checkpoints/step-*") if _STEP.match(path.name)]
    return max(folders, key=lambda path: path.stat().st_mtime, default=out / list(stages)[-1] if stages else out)


def known_data(out: Path, past: list[dict[str, Any]], stages: Iterable[str]) -> str | None:
    """The digest of the data that the run has trained on."""
    for entry in reversed(past):
        if "data_sha256" in entry:
            return str(entry["data_sha256"])
    for name in stages:  # the record of a run that was begun before it held the digest
        for path in sorted(out.glob(f"{name}/checkpoints/step-*/state.json"), reverse=True):
            with suppress(OSError, ValueError, KeyError):
                return str(json.loads(path.read_text(encoding="utf-8"))["data"])
    return None
