"""Which encoder reads a checkpoint: kinds by the `model_type` that a configuration states."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from vlm.encoders import contract
from vlm.registry import OWN, kinds, part


def model_types(own: str | None = None) -> dict[str, str]:
    """Encoder kind by the `model_type` of the checkpoints that it reads.

    Args:
        own: an encoder of one's own that alone is asked. Without it, those made known in this process (`use`) are read
            too, after the library's: a name that both have is the library's.
    """
    if own in OWN["vlm.encoders"]:
        return {name: own for name in OWN["vlm.encoders"][own].MODEL_TYPES}
    known = {name: kind for kind in kinds("vlm.encoders") for name in part("vlm.encoders", kind).MODEL_TYPES}
    return {name: kind for kind in OWN["vlm.encoders"] for name in OWN["vlm.encoders"][kind].MODEL_TYPES} | known


def read_config(kind: str, values: dict[str, Any]) -> PreTrainedConfig:
    """A tower's configuration from settings as a checkpoint or another configuration has them."""
    return contract.read_config(part("vlm.encoders", kind), values)


def choose_layers(kind: str, config: PreTrainedConfig, layer: int | list[int]) -> PreTrainedConfig:
    """The configuration of a tower whose features are the outputs of these blocks (`choose_blocks`), or the tower's own
    way of choosing.

    Raises:
        ConfigError: a tower without this choice, or a layer that it does not have.
    """
    return contract.choose_layers(part("vlm.encoders", kind), kind, config, layer)
