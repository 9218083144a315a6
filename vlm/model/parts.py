"""From an encoder's kind to what its file in `vlm/encoders` says of it, and from a checkpoint to its kind."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm.encoders.contract import Spec, TextTower
from vlm.errors import ConfigError
from vlm.registry import OWN, kinds, part

ROOM = "vlm.encoders"


def encoder_spec(kind: str) -> Spec:
    """What the file of an encoder says of it.

    Raises:
        ConfigError: there is no such encoder; the message lists the known ones.
    """
    found: Spec = part("vlm.encoders", kind).SPEC
    return found


def known_encoders() -> dict[str, Spec]:
    """Every encoder by its kind: the library's, then those of one's own that were made known (`use`)."""
    return {kind: encoder_spec(kind) for kind in (*kinds(ROOM), *OWN[ROOM])}


def kind_of(tower: nn.Module) -> str:
    """The kind of a tower.

    Raises:
        ConfigError: no file's encoder is of its class.
    """
    for kind, spec in known_encoders().items():
        if type(tower) is spec.encoder:
            return kind
    raise ConfigError(f"a {type(tower).__name__} is no encoder of this library, nor one of those that were made known")


def text_towers() -> dict[str, TextTower]:
    """What the checkpoints of an encoder have beside it, by its kind, where they have something."""
    found = {kind: spec.text_tower for kind, spec in known_encoders().items()}
    return {kind: tower for kind, tower in found.items() if tower is not None}


def towers(kind: str, config: Any) -> list[tuple[str, Any]]:
    """(kind, configuration) of each tower: a fused one's members, or the one there is."""
    return encoder_spec(kind).members(config) or [(kind, config)]


def blocks(kind: str, config: Any) -> list[str]:
    """Names of the classes that `device_map` and FSDP keep whole in a tower, its members' too."""
    return list(dict.fromkeys(name for own, _ in towers(kind, config) for name in encoder_spec(own).blocks))


def model_types(own: str | None = None) -> dict[str, str]:
    """Encoder kind by the `model_type` of the checkpoints that it reads.

    Args:
        own: an encoder of one's own that alone is asked. Without it, those made known in this process (`use`) are read
            too, after the library's: a name that both have is the library's.
    """
    if own in OWN[ROOM]:
        return {name: own for name in encoder_spec(own).model_types}
    known = {name: kind for kind in kinds(ROOM) for name in encoder_spec(kind).model_types}
    return {name: kind for kind in OWN[ROOM] for name in encoder_spec(kind).model_types} | known
