"""The directory of a run: who may write in it, what it records about itself, and whether a run may go on in it.

OUT/
  versions.json     one entry per start: time, host, library versions, the configuration, the data, and what was changed
                    on the way. Written before anything else: without it nothing here is a run's
  config.yaml       the run as configured
  start/            the model before the first stage
  STAGE/            manifest.json, checkpoints/, features/ (with cache_features, while it trains), model/ (once the
                    stage is finished)
  model             link to the last stage's model
  metrics.csv       one row per optimizer step
  evaluations.csv   scores of answers during training, if `evaluate` is given
  failures.jsonl    images that did not decode
  train.log, summary.json, loss.html, tensorboard/ (when tensorboard is installed)

A run that ends before its first step leaves nothing. What a killed one leaves before its first step is taken over by
the next start, with or without `--resume`. What no run has written is never deleted nor replaced.
"""

import importlib.metadata
import logging
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from vlm import files, settings
from vlm.errors import CheckpointError, ConfigError, TrainingError
from vlm.train.changes import Change, changes, listed, too_late
from vlm.train.config import RunConfig
from vlm.train.history import RECORD, begun, configuration, known_data, names_of, newest, read_record, trained

log = logging.getLogger(__name__)

LOCK = ".lock"
LIBRARIES = ("vlm-backbone", "torch", "transformers", "lightning", "safetensors", "pillow", "numpy")
_FILES = ("config.yaml", "metrics.csv", "evaluations.csv", "train.log")
_OF_A_STAGE = ("manifest.json", "checkpoints", "features")


class RunDirectory:
    """A locked run directory. `close` gives the lock back, and so does the end of the process.

    Left as a context manager with an error before the first step was trained, it removes what the run has written.
    """

    def __init__(self, config: RunConfig, lock: files.Lock | None, made: list[Path], accept: bool) -> None:
        self.path, self._config, self._lock, self._made, self._accept = config.out, config, lock, made, accept
        self._fresh = True
        self._changes: list[Change] = []
        self._past: list[dict[str, Any]] = []
        self._entry: dict[str, Any] = {}

    def claim(self, resume: bool) -> None:
        """Begin a run here, take over one that never trained a step, or (with `resume`) go on with one that did."""
        past = read_record(self.path)
        if past is None:
            strangers = sorted(p.name for p in self.path.iterdir() if p.name not in (LOCK, f"{RECORD}.tmp"))
            if strangers:
                raise TrainingError(
                    f"{self.path}: the directory is not empty ({', '.join(strangers[:3])}) and holds no run; "
                    f"use a new `out`"
                )
        elif not trained(self.path):
            self._take_over(past, resume)
        elif not resume:
            raise TrainingError(
                f"{self.path}: there is a run in this directory already; add --resume to continue it, or use another"
                f" `out`"
            )
        else:
            self._fresh, self._past = False, past
            old = configuration(self.path, past)
            self._changes = changes(old, settings.to_dict(self._config), begun(self.path, names_of(old)))
            judge(self.path, self._changes, self._accept)
        self._entry = _this_start(self._config)
        if past and self._entry["libraries"] != past[-1]["libraries"]:
            log.warning("library versions changed since the run was started; see %s", self.path / RECORD)
        if self._fresh:  # what goes on is recorded when it is known to be the same run
            try:
                self._write()
            except BaseException:
                self._leave_nothing()
                raise

    def settle(self, data: str, steps: Mapping[str, int], same_model: Callable[[], bool] = lambda: True) -> None:
        """What can be said only once the data are read: whether a run that goes on is still the same. Records it.

        Args:
            data: digest of the training examples. steps: of each stage, with these data. same_model: whether `model`
            makes the model that the run began with; asked only when that setting changed.

        Raises:
            ConfigError, CheckpointError: it is another run, and the changes are not accepted.
        """
        if self._lock is None:
            return
        found = list(self._changes)
        known = known_data(self.path, self._past, steps)
        if any(change.effect == "same model" for change in found) and not same_model():
            why = "the run has its model already, in start/"
            found = [too_late(change, why) if change.effect == "same model" else change for change in found]
        stages = begun(self.path, steps)
        for name, state in stages.items():
            if state.step > steps[name]:
                why = f"{state.step} steps are done already"
                found.append(Change(f"stage {name}", "steps", state.step, steps[name], "never", why))
        judge(self.path, found, self._accept)
        if known is not None and known != data:
            if not self._accept:
                raise CheckpointError(
                    f"{newest(self.path, stages)}: data changed since this checkpoint was written (sha256 of the"
                    f" examples then {known[:16]}, now {data[:16]}); put it back, or use another `out`, or add"
                    f" --accept-changes to go on with it on purpose (it is recorded)"
                )
            found = [replace(change, effect="results") if change.effect == "same data" else change for change in found]
            found.append(Change("data", "examples (sha256)", known, data, "results"))
        self._entry["data_sha256"] = data
        if found:
            self._entry["changes"] = [vars(change) for change in found]
            self._entry["after_steps"] = {name: state.step for name, state in stages.items()}
        for change in found:
            level = logging.WARNING if change.effect == "results" else logging.INFO
            log.log(level, "changed since the last start (%s): %s", change.consequence, change)
        self._write()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and self._lock is not None and self._fresh and not trained(self.path):
            self._leave_nothing()
        self.close()

    def _write(self) -> None:
        files.write_json(self.path / RECORD, [*self._past, self._entry])
        text = yaml.safe_dump(settings.to_dict(self._config), sort_keys=False)
        files.write_text(self.path / "config.yaml", text)

    def _take_over(self, past: list[dict[str, Any]], resume: bool) -> None:
        """Clear away what a run that was killed before its first step has left here, and nothing else."""
        old, new = configuration(self.path, past), settings.to_dict(self._config)
        own = {*names_of(old), *(entry.name for entry in _own(self.path, names_of(old)))}
        replaced = [*names_of(new), *(f"{name}/model" for name in names_of(new)), "model", "summary.json", "loss.html"]
        for name in replaced:
            if name not in own and (self.path / name).exists():
                raise TrainingError(
                    f"{self.path}: it holds {name}, which no run has written and this one would replace; move it away,"
                    f" or use another `out`"
                )
        keep = {self.path / stage.name / "features" for stage in self._config.stages if stage.cache_features}
        if resume and old.get("model") == new["model"]:
            keep.add(self.path / "start")
        _clear(self.path, names_of(old), keep)
        log.info("%s: the run here was stopped before its first step; it begins anew", self.path)

    def _leave_nothing(self) -> None:
        """Remove what this run has written, but not what took long to make or has to be read."""
        assert self._lock is not None
        names = [stage.name for stage in self._config.stages]
        made = [*self.path.glob("*/features/shard-*"), *(p for p in self.path.glob("failures*") if p.stat().st_size)]
        if made:
            log.info("%s: no step was trained; %s stays for the next start", self.path, made[0].name)
            return
        _clear(self.path, names, set())
        with suppress(OSError):
            (self.path / RECORD).unlink(missing_ok=True)
        self._lock.remove()
        _remove_empty(self._made)


def open_run(config: RunConfig, *, resume: bool, main: bool, accept_changes: bool = False) -> RunDirectory:
    """Take the run directory. Only the `main` process (rank 0) locks, checks and writes.

    Raises:
        TrainingError: another process trains in this directory; or it holds a run that has trained, and `resume` is
        False; or it holds something else. ConfigError: it holds a run with another configuration. DiskError.
    """
    if not main:
        return RunDirectory(config, None, [], accept_changes)
    made: list[Path] = []
    had_lock = (config.out / LOCK).exists()
    lock: files.Lock | None = None
    try:
        lock = _lock(config.out, made)
        directory = RunDirectory(config, lock, made, accept_changes)
        directory.claim(resume)
    except BaseException:
        if lock is not None and not had_lock and read_record(config.out) is None:
            lock.remove()
        elif lock is not None:
            lock.close()
        _remove_empty(made)
        raise
    return directory


def _lock(out: Path, made: list[Path]) -> files.Lock:
    """The lock of a directory, which is made if it is not there; `made` gets what was made, outermost first."""

    def busy(owner: str) -> TrainingError:
        return TrainingError(
            f"{out}: another run is training in this directory (process {owner}); wait for it, stop it, or "
            f"use another `out`"
        )

    for path in (*reversed(out.parents), out):
        if not path.exists():
            try:
                path.mkdir(exist_ok=True)
            except OSError as error:
                raise TrainingError(f"{out}: cannot make the run directory: {error.strerror}") from error
            made.append(path)
    if not out.is_dir():
        raise TrainingError(f"{out}: cannot make the run directory: there is a file of this name")
    return files.locked(out / LOCK, busy)


def _remove_empty(made: Iterable[Path]) -> None:
    for path in sorted(made, key=lambda path: -len(path.parts)):
        with suppress(OSError):
            path.rmdir()


# --- what may go on -----------------------------------------------------------------------------------------


def judge(out: Path, found: list[Change], accept: bool) -> None:
    """Raise `ConfigError` for changes that cannot be, and for those that change results unless they are accepted."""
    never = [change for change in found if change.effect == "never"]
    if never:
        raise ConfigError(
            f"{out}: the configuration is not that of the run to resume, and this can no longer change; undo it, or use"
            f" another `out`:\n{listed(never)}"
        )
    results = [change for change in found if change.effect == "results"]
    if results and not accept:
        raise ConfigError(
            f"{out}: the configuration is not that of the run to resume; undo this, or use another `out`, or add"
            f" --accept-changes to go on with it on purpose (it is recorded):\n{listed(results)}"
        )


def _own(out: Path, stages: Iterable[str]) -> list[Path]:
    """What a run of these stages has written before its first step, whole or on the way; not the record itself."""
    names = [*_FILES, *(f"{name}.tmp" for name in (*_FILES, RECORD)), "failures*.jsonl"]
    names += ["start", "start.tmp", "start.old", ".start.writing-*"]
    for stage in stages:
        names += [f"{stage}/{name}" for name in _OF_A_STAGE]
        names += [f"{stage}/manifest.json.tmp", f"{stage}/model.tmp", f"{stage}/.model.writing-*"]
        names += [f"tensorboard/{stage}"]
    return [path for name in names for path in out.glob(name)]


def _clear(out: Path, stages: Iterable[str], keep: set[Path]) -> None:
    """Delete what a run of these stages has written, but its record. Folders go under another name first."""
    stages = list(stages)
    with files.disk_errors(out):
        for path in _own(out, stages):
            if path in keep:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    _remove_empty([out / "tensorboard", *(out / stage for stage in stages)])


def _this_start(config: RunConfig) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "config": settings.to_dict(config),
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
