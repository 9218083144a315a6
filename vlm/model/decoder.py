"""From a decoder's configuration to what its file in `vlm/decoders` says of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from vlm.decoders.contract import Facts, Spec
from vlm.errors import ConfigError
from vlm.registry import kinds, part


@functools.cache  # asked in every forward, and the registry lists files
def named(kind: str) -> Spec:
    """The decoder of a file's name.

    Raises:
        ConfigError: there is no such decoder; the message lists the known ones.
    """
    found: Spec = part("vlm.decoders", kind).SPEC
    return found


def spec(config: PreTrainedConfig) -> Spec:
    """The decoder of a text configuration."""
    return named(config.model_type)


def facts(config: PreTrainedConfig) -> Facts:
    """What follows from a text configuration as it is now."""
    return spec(config).facts(config)


def checkpoint_types() -> list[str]:
    """The `model_type`s of files that hold a decoder."""
    return [name for kind in kinds("vlm.decoders") for name in (kind, *named(kind).checkpoints)]


@contextmanager
def without_final_softcap(config: PreTrainedConfig) -> Iterator[None]:
    """The soft-cap of the logits switched off in a configuration that a model runs with."""
    setting, cap = spec(config).final_softcap_setting, facts(config).final_softcap
    if setting is not None and cap is not None:
        setattr(config, setting, None)
    try:
        yield
    finally:
        if setting is not None and cap is not None:
            setattr(config, setting, cap)


def read_config(values: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """A decoder's configuration from its dictionary (with `model_type`).

    Raises:
        ConfigError: the `model_type` is missing or is not a decoder that this library knows.
    """
    known = kinds("vlm.decoders")
    if isinstance(values, PreTrainedConfig):
        if values.model_type not in known or type(values) is not spec(values).config:
            raise ConfigError(
                f"decoder configuration is a {type(values).__name__}, expected one of"
                f" {', '.join(named(kind).config.__name__ for kind in known)}"
            )
        return values
    values = dict(values)
    kind = values.pop("model_type", None)
    if kind not in known:
        raise ConfigError(
            f"decoder model_type is {kind!r}, expected one of {', '.join(known)}; write it into text_config"
        )
    return named(kind).config(**values)


def small(kind: str, **settings: Any) -> PreTrainedConfig:
    """A configuration for tests, with other settings where they are given.

    Raises:
        ConfigError: unknown kind.
    """
    found = named(kind)
    return found.config(**{**found.small, **settings})


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with new weights."""
    model: PreTrainedModel = spec(config).model._from_config(config)
    return model
