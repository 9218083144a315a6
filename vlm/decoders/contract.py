"""What a decoder says of itself: the `Spec` of its file. Nothing else asks a decoder by name, class or attribute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"
"""Layer types, as transformers calls them."""
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "vocab_size": 4,  # the control tokens; grows to the tokenizer's
}
"""Sizes of a decoder for tests."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What follows from one configuration of a decoder. Read it when it is needed: configurations may be changed.

    Attributes:
        embedding_scale: what the embedding layer multiplies token embeddings by; image tokens are not scaled.
        attention_width: query heads times their size.
        layer_types: of each layer, `full_attention` or `sliding_attention`.
        context: positions that it has learnt; None where it does not say.
        window: keys that a sliding layer sees, or None.
        attention_softcap: c of `c * tanh(score / c)` on attention scores, or None.
        final_softcap: the same on logits.
        bidirectional_prefix: image and prefix tokens see each other in both directions; False: causal everywhere.
        backends: attention code that computes what the configuration says; the first is the usual one.
        by_layer_type: its forward takes a map from layer type to mask, else the mask itself.
    """

    embedding_scale: float
    attention_width: int
    layer_types: tuple[str, ...]
    context: int | None = None
    window: int | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    bidirectional_prefix: bool = True
    backends: tuple[str, ...] = ("sdpa", "eager")
    by_layer_type: bool = True

    @property
    def windowed(self) -> bool:
        """Whether a layer hides what is further back than the window."""
        return SLIDING in self.layer_types


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A decoder, declared by its file as `SPEC`.

    Attributes:
        title: its name for people.
        config, model: transformers' classes; the model without an output layer.
        blocks: names of the classes that `device_map` and FSDP keep whole.
        facts: reads the rest out of a configuration.
        final_softcap_setting: the field of a configuration that holds the soft-cap of the logits, if there is one.
        small: settings of a configuration for tests.
        checkpoints: further `model_type`s of files that hold this decoder, beside its own.
        bos, eos, separator: tokens around a prompt, `[bos] prefix [separator] suffix [eos]`.
        overflows_float16: activations exceed 65504.
        in_paligemma: PaliGemma's format holds it.
        window_in_paligemma: PaliGemma's original runs it with its window.
        drop_window: changes a configuration, and a model that was built from it where one is given, to full attention
            in all layers.
    """

    title: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    blocks: tuple[str, ...]
    facts: Callable[[Any], Facts]
    final_softcap_setting: str | None = None
    small: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    checkpoints: tuple[str, ...] = ()
    bos: str = "<bos>"
    eos: str = "<eos>"
    separator: str = "\n"
    overflows_float16: bool = True
    in_paligemma: bool = False
    window_in_paligemma: bool = True
    drop_window: Callable[[Any, Any], None] = lambda config, model: None


def usable_backends(attention_softcap: float | None) -> tuple[str, ...]:
    """sdpa has no soft-cap: transformers 5.17 drops it in silence, later versions refuse."""
    return ("sdpa", "eager") if attention_softcap is None else ("eager",)


def all_full(config: Any, model: Any = None) -> None:
    """`Spec.drop_window` of a decoder whose configuration lists its layer types."""
    if SLIDING not in (config.layer_types or ()):
        return
    config.layer_types = [FULL] * config.num_hidden_layers
    for layer in () if model is None else model.layers:
        # transformers 5.17 to 5.24 call it by two names, and each layer keeps its own copies.
        for module in (layer, layer.self_attn):
            for name in ("attention_type", "layer_type"):
                if hasattr(module, name):
                    setattr(module, name, FULL)
        layer.self_attn.sliding_window = None
        layer.self_attn.is_sliding = False
