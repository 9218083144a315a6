"""Which attention backends a model runs on: those that read the additive prefix-LM mask.

`flash_attention_*` and `flex_attention` take no mask of numbers: they would drop it, and with it the difference between
prefix and suffix. A function of one's own that was registered with transformers' `AttentionInterface` gets the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AttentionInterface
from transformers.configuration_utils import PreTrainedConfig

from vlm.errors import ConfigError, nearest
from vlm.model import decoder as decoders

BACKENDS = ("sdpa", "eager")
PARTS = ("", "vision_config", "text_config")
"""What a map of backends may name; "" is the model's own, which nothing runs on."""


def check_name(asked: Any, text_config: PreTrainedConfig | None = None) -> None:
    """Refuse what no model runs on. None is no choice.

    Args:
        asked: a name for all parts, or a map as `VLM.set_attn_implementation` takes it.
        text_config: the decoder's, where it is known: the message lists what that one runs on.

    Raises:
        ConfigError: lists what there is.
    """
    if isinstance(asked, Mapping):
        unknown = [part for part in asked if part not in PARTS]
        if unknown:
            raise ConfigError(
                f"attn_implementation names {unknown[0]!r}, expected the parts vision_config and text_config"
                f"{nearest(str(unknown[0]), PARTS[1:])}"
            )
        for backend in asked.values():
            check_name(backend, text_config)
    elif asked is not None and asked not in BACKENDS and not _own(asked):
        known = BACKENDS if text_config is None else decoders.facts(text_config).backends
        raise ConfigError(
            f"attention backend {asked!r} is not supported{nearest(str(asked), known)}: it must read the prefix-LM"
            f" mask; supported: {', '.join(known)}"
        )


def check(text_config: PreTrainedConfig, asked: Any) -> None:
    """Refuse a backend that a model does not run on. None is no choice.

    Args:
        text_config: the decoder's.
        asked: a name for all parts, or a map as `VLM.set_attn_implementation` takes it.

    Raises:
        ConfigError: lists what there is.
    """
    decoder = asked.get("text_config", asked.get("")) if isinstance(asked, Mapping) else asked
    spec, facts = decoders.spec(text_config), decoders.facts(text_config)
    if decoder is not None and facts.attention_softcap is not None and decoder not in facts.backends:
        raise ConfigError(
            f"{decoder!r} attention would drop the decoder's soft-cap of {facts.attention_softcap} ({spec.title});"
            f" supported: {', '.join(facts.backends)}"
        )
    check_name(asked, text_config)


def check_weights(backend: str) -> None:
    """Refuse to ask a decoder on `backend` for its attention weights where it computes none.

    Raises:
        ConfigError: sdpa.
    """
    if backend == "sdpa":
        raise ConfigError(
            "output_attentions=True with sdpa attention, which computes no attention weights; switch first:"
            " model.set_attn_implementation('eager')"
        )


def unsupported(text_config: PreTrainedConfig, asked: Any, why: str) -> ConfigError:
    """What to say where transformers refuses a backend that is among ours."""
    return ConfigError(
        f"attention backend {asked!r} is not supported by a part of this model: {why};"
        f" supported: {', '.join(decoders.facts(text_config).backends)}"
    )


def _own(name: Any) -> bool:
    """A function that somebody registered: not one of transformers."""
    function = AttentionInterface._global_mapping.get(name)
    return function is not None and not str(getattr(function, "__module__", "")).startswith("transformers.")
