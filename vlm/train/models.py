"""What a configuration's `model` says, as the arguments of `vlm.new`; nothing is read here."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from vlm.checkpoints.checks import guarded
from vlm.errors import ConfigError
from vlm.model.parts import model_types
from vlm.train.config import ModelConfig


def new_arguments(config: ModelConfig) -> dict[str, Any]:
    """Of `vlm.build.assembly.new`. Raises `ConfigError`."""
    return {
        "encoder": towers(config),
        "projector": config.projector or "linear",
        "decoder": part_of(config.decoder, "decoder"),
        "tokenizer": config.tokenizer,
        "seed": config.seed,
        **tower_settings(config),
    }


def towers(config: ModelConfig) -> Any:
    """The tower, or the list of those that are fused."""
    if isinstance(config.encoder, list):
        return [_tower(one, config.encoder_kind) for one in config.encoder]
    return _tower(config.encoder, config.encoder_kind)


def tower_settings(config: ModelConfig) -> dict[str, Any]:
    """What is changed of the tower, as `vlm.build.towers.choose` takes it."""
    return {
        "encoder_kind": config.encoder_kind,
        "image_size": config.image_size,
        "image": config.image or None,
        "layer": config.layer,
        "fuse": config.fuse or None,
    }


def _tower(value: Any, own: str | None) -> Any:
    """A checkpoint's name, or keys and values: of one of our encoders' configurations, else of transformers'."""
    if isinstance(value, dict) and value.get("model_type") in model_types(own):
        return value
    return part_of(value, "encoder")


def part_of(value: str | dict[str, Any] | None, name: str) -> Any:
    """A checkpoint's path as it is; keys and values as a transformers configuration."""
    if not isinstance(value, dict):
        return value
    settings_of_part = dict(value)
    kind = settings_of_part.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.{name}: model_type {kind!r} is not known to transformers; for example siglip_vision_model or gemma"
        )
    # A value of another type, such as "28" in quotes, or a number that overflows.
    return guarded(lambda: AutoConfig.for_model(kind, **settings_of_part), f"model.{name}", ConfigError)
