"""The directory of a run: who may write in it, what it records about itself, and whether a run may go on in it.

OUT/
  config.yaml       the run as configured (resuming with another configuration is refused)
  versions.json     one entry per start: time, host, library versions
  start/            the model before the first stage
  STAGE/            manifest.json, checkpoints/, features/ (with cache_features, while it trains), model/ (once the
                    stage is finished)
  model             link to the last stage's model
  metrics.csv       one row per optimizer step
  evaluations.csv   scores of answers during training, if `evaluate` is given
  failures.jsonl    images that did not decode
  train.log, loss.html, tensorboard/ (when tensorboard is installed)
"""

import difflib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from vlm import settings
from vlm.errors import ConfigError, TrainingError
from vlm.train.config import RunConfig

log = logging.getLogger(__name__)

# What may differ between a run and its continuation: nothing here changes a weight (devices only in the last bits).
FREE = (
    "out",
    "accelerator",
    "devices",
    "nodes",
    "strategy",
    "workers",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
)
LOCK = ".lock"
LIBRARIES = ("vlm-backbone", "torch", "transformers", "lightning", "safetensors", "pillow", "numpy")


class RunDirectory:
    """An existing, locked run directory. `close` gives the lock back, and so does the end of the process."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(config: RunConfig, *, resume: bool, main: bool) -> RunDirectory:
    """Take the run directory. Only the `main` process (rank 0) locks, checks and writes.

    Raises:
        TrainingError: another process trains in this directory; or it holds a run and `resume` is False; or there is
        nothing to resume. ConfigError: it holds a run with another configuration.
    """
    out = config.out
    if not main:
        return RunDirectory(out, None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{out}: cannot make the run directory: {error.strerror}") from error
    directory = RunDirectory(out, _take_lock(out))
    try:
        _check_state(config, resume)
        _write_text(out / "config.yaml", yaml.safe_dump(settings.to_dict(config), sort_keys=False))
        _record_versions(out)
    except BaseException:
        directory.close()
        raise
    return directory


def _take_lock(out: Path) -> int:
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 100).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise TrainingError(
            f"{out}: another run is training in this directory (process {owner}); wait for it, stop it, or "
            f"use another `out`"
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} on {platform.node()}\n".encode())
    return descriptor


def _check_state(config: RunConfig, resume: bool) -> None:
    path = config.out / "config.yaml"
    if not path.exists():
        strangers = sorted(p.name for p in config.out.iterdir() if p.name != LOCK)
        if strangers:
            raise TrainingError(
                f"{config.out}: the directory is not empty ({', '.join(strangers[:3])}) and holds no run; "
                f"use a new `out`"
            )
        return
    if not resume:
        raise TrainingError(
            f"{config.out}: there is a run in this directory already; add --resume to continue it, or use another `out`"
        )
    diff = differences(yaml.safe_load(path.read_text()), settings.to_dict(config))
    if diff:
        raise ConfigError(
            f"{config.out}: the configuration is not that of the run to resume; undo this, or use "
            f"another `out`:\n{diff}"
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A line diff of two configurations, without what a continued run may change; empty when they agree."""
    before, after = (
        yaml.safe_dump({key: value for key, value in tree.items() if key not in FREE}, sort_keys=True).splitlines()
        for tree in (old, new)
    )
    lines = difflib.unified_diff(before, after, n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def _record_versions(out: Path) -> None:
    path = out / "versions.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    entry = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    if entries and entries[-1]["libraries"] != entry["libraries"]:
        log.warning("library versions changed since the run was started; see %s", path)
    _write_text(path, json.dumps([*entries, entry], indent=1) + "\n")


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
