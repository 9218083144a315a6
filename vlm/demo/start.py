"""What the demo starts from: the checkpoints of the package, or another tower beside the same decoder."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError, nearest
from vlm.registry import kinds

log = logging.getLogger("vlm")

ASSETS = Path(__file__).parent / "assets"
NAFLEX: dict[str, Any] = {"encoder_kind": "siglip2_naflex", "image": {"max_num_patches": 36}}
"""The SigLIP read as NaFlex, at as many patches as it has."""
SHIPPED: dict[str, dict[str, Any]] = {"siglip": {}, "siglip2_naflex": NAFLEX}
"""Kinds with weights in the package, all of one SigLIP, and how it is read as each."""


@dataclass(frozen=True)
class Choice:
    """The tower as the user names it."""

    encoder: str = "siglip"
    """An encoder kind or a checkpoint."""
    pretrain: bool = False
    """Pretrain a tower of that kind first."""
    from_scratch: bool = False
    """Pretrain the decoder too."""
    steps: int | None = None
    """Of each pretraining; None: as many as the package's checkpoints had."""

    @property
    def is_kind(self) -> bool:
        return self.encoder in kinds("vlm.encoders")

    def check(self) -> None:
        """Raises `ConfigError` for a tower that does not exist or cannot be made."""
        known = kinds("vlm.encoders")
        if self.is_kind:
            return
        if self.pretrain or self.from_scratch:
            raise ConfigError(
                f"the encoder {self.encoder!r} is no kind that can be pretrained here; known kinds: {', '.join(known)}"
            )
        if not Path(self.encoder).exists() and "/" not in self.encoder:
            raise ConfigError(
                f"unknown encoder {self.encoder!r}{nearest(self.encoder, known)}; known kinds: {', '.join(known)};"
                f" or give a checkpoint's directory or hub id"
            )


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        model: `encoder`, `decoder` and what else the `model` of a training configuration needs.
        kind: the encoder kind, or "as the checkpoint says".
        weights: where the tower's weights come from, for people.
        pretrain_steps: of the tower, made here; None where it was not.
        shipped: the package's own SigLIP, nothing changed.
    """

    model: dict[str, Any]
    kind: str
    weights: str
    pretrain_steps: int | None = None
    shipped: bool = False

    def facts(self) -> dict[str, Any]:
        """For `demo.json`."""
        return {name: value for name, value in asdict(self).items() if name != "model"}

    @property
    def text(self) -> str:
        return f"{self.kind}: {self.weights}"


def make(choice: Choice, folder: Path, seed: int) -> Start:
    """The start of a run; what is not shipped is made in `folder` unless it is there already."""
    choice.check()
    decoder = {"decoder": str((folder if choice.from_scratch else ASSETS) / "gemma")}
    if not choice.from_scratch and not (ASSETS / "gemma").exists():
        raise ConfigError(f"{ASSETS} holds no start checkpoints; make them with `vlm demo --pretrain --out {ASSETS}`")
    if not choice.is_kind:
        model = {"encoder": choice.encoder, **decoder}
        return Start(model, "as the checkpoint says", f"the checkpoint {choice.encoder}")
    if choice.from_scratch or choice.pretrain:
        steps = _pretrained(choice, folder, seed)
        made = f"pretrained here for {steps} steps" if steps else NEW
        return Start({**of_kind(choice.encoder, folder), **decoder}, choice.encoder, made, steps)
    shipped = {"encoder": str(ASSETS / "siglip"), **decoder}
    if choice.encoder in SHIPPED:
        how = SHIPPED[choice.encoder]
        what = "those of the package's siglip, read as NaFlex" if how else "those of the package"
        return Start({**shipped, **how}, choice.encoder, what, shipped=not how)
    _new(choice.encoder, folder, seed)
    return Start({**of_kind(choice.encoder, folder), **decoder}, choice.encoder, NEW, 0)


NEW = "NEW weights, the tower has learnt nothing before this run (--pretrain-encoder pretrains it first)"


def of_kind(kind: str, folder: Path | str) -> dict[str, Any]:
    """The settings of a model with the tower in `folder/KIND`: it sees whole pictures, the demo's things stand at their
    edges."""
    from vlm.model.parts import encoder_spec

    any_aspect = encoder_spec(kind).any_aspect
    return {"encoder": f"{folder}/{kind}", "image": NAFLEX["image"] if any_aspect else {"mode": "squash"}}


def _pretrained(choice: Choice, folder: Path, seed: int) -> int:
    from vlm.demo import pretrain

    steps = pretrain.TOWER_STEPS if choice.steps is None else choice.steps
    if choice.from_scratch:
        more = {} if choice.steps is None else {"decoder_steps": choice.steps}
        pretrain.pretrain(folder, encoder=choice.encoder, seed=seed, tower_steps=steps, **more)
    else:
        pretrain.run_jobs(pretrain.tower_jobs([choice.encoder], folder, ASSETS / "gemma", seed, steps))
    return steps


def make_dual(folder: Path, seed: int, steps: int | None) -> None:
    """The SigLIP with both towers in `folder/dual`, from the package's SigLIP, unless it is there already.

    Args:
        steps: of each of its parts; None: as many as the package's had.
    """
    from vlm.demo import dual, pretrain
    from vlm.demo.learning import WEIGHTS, complete

    if not complete(folder / "dual", WEIGHTS):
        parts = dual.PARTS if steps is None else tuple(replace(part, steps=steps) for part in dual.PARTS)
        pretrain.run_jobs([(dual.pretrain_dual, (folder / "dual", ASSETS / "siglip", seed, parts))])


def _new(kind: str, folder: Path, seed: int) -> None:
    from vlm.demo import towers
    from vlm.demo.learning import complete

    if not complete(folder / kind, towers.weights_file(kind)):
        towers.new_tower(kind, folder / kind, seed)


def list_files(folder: Path) -> dict[str, Any]:
    """Name -> bytes of what was made, also logged."""
    made = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.glob("*/*"))}
    for name, size in made.items():
        log.info("%9d bytes  %s", size, folder / name)
    return made
