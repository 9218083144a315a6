"""Checkpoints within a stage: complete or not there at all, whatever happens while they are written.

    STAGE/checkpoints/step-00000500/
        model.safetensors       parameters and buffers of the trained parts (the frozen ones are in the start model)
        optimizer.safetensors   AdamW state by parameter name
        state.json              step, fingerprints, counters
        manifest.json           sha256 and size of each file; written last: without a true one it is no checkpoint

A save is built beside its place and renamed when all of it is on the disk; only then are older ones deleted. Nothing is
ever pickled.
"""

import json
import logging
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

from vlm import files
from vlm.checkpoints import manifest
from vlm.errors import CheckpointError, DiskError, TrainingError

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

    Raises `CheckpointError` when there is no room or the disk refuses, `TrainingError` for weights that are not finite;
    the checkpoints already there are left as they were.
    """
    target = folder / f"step-{step:08d}"
    spoiled = [name for name, tensor in model.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if spoiled:
        raise TrainingError(
            f"stage {folder.parent.name}, step {step}: after this step {len(spoiled)} of {len(model)} trained tensors"
            f" hold nan or inf ({', '.join(spoiled[:3])}); nothing of it is saved: lower the learning rates and go on"
            f" after the checkpoint before with --resume --accept-changes"
        )
    with publishing(target) as made:
        _check_room(folder, [*model.values(), *optimizer.values()])
        save_file({name: t.detach().contiguous() for name, t in model.items()}, made / "model.safetensors")
        save_file({name: t.detach().contiguous() for name, t in optimizer.items()}, made / "optimizer.safetensors")
        (made / "state.json").write_text(json.dumps({**state, "step": step}, indent=1) + "\n", encoding="utf-8")
    with clean_failure(target):
        _delete_old(folder, keep)
    return target


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """`vlm.files.publishing` of a directory (files only) with a manifest, written last.

    Raises `CheckpointError` when the disk refuses; what is at `target` stays as it was.
    """
    with clean_failure(target), files.publishing(target) as folder:
        yield folder
        manifest.write(folder)


@contextmanager
def clean_failure(target: Path) -> Iterator[None]:
    """Turn a disk's refusal into one `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError, DiskError) as error:
        raise CheckpointError(
            f"cannot save {target}: {_reason(error)}; what was saved before is intact: make room or fix the disk, "
            f"then run again with --resume"
        ) from error


def problem(path: Path) -> str | None:
    """Why a directory is not complete and true, or None: each listed file is there with its sha256, and no other."""
    try:
        listed = json.loads((path / "manifest.json").read_text())["files"]
        present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"manifest.json"}
        if not listed:
            return "manifest.json lists no file"
        if present != set(listed):
            return f"files differ from manifest.json: {', '.join(sorted(present ^ set(listed)))}"
        for name, entry in listed.items():
            if files.sha256(path / name) != entry["sha256"]:
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
    for path in folder.glob("step-*.old"):
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
    cause = error.__cause__ if isinstance(error, DiskError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(error).splitlines()[0]
