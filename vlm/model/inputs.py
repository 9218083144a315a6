"""What a forward refuses: arguments that nothing would read, alone or beside the others.

A model that ignores what it is given answers another question than the one that was asked, in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import Tensor, nn

from vlm.errors import ConfigError, DataError, nearest
from vlm.model.loss import Reduction

DECODER_OPTIONS = ("output_attentions", "output_hidden_states", "return_dict")
"""Further arguments of a forward: those that transformers' decoders read."""
TENSORS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "labels",
    "sequence_ids",
    "pixel_values",
    "pixel_attention_mask",
    "spatial_shapes",
    "inputs_embeds",
)
"""Arguments of a forward whose names a mistyped one is compared with."""


def check_names(given: Mapping[str, Any]) -> None:
    """Refuse arguments that no part of the model reads; None says nothing and passes.

    Raises:
        DataError: names them, and what was probably meant.
    """
    unread = [name for name, value in given.items() if value is not None and name not in DECODER_OPTIONS]
    if unread:
        shown = ", ".join(f"{name}{nearest(name, (*TENSORS, *DECODER_OPTIONS))}" for name in unread)
        raise DataError(
            f"nothing in the model reads {shown}; leave it out, or pass the processor's batch: model(**batch)"
        )


def check_sources(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, encoded: Any, pixels: Mapping[str, Tensor | None]
) -> None:
    """Refuse two sources of one thing, and parts of an image without the image.

    Args:
        encoded: tower features, or None. pixels: `pixel_values` and what NaFlex adds to it.

    Raises:
        DataError: names the arguments.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise DataError("pass exactly one of input_ids and inputs_embeds")
    images = [name for name, value in pixels.items() if value is not None]
    if inputs_embeds is not None and (images or encoded is not None):
        shown = ", ".join(images or ["encoded"])
        raise DataError(
            f"inputs_embeds beside {shown}: embeddings have no placeholders, so the pictures would be ignored; pass"
            f" input_ids instead, or put the image tokens into the embeddings (model.model.embed) and leave {shown} out"
        )
    if encoded is not None and images:
        raise DataError(f"encoded beside {', '.join(images)}: both are the pictures; pass one of the two")
    if images and "pixel_values" not in images:
        raise DataError(f"{', '.join(images)} without pixel_values; pass the processor's whole batch: model(**batch)")


def check_tower(tower: nn.Module, given: Iterable[str], kind: str) -> None:
    """Refuse inputs beside `pixel_values` that a tower does not read, or lacks.

    Args:
        tower: its forward says what it reads; one that takes any names is not checked.
        given: names of the inputs. kind: the tower's, for the message.

    Raises:
        DataError: names them.
    """
    _, *others = inspect.signature(tower.forward).parameters.values()
    if any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in others):
        return
    unread = sorted(set(given) - {parameter.name for parameter in others})
    if unread:
        raise DataError(
            f"the {kind} tower does not read {', '.join(unread)}, which belong to a NaFlex tower; the batch is not of"
            f" this model's processor"
        )
    missing = [p.name for p in others if p.default is p.empty and p.name not in set(given)]
    if missing:
        raise DataError(
            f"the {kind} tower needs {', '.join(missing)} beside pixel_values; pass the processor's whole batch:"
            f" model(**batch)"
        )


def only_cache(cache: Any, past_key_values: Any) -> Any:
    """The decoder's cache, which has two names.

    Raises:
        DataError: two different ones.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise DataError("cache and past_key_values are two names of one argument; pass one of the two")
    return past_key_values if cache is None else cache


def check_labels(labels: Tensor | None, token_type_ids: Tensor | None, inputs_embeds: Tensor) -> None:
    """Refuse labels that cannot be used.

    Raises:
        DataError: no token_type_ids, or another shape than the tokens'.
    """
    if labels is None:
        return
    if token_type_ids is None:
        raise DataError(
            "labels without token_type_ids: the prefix-LM mask cannot be known and the targets would leak;"
            " pass the processor's whole batch: model(**batch)"
        )
    if labels.shape != inputs_embeds.shape[:2]:
        raise DataError(
            f"labels have shape {tuple(labels.shape)}, the tokens {tuple(inputs_embeds.shape[:2])}; each token has its"
            f" label, -100 where nothing is supervised (they are shifted inside the model)"
        )


def check_loss_settings(
    labels: Tensor | None, reduction: str, num_items: Any, skip_logits: bool | None, logits_to_keep: Any
) -> None:
    """Refuse settings of the loss that nothing would read, or that contradict each other.

    Raises:
        ConfigError: which, and why.
    """
    known = get_args(Reduction)
    if reduction not in known:
        raise ConfigError(
            f"unknown loss reduction {reduction!r}{nearest(str(reduction), known)}; known: {', '.join(known)}"
        )
    if labels is None and reduction != "token":
        raise ConfigError(f"reduction={reduction!r} without labels: it is of the loss, which needs labels")
    if labels is None and skip_logits:
        raise ConfigError("skip_logits=True without labels: there would be neither a loss nor logits")
    if skip_logits and logits_to_keep is not None:
        raise ConfigError("skip_logits=True beside logits_to_keep: leave one of the two out")
    if num_items is not None and reduction != "token":
        raise ConfigError(
            f"num_items_in_batch beside reduction={reduction!r}: it counts tokens, this reduction counts examples;"
            f" divide loss_sum by the sum of loss_weight over the micro-batches instead"
        )
