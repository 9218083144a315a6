"""The runs of a comparison on disk: one folder each, and what it belongs to.

DIR/runs/ENCODER+PROJECTOR/seedK/
    spec.json           what the run is; a folder with another one is refused
    sources.json        digests of the training data and of the checkpoints it began with, refused when they change
    train/              the training run, as `vlm train` leaves it
    eval/TASK/          the evaluations, as `vlm eval` leaves them
    measurements.json   everything that was measured; written last: with it the run is finished
    log.txt             what its processes said
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm import settings
from vlm.compare.config import Arm, CompareConfig, ProbeConfig, TaskConfig, run_config
from vlm.errors import ConfigError
from vlm.files import write_json
from vlm.train.changes import differences, essential
from vlm.train.config import RunConfig

SPEC, MEASUREMENTS, LOG = "spec.json", "measurements.json", "log.txt"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything that a run's processes are told; read back from `spec.json`."""

    encoder: str
    projector: str
    seed: int
    run: RunConfig
    tasks: dict[str, TaskConfig]
    probes: ProbeConfig | None = None
    speed_images: int = 64
    keep_checkpoints: bool = False
    encoder_class: str | None = None
    """An encoder of the user's own that must be made known first."""

    @property
    def arm(self) -> str:
        return f"{self.encoder}+{self.projector}"

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.run.out.parent

    @property
    def finished(self) -> bool:
        return (self.folder / MEASUREMENTS).is_file()

    def measurements(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / MEASUREMENTS).read_text(encoding="utf-8"))
        return found


def make_specs(
    config: CompareConfig, arms: Sequence[Arm], seeds: Sequence[int], out: Path, encoder_class: str | None = None
) -> list[Spec]:
    """One spec per arm and seed; seeds outermost, so that the first results compare all arms. Raises `ConfigError`."""
    specs = []
    for seed in seeds:
        for arm in arms:
            folder = out.resolve() / "runs" / arm.name / f"seed{seed}"
            specs.append(
                Spec(
                    encoder=arm.encoder,
                    projector=arm.projector,
                    seed=seed,
                    run=run_config(config, arm, seed, folder / "train"),
                    tasks=config.tasks,
                    probes=config.probes,
                    speed_images=config.speed_images,
                    keep_checkpoints=config.keep_checkpoints,
                    encoder_class=encoder_class,
                )
            )
    return specs


def claim(spec: Spec) -> None:
    """Make the folder of a run, or check that the one there is of the same run. Raises `ConfigError`."""
    path = spec.folder / SPEC
    new, old = settings.to_dict(spec), None
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        diff = differences(_identity(old), _identity(new))
        if diff:
            raise ConfigError(
                f"{spec.folder} holds a run with other settings; use another --out, undo this, or delete that folder to"
                f" run it again:\n{diff}"
            )
    if old != new:
        spec.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, new)


def read(path: Path) -> Spec:
    """A spec from its file."""
    return settings.from_dict(Spec, json.loads(path.read_text(encoding="utf-8")), where=str(path))


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    """A spec without what may change between two starts."""
    kept = {key: value for key, value in values.items() if key not in ("keep_checkpoints", "run")}
    return {**kept, "run": essential(values["run"])}
