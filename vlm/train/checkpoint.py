"""Checkpoints within a stage: complete or not there at all, whatever happens while they are written.

    STAGE/checkpoints/step-00000500/
        model.safetensors       parameters and buffers of the trained parts (the frozen ones are in the start model)
        optimizer.safetensors   AdamW state by parameter name
        state.json              step, fingerprints, counters
        manifest.json           sha256 and size of each file; written last: without a true one it is no checkpoint

A save writes into `step-N.tmp`, syncs, renames, syncs the parent, and only then deletes older ones. Nothing is ever
pickled.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.checkpoints import manifest
from vlm.errors import CheckpointError

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, read into memory."""

    path: Path
    step: int
    """Optimizer steps done."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: dict, keep: int
) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`.

    Raises `CheckpointError` when there is no room or the disk refuses; the checkpoints already there are left as they
    were.
    """
    target = folder / f"step-{step:08d}"
    temporary = target.with_suffix(".tmp")
    with clean_failure(temporary, target):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _check_room(folder, [*model.values(), *optimizer.values()])
        temporary.mkdir()
        save_file({name: t.detach().contiguous() for name, t in model.items()}, temporary / "model.safetensors")
        save_file({name: t.detach().contiguous() for name, t in optimizer.items()}, temporary / "optimizer.safetensors")
        _write_json(temporary / "state.json", {**state, "step": step})
        publish(temporary, target)
        _delete_old(folder, keep)
    return target


@contextmanager
def clean_failure(temporary: Path, target: Path) -> Iterator[None]:
    """Turn a disk's refusal into one `CheckpointError`, with the half-written directory removed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot save {target}: {_reason(error)}; what was saved before is intact: make room or fix the disk, "
            f"then run again with --resume"
        ) from error


def publish(temporary: Path, target: Path) -> None:
    """Turn a written directory (files only) into `target` in one step: manifest, sync, rename. An old `target` gives
    way."""
    manifest.write(temporary)
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    _remove(target)
    temporary.rename(target)
    sync(target.parent)


def problem(path: Path) -> str | None:
    """Why a directory is not complete and true, or None: each listed file is there with its sha256, and no other."""
    try:
        listed = json.loads((path / "manifest.json").read_text())["files"]
        present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"manifest.json"}
        if present != set(listed):
            return f"files differ from manifest.json: {', '.join(sorted(present ^ set(listed)))}"
        for name, entry in listed.items():
            if manifest.sha256(path / name) != entry["sha256"]:
                return f"{name} has another sha256 than manifest.json says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is missing or not readable ({error})"
    return None


def newest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None. What is passed over is logged with its reason."""
    for path in reversed(_steps(folder)):
        reason = problem(path)
        if reason:
            log.warning("passed over %s: %s", path, reason)
            continue
        state = json.loads((path / "state.json").read_text())
        model, optimizer = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
        return Checkpoint(path, int(state["step"]), model, optimizer, state)
    return None


def _steps(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if _STEP.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _delete_old(folder: Path, keep: int) -> None:
    for path in _steps(folder)[:-keep]:
        _remove(path)
    for path in [*folder.glob("step-*.tmp"), *folder.glob("step-*.old")]:
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Delete a directory, renamed first, so that a half-deleted one never looks like a checkpoint."""
    if path.exists():
        doomed = path.with_suffix(".old")
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _check_room(folder: Path, tensors: list[Tensor]) -> None:
    needed = sum(t.numel() * t.element_size() for t in tensors) + 2**20
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(28, f"it needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
