"""The last training stage: every parameter of the model is in its manifest, frozen parts did not move, trained ones
did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vlm.check.report import Finding, not_applicable
from vlm.check.subject import Check, Subject
from vlm.checkpoints.files import read_json
from vlm.checkpoints.names import HEAD, to_live
from vlm.checkpoints.weights import Weights
from vlm.errors import CheckpointError
from vlm.train.freezing import frozen_digests
from vlm.train.stage_config import StageConfig
from vlm.words import listed

HINT = "give the model of a run (OUT/model or OUT/STAGE/model), or --stage-manifest FILE"


def manifest(subject: Subject) -> Finding:
    """The manifest against the model, tensor by tensor against the model that the stage began with."""
    path = subject.stage_manifest or find_manifest(subject.path)
    if path is None:
        return not_applicable(f"no training run beside the model; {HINT}")
    record = read_manifest(path)
    rows = record["parameters"]
    problems = _listing_problems(subject, rows)
    before = stage_start(path)
    if before is None:
        if subject.model.dtype != torch.float32:
            return not_applicable(
                f"the model before the stage is gone, and its sha256 are of float32 weights, not {subject.model.dtype}"
            )
        moved_frozen, detail = _by_digest(subject, record)
        unchanged: list[str] = []
    else:
        moved_frozen, unchanged, detail = _by_tensor(subject, rows, before)
    if record.get("frozen_after", record["frozen_before"]) != record["frozen_before"]:
        problems.append("the manifest itself records that a frozen part changed")
    if moved_frozen:
        problems.append(f"frozen, but changed: {listed(moved_frozen, 3)}")
    if unchanged:
        problems.append(f"trained, but bit for bit as before: {', '.join(unchanged)}")
    wrong = len(moved_frozen) + len(unchanged)
    title = f"stage {record.get('stage', path.parent.name)}: {detail}"
    return Finding(measured=wrong, limit=0, detail=title, problem="; ".join(problems))


# --- finding the files


def find_manifest(path: Path | None) -> Path | None:
    """The manifest of the stage that made the model directory `path`: OUT/STAGE/model, or OUT/model (the last
    stage's)."""
    if path is None or not (path / "training.json").is_file():
        return None
    stage = read_json(path / "training.json").get("stage")
    if not isinstance(stage, str) or Path(stage).name != stage:
        return None  # OUT/start: no stage made it
    folder = path.resolve().parent
    # In OUT/STAGE beside the model, in OUT for OUT/model, and in OUT/train for the demo's copy of its run's model.
    known = (base / "manifest.json" for base in (folder, folder / stage, folder / "train" / stage))
    return next((file for file in known if file.is_file()), None)


def stage_start(manifest_path: Path) -> Path | None:
    """The model that a stage began with: OUT/start for the first stage, else the model of the one before; None when it
    is gone."""
    folder = manifest_path.resolve().parent
    config = folder.parent / "config.yaml"
    if not config.is_file():
        return None
    try:
        stages = [str(stage["name"]) for stage in yaml.safe_load(config.read_text(encoding="utf-8"))["stages"]]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{config}: cannot be read as the configuration of a run: {error}") from error
    if folder.name not in stages:
        return None
    index = stages.index(folder.name)
    start = folder.parent / "start" if index == 0 else folder.parent / stages[index - 1] / "model"
    return start if start.is_dir() else None


def read_manifest(path: Path) -> dict[str, Any]:
    """A stage's manifest.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a stage's manifest: {error}") from error
    rows = record.get("parameters") if isinstance(record, dict) else None
    keys = {"name", "shape", "part", "trainable"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= set(row) for row in rows):
        raise CheckpointError(f"{path}: not the manifest of a stage (STAGE/manifest.json of a run)")
    if not isinstance(record.get("frozen_before"), dict):
        raise CheckpointError(
            f"{path}: not the manifest of a stage: frozen_before (sha256 of the frozen parts) is missing"
        )
    return record


# --- comparing


def _listing_problems(subject: Subject, rows: list[dict[str, Any]]) -> list[str]:
    """Parameters that only the manifest or only the model has, or that have another shape or part."""
    noted = {row["name"]: (tuple(row["shape"]), row["part"]) for row in rows}
    owner = {id(p): name for name, part in subject.model.parts().items() for p in part.parameters()}
    own = {name: (tuple(p.shape), owner.get(id(p))) for name, p in subject.model.named_parameters()}
    return [
        f"{what}: {listed(names, 3)}"
        for what, names in (
            ("not in the manifest", sorted(set(own) - set(noted))),
            ("in the manifest, not in the model", sorted(set(noted) - set(own))),
            (
                "with another shape or part",
                sorted(n for n in set(own) & set(noted) if own[n] != noted[n]),
            ),
        )
        if names
    ]


def _by_tensor(subject: Subject, rows: list[dict[str, Any]], before: Path) -> tuple[list[str], list[str], str]:
    """(frozen parameters that changed, trained parts without a change, what was compared)."""
    trains = {row["name"]: bool(row["trainable"]) for row in rows}
    part = {row["name"]: row["part"] for row in rows}
    model = dict(subject.model.named_parameters())
    changed_frozen, changed, compared = [], set(), set()
    for name, tensor in stored(before):
        if name not in model or name not in trains:
            continue
        compared.add(name)
        now = model[name].detach().cpu()
        same = bool(torch.equal(tensor.to(now.dtype), now))
        if not same and not trains[name]:
            changed_frozen.append(name)
        if not same and trains[name]:
            changed.add(name)
    trained = {name for name in compared if trains[name]}
    still = sorted({part[name] for name in trained} - {part[name] for name in changed})
    num_frozen = len(compared) - len(trained)
    origin = before.name if before.name == "start" else before.parent.name
    detail = (
        f"frozen tensors that changed or trained parts that did not; against {origin}:"
        f" {num_frozen - len(changed_frozen)} of {num_frozen} frozen tensors bit-equal,"
        f" {len(changed)} of {len(trained)} trained ones changed"
    )
    return changed_frozen, still, detail


def _by_digest(subject: Subject, record: dict[str, Any]) -> tuple[list[str], str]:
    """(frozen parts whose sha256 is not the recorded one, what was compared). For a manifest without the model before
    it."""
    recorded: dict[str, str] = record["frozen_before"]
    trained = {row["part"]: 1.0 for row in record["parameters"] if row["trainable"]}
    stage = StageConfig(name="check", module="full", train=trained, steps=1, batch_size=1)
    digests = frozen_digests(subject.model, stage)
    differ = sorted(name for name in digests if recorded.get(name) != digests[name])
    return differ, f"frozen parts off their recorded sha256, of {len(digests)} (the model before the stage is gone)"


def stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(live name, tensor) of a model directory, one at a time."""
    weights = Weights(folder)
    for name in weights.tensors:
        if to_live(name) != HEAD:
            yield to_live(name), weights.read(name)


CHECKS = (
    Check("stage", "the last stage trained what its manifest says, and nothing else", manifest, 170, runs_tower=False),
)
