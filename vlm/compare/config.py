"""What a comparison is: frozen dataclasses, read from one YAML file with dotted overrides.

    run: {model: {decoder: gemma}, data: {train: train.jsonl}, stages: [...]}    # as `vlm train` takes it
    encoders: {siglip: towers/siglip, naflex: {encoder: towers/siglip, encoder_kind: siglip2_naflex}}
    tasks: {questions: {data: test.jsonl, metrics: [exact_match]}}

Relative paths are relative to the file. Nothing here imports torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm import settings
from vlm.errors import ConfigError, nearest
from vlm.generation.decoding import Decoding
from vlm.train.config import RunConfig

FIXED = ("decoder", "tokenizer", "seed", "path", "softcap_in_loss", "softcap_in_generation")
"""Settings of the model that no tower may change: they would make another difference than the tower."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One test set and how it is scored, as `vlm eval` does."""

    data: Path
    """JSONL; the same items for every tower."""
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    """The first one ranks the towers and is tested for significance."""
    image_root: Path | None = None
    max_new_tokens: int = Decoding.max_new_tokens
    num_beams: int = Decoding.num_beams
    batch_size: int = 64
    limit: int | None = None
    """Only the first so many items."""

    def __post_init__(self) -> None:
        _ = self.decoding  # refuses what it cannot be
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if not self.metrics:
            raise ConfigError("metrics: the list is empty; name at least one, such as exact_match")

    @property
    def decoding(self) -> Decoding:
        """How answers are made."""
        return Decoding(max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Labelled images on which the towers alone are probed, before and after training."""

    train: Path
    """JSONL with `image` and `label` per line."""
    test: Path
    image_root: Path | None = None
    k: int = 20
    """Neighbours of the k-NN probe."""
    batch_size: int = 64
    templates: list[str] = field(default_factory=lambda: ["{}"])
    """Texts of zero-shot classification, where a SigLIP checkpoint has its text tower; `{}` is the label."""

    def __post_init__(self) -> None:
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A whole comparison."""

    run: dict[str, Any]
    """The run that all share, as `vlm train` takes it, without `out`, the seeds and the tower."""
    encoders: dict[str, str | dict[str, Any]]
    """Short name -> checkpoint, or the settings of `model` that make this tower."""
    projectors: dict[str, str | dict[str, Any]] = field(default_factory=dict)
    """Short name -> kind, or kind and settings; empty: that of `run.model`."""
    tasks: dict[str, TaskConfig]
    probes: ProbeConfig | None = None
    tokens: int | None = None
    """Image tokens (after the projector) that all towers are brought to; None: those of the first."""
    seeds: list[int] = field(default_factory=lambda: [0])
    speed_images: int = 64
    """Images of the first task on which the speed of inference is measured."""
    keep_checkpoints: bool = False
    """Keep the optimizer checkpoints of finished runs."""

    def __post_init__(self) -> None:
        for name in ("encoders", "tasks", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: there is none; give at least one")
        for name in (*self.encoders, *self.projectors, *self.tasks):
            check_name(name)
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds must be different and at least 0, got {self.seeds}")
        for name, least in (("tokens", 1), ("speed_images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, expected at least {least}")
        self._check_run()

    def _check_run(self) -> None:
        for key in ("out", "seed"):
            if key in self.run:
                raise ConfigError(f"run: leave `{key}` out; the comparison sets it for each run")
        model = self.run.get("model")
        if not isinstance(model, dict) or model.get("decoder") is None:
            raise ConfigError("run.model: `decoder` is missing; give the decoder that all towers share")
        for key in ("path", "seed", "encoder"):
            if key in model:
                raise ConfigError(f"run.model: leave `{key}` out; the comparison sets it for each run")


@dataclass(frozen=True)
class Arm:
    """One tower with one projector."""

    encoder: str
    projector: str
    model: dict[str, Any]
    """`model` of its runs, but for the seed."""

    @property
    def name(self) -> str:
        """Also the name of its folder."""
        return f"{self.encoder}+{self.projector}"

    @property
    def projector_settings(self) -> dict[str, Any]:
        value = self.model.get("projector", "linear")
        return {"kind": value} if isinstance(value, str) else dict(value)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """The comparison described by a YAML file, changed by overrides such as `run.stages.0.steps=100`.

    Raises `ConfigError`.
    """
    config = settings.load(CompareConfig, path, overrides)
    home = Path(path).resolve().parent
    try:
        return _at_home(config, home)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def make_arms(config: CompareConfig, encoders: Sequence[str] = (), projectors: Sequence[str] = ()) -> list[Arm]:
    """Every chosen encoder with every chosen projector; none chosen: all of the configuration.

    A name that the configuration does not have is an encoder's checkpoint or hub id, or a projector's kind.

    Raises `ConfigError`: a tower that would change what is held fixed, or two of one name.
    """
    towers = _chosen(config.encoders, encoders, "encoders")
    shared = config.run["model"].get("projector", "linear")
    joints = _chosen(config.projectors, projectors, "projectors") or {_kind_of(shared): shared}
    arms = []
    for tower, changes in towers.items():
        own = {"encoder": changes} if isinstance(changes, str) else changes
        for key in own:
            if key in FIXED:
                raise ConfigError(f"encoders.{tower}: `{key}` is held fixed; set it in run.model, for all")
        if "encoder" not in own:
            raise ConfigError(f"encoders.{tower}: `encoder` is missing; give a checkpoint or hub id")
        if "projector" in own:
            raise ConfigError(f"encoders.{tower}: leave `projector` out; list projectors under `projectors`")
        for joint, projector in joints.items():
            model = _merged(config.run["model"], {**own, "projector": projector})
            arms.append(Arm(tower, joint, model))
    return arms


def run_config(config: CompareConfig, arm: Arm, seed: int, out: Path) -> RunConfig:
    """The training run of an arm and a seed. Raises `ConfigError`."""
    tree = copy.deepcopy(config.run)
    tree |= {"out": str(out), "seed": seed, "model": {**copy.deepcopy(arm.model), "seed": seed}}
    return settings.from_dict(RunConfig, tree, where=f"run of {arm.name}")


def check_name(name: str) -> None:
    """Refuse what is no safe folder name."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "-_." for c in name):
        raise ConfigError(f"name {name!r}: use letters, digits, `-`, `_` and `.` only")


def _chosen(known: dict[str, Any], names: Sequence[str], what: str) -> dict[str, Any]:
    if not names:
        return known
    found: dict[str, Any] = {}
    for name in names:
        short = name if name in known else _short(name)
        if short in found:
            raise ConfigError(f"{what}: {name!r} and another one are both called {short!r}; name them in the file")
        found[short] = known[name] if name in known else _unlisted(name, known, what)
    return found


def _unlisted(name: str, known: dict[str, Any], what: str) -> Any:
    """A checkpoint, hub id or projector kind that was given by itself."""
    if what == "encoders":
        if not Path(name).exists() and "/" not in name:
            raise ConfigError(
                f"encoder {name!r}{nearest(name, known)} is neither under `encoders` ({', '.join(known)}) nor a"
                f" checkpoint; a hub id has a slash, as google/siglip-base-patch16-224"
            )
        return _checkpoint(name, Path.cwd())
    return name


def _short(name: str) -> str:
    """A short name for a checkpoint: the last part of its path, without what a folder name may not hold."""
    members = [name] if Path(name).exists() else name.split("+")
    last = "-".join(Path(member).name.removesuffix(".npz") for member in members)
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in last).lstrip(".") or "encoder"


def _kind_of(projector: str | dict[str, Any]) -> str:
    return projector if isinstance(projector, str) else str(projector.get("kind"))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`; image settings are merged key by key."""
    image = {**(base.get("image") or {}), **(changes.get("image") or {})}
    return {**base, **changes, **({"image": image} if image else {})}


# --- paths relative to the file


def _at_home(config: CompareConfig, home: Path) -> CompareConfig:
    run = copy.deepcopy(config.run)
    for key in ("decoder", "tokenizer"):
        if key in run["model"]:
            run["model"][key] = _checkpoint(run["model"][key], home)
    run["data"] = _data_at(run.get("data"), home)
    if isinstance(run.get("evaluate"), dict):
        run["evaluate"] = _paths_at(run["evaluate"], home, "data", "image_root")
    probes = config.probes
    if probes is not None:
        root = None if probes.image_root is None else home / probes.image_root
        probes = replace(probes, train=home / probes.train, test=home / probes.test, image_root=root)
    return replace(
        config,
        run=run,
        encoders={name: _encoder_at(value, home) for name, value in config.encoders.items()},
        tasks={name: _task_at(task, home) for name, task in config.tasks.items()},
        probes=probes,
    )


def _encoder_at(value: Any, home: Path) -> Any:
    if isinstance(value, dict) and "encoder" in value:
        return {**value, "encoder": _checkpoint(value["encoder"], home)}
    return _checkpoint(value, home)


def _task_at(task: TaskConfig, home: Path) -> TaskConfig:
    root = None if task.image_root is None else home / task.image_root
    return replace(task, data=home / task.data, image_root=root)


def _checkpoint(value: Any, home: Path) -> Any:
    """A path below `home` as a whole path; a hub id, a whole path and a configuration stay. Of several towers, `A+B` or
    a list, and of a tower with its size, `A@378`, each part."""
    if isinstance(value, list):
        return [_checkpoint(member, home) for member in value]
    if not isinstance(value, str) or not value:
        return value
    if (home / value).exists():
        return str((home / value).resolve())
    if "+" in value:
        return "+".join(_checkpoint(member, home) for member in value.split("+"))
    name, at, size = value.rpartition("@")
    if at and size.isdigit():
        return f"{_checkpoint(name, home)}@{size}"
    return str((home / value).resolve()) if value.startswith(("./", "../")) else value


def _data_at(data: Any, home: Path) -> dict[str, Any]:
    if not isinstance(data, dict) or "train" not in data:
        raise ConfigError("run.data: `train` is missing; give the training file that all towers share")
    data = _paths_at(data, home, "val", "image_root")
    if isinstance(data["train"], str):
        data["train"] = str(home / data["train"])
    elif isinstance(data["train"], list):
        data["train"] = [_source_at(source, home) for source in data["train"]]
    return data


def _source_at(source: Any, home: Path) -> Any:
    if not isinstance(source, dict):
        return source  # refused with its place when the run is read
    return _paths_at(source, home, "path", "image_root")


def _paths_at(values: dict[str, Any], home: Path, *names: str) -> dict[str, Any]:
    """The same settings, those of these names that are text as whole paths."""
    return {
        key: str(home / value) if key in names and isinstance(value, str) and value else value
        for key, value in values.items()
    }
