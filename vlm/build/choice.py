"""The towers that a new model is made of, before any weight is read."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.configuration_utils import PreTrainedConfig

from vlm.images.transforms import ImageTransform


class Member(NamedTuple):
    """One tower of a new model, alone or fused with others.

    Attributes:
        source: a checkpoint's folder or `.npz`, or a configuration (new weights).
        kind: the encoder's kind.
        config: its configuration.
        resized: another image size than the checkpoint's was asked for.
        transform: its image transform, where the source is a model of this library.
    """

    source: Any
    kind: str
    config: PreTrainedConfig
    resized: bool
    transform: ImageTransform | None = None


class Choice(NamedTuple):
    """The encoder of a new model.

    Attributes:
        kind: the encoder's kind, `fused` for several towers.
        config: its configuration.
        members: where the weights of each tower come from; one unless it is fused.
        transform: its image transform.
    """

    kind: str
    config: PreTrainedConfig
    members: list[Member]
    transform: ImageTransform
