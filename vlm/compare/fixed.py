"""What a comparison holds fixed, and the proof: each run records digests of what it really used, and they are compared.

A difference between towers can only be put down to the towers if everything else was the same. What is compared:

    training data           ids, prompts, answers and the content of images, as the run's model directory records them
    order of the data       the example at every position of every stage, computed again from the run's own record
    examples of each step   ids and supervised tokens of what every optimizer step really saw (from metrics.csv)
    settings                every setting of the run but `out`, the seeds, the tower and the projector
    tokenizer               its whole definition
    decoder at the start    every weight and setting of the model that the first stage began with
    projector at the start  the same, where the shapes are the same
    test items              ids, prompts and the content of the images of each task
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlm.data.order import Mixture, stage_seed, steps_of
from vlm.train import step_log
from vlm.train.changes import differences, essential
from vlm.train.config import RunConfig

OF_THE_TOWER = ("encoder", "encoder_kind", "image_size", "image", "layer", "fuse", "projector", "seed")
"""Settings of `model` that make the arm and the seed."""


# --- what one run did


def order_digest(run: RunConfig, counts: tuple[int, ...]) -> str:
    """sha256 over the example at every position of every stage; `counts` are the examples of each training file."""
    digest = hashlib.sha256()
    repeats = tuple(source.repeat for source in run.data.sources())
    for index, stage in enumerate(run.stages):
        mixture = Mixture(counts, repeats, stage_seed(run.seed, index))
        steps = stage.steps or steps_of(stage.epochs or 0, mixture.epoch_length, stage.batch_size)
        left = steps * stage.batch_size
        digest.update(f"stage {index} steps {steps} batch {stage.batch_size}\n".encode())
        epoch = 0
        while left > 0:
            order = mixture.order(epoch)[:left]
            digest.update(order.astype(np.int64).tobytes())
            left, epoch = left - len(order), epoch + 1
    return digest.hexdigest()


def seen_digest(folder: Path) -> str:
    """sha256 over (stage, step, supervised tokens, checksum of the examples) of every step that a run recorded."""
    rows = [
        [row["stage"], row["step"], row["tokens"], row.get("seen")] for row in step_log.read(folder / "metrics.csv")
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def shared_settings(folder: Path) -> dict[str, Any]:
    """The configuration that a training run recorded, without what makes the arm and the seed."""
    tree: dict[str, Any] = copy.deepcopy(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    tree["model"] = {key: value for key, value in tree["model"].items() if key not in OF_THE_TOWER}
    return {key: value for key, value in essential(tree).items() if key != "seed"}


# --- all runs against each other


@dataclass(frozen=True)
class Held:
    """One thing that should be the same in some runs."""

    what: str
    held: bool
    detail: str
    """The digest where it was held, else what differs."""

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "held": self.held, "detail": self.detail}


def check(runs: Sequence[dict[str, Any]]) -> list[Held]:
    """Compare what the runs recorded.

    Args:
        runs: `measurements.json` of each.
    """
    if not runs:
        return []
    found = [
        _same("training data", runs, lambda run: run["fixed"]["data"]),
        _same("order of the data, per seed", runs, lambda run: run["fixed"]["order"], _seed),
        _same("examples and text of every step, per seed", runs, lambda run: run["fixed"]["seen"], _seed),
        _settings(runs),
        _same("tokenizer", runs, lambda run: run["fixed"]["tokenizer"]),
        _same("decoder at the start, per seed", runs, lambda run: run["fixed"]["decoder"], _seed),
        _same(
            "projector at the start, per seed, where shapes agree",
            runs,
            lambda run: run["fixed"]["projector"],
            lambda run: f"{_seed(run)}, {run['projector']}, shapes {run['fixed']['projector_shapes'][:8]}",
        ),
    ]
    found += [_same(f"test items of {task}", runs, partial(_items, task)) for task in runs[0]["tasks"]]
    if any(run["probes"] for run in runs):
        found.append(_same("probe images", runs, lambda run: (run["probes"] or {}).get("data_sha256", "none")))
    return found


def conditions(runs: Sequence[dict[str, Any]]) -> list[Held]:
    """What should be the same for speeds and memory to be comparable: machine, threads, libraries."""
    names = sorted({name for run in runs for name in run["conditions"]})
    return [_same(name, runs, partial(_condition, name), shown=json.loads) for name in names]


def _seed(run: dict[str, Any]) -> str:
    return f"seed {run['seed']}"


def _items(task: str, run: dict[str, Any]) -> str:
    return str(run["tasks"][task]["data_sha256"])


def _condition(name: str, run: dict[str, Any]) -> str:
    return json.dumps(run["conditions"].get(name), sort_keys=True)


def _everywhere(_run: dict[str, Any]) -> str:
    return ""


def _same(
    what: str,
    runs: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], str],
    group: Callable[[dict[str, Any]], str] = _everywhere,
    shown: Callable[[str], Any] = lambda digest: digest[:12],
) -> Held:
    """Whether a value is one and the same in all runs of each group."""
    groups: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        groups.setdefault(group(run), {}).setdefault(value(run), []).append(f"{run['arm']} seed {run['seed']}")
    broken = {name: values for name, values in groups.items() if len(values) > 1}
    if not broken:
        return Held(what, True, ", ".join(dict.fromkeys(str(shown(next(iter(values)))) for values in groups.values())))
    told = [
        " / ".join(f"{shown(digest)} in {', '.join(names)}" for digest, names in values.items())
        for values in broken.values()
    ]
    return Held(what, False, "; ".join(told))


def _settings(runs: Sequence[dict[str, Any]]) -> Held:
    first = runs[0]["fixed"]["settings"]
    for run in runs[1:]:
        diff = differences(first, run["fixed"]["settings"])
        if diff:
            lines = ", ".join(line.strip() for line in diff.splitlines())
            return Held("settings of the run", False, f"{run['arm']} seed {run['seed']}: {lines}")
    digest = hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()
    return Held("settings of the run", True, digest[:12])
