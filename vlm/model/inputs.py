"""What a forward is given, and what it refuses: arguments that nothing would read, alone or beside the others.

A model that ignores what it is given answers another question than the one that was asked, in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from torch import Tensor, nn

from vlm.errors import ConfigError, DataError, nearest
from vlm.model.loss import Reduction

DECODER_OPTIONS = ("output_attentions", "output_hidden_states", "return_dict")
"""Further arguments of a forward: those that transformers' decoders read."""
NAFLEX = ("pixel_attention_mask", "spatial_shapes")
PIXELS = ("pixel_values", *NAFLEX)
"""Arguments that are about pictures."""
TENSORS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "labels",
    "sequence_ids",
    *PIXELS,
    "inputs_embeds",
)
"""Arguments of a forward whose names a mistyped one is compared with."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch on its way through the model. The tensors are those of `vlm.Batch`; `VLM.forward` says what the others
    are. `cache` is the decoder's, under whichever of its two names it came."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | dict[str, Tensor] | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    sequence_ids: Tensor | None = None
    pixel_values: Tensor | None = None
    pixel_attention_mask: Tensor | None = None
    spatial_shapes: Tensor | None = None
    cache: Any = None
    inputs_embeds: Tensor | None = None
    use_cache: bool | None = None
    encoded: Any = None

    def arguments(self) -> dict[str, Any]:
        """Name -> value, as a forward takes them."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def pixels(self) -> dict[str, Tensor]:
        """`pixel_values` and what NaFlex adds to it, as far as they are there."""
        named = {name: getattr(self, name) for name in PIXELS}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a forward shall return beside hidden states; `VLM.forward` says what the settings are."""

    reduction: Reduction = "token"
    num_items: Tensor | int | None = None
    skip_logits: bool | None = None
    logits_to_keep: int | Tensor | None = None

    def logits(self, training: bool) -> bool:
        """Whether logits are made.

        Args:
            training: there are labels, and the step is one of training.
        """
        if self.skip_logits is None:
            return not training or self.logits_to_keep is not None
        return not self.skip_logits

    def keep(self, hidden: Tensor) -> Tensor:
        """The positions whose logits are wanted: the last n (None and 0: all), or an index."""
        if isinstance(self.logits_to_keep, Tensor):
            return hidden[:, self.logits_to_keep]
        return hidden[:, -self.logits_to_keep :] if self.logits_to_keep else hidden


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


def check_sources(given: Inputs) -> None:
    """Refuse two sources of one thing, and parts of an image without the image.

    Raises:
        DataError: names the arguments.
    """
    embedded = given.inputs_embeds is not None
    if (given.input_ids is None) != embedded:
        raise DataError("pass exactly one of input_ids and inputs_embeds")
    images = list(given.pixels())
    if embedded and (images or given.encoded is not None):
        shown = ", ".join(images or ["encoded"])
        raise DataError(
            f"inputs_embeds beside {shown}: embeddings have no placeholders, so the pictures would be ignored; pass"
            f" input_ids instead, or put the image tokens into the embeddings (model.model.embed) and leave {shown} out"
        )
    if given.encoded is not None and images:
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


def check_labels(given: Inputs, embeds: Tensor) -> None:
    """Refuse labels that cannot be used.

    Args:
        embeds: float[B, S, D], the tokens' embeddings.

    Raises:
        DataError: no token_type_ids, or another shape than the tokens'.
    """
    labels = given.labels
    if labels is None:
        return
    if given.token_type_ids is None:
        raise DataError(
            "labels without token_type_ids: the prefix-LM mask cannot be known and the targets would leak;"
            " pass the processor's whole batch: model(**batch)"
        )
    if labels.shape != embeds.shape[:2]:
        raise DataError(
            f"labels have shape {tuple(labels.shape)}, the tokens {tuple(embeds.shape[:2])}; each token has its"
            f" label, -100 where nothing is supervised (they are shifted inside the model)"
        )


def check_wanted(wanted: Wanted, labels: Tensor | None) -> None:
    """Refuse settings of the loss that nothing would read, or that contradict each other.

    Raises:
        ConfigError: which, and why.
    """
    known, reduction = get_args(Reduction), wanted.reduction
    if reduction not in known:
        raise ConfigError(
            f"unknown loss reduction {reduction!r}{nearest(str(reduction), known)}; known: {', '.join(known)}"
        )
    if labels is None and reduction != "token":
        raise ConfigError(f"reduction={reduction!r} without labels: it is of the loss, which needs labels")
    if labels is None and wanted.skip_logits:
        raise ConfigError("skip_logits=True without labels: there would be neither a loss nor logits")
    if wanted.skip_logits and wanted.logits_to_keep is not None:
        raise ConfigError("skip_logits=True beside logits_to_keep: leave one of the two out")
    if wanted.num_items is not None and reduction != "token":
        raise ConfigError(
            f"num_items_in_batch beside reduction={reduction!r}: it counts tokens, this reduction counts examples;"
            f" divide loss_sum by the sum of loss_weight over the micro-batches instead"
        )
