"""The masks of a decoder's layers: one for each layer type, over the keys that the cache will return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm.decoders.contract import SLIDING, Facts
from vlm.errors import DataError
from vlm.model import masks
from vlm.model.inputs import Inputs


def decoder_masks(facts: Facts, given: Inputs, embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """The additive mask of each layer type that the decoder has: `full_attention` and, for Gemma 2 and 3,
    `sliding_attention`.

    Args:
        facts: of the decoder.
        given: `token_type_ids` int64[B, S] or [B, T] of the new tokens at the end, or None while decoding one token at
            a time; `sequence_ids` and `cache`.
        embeds: float[B, S, D], for its shape, dtype and device.
        attention_mask: int[B, T], for cached and new tokens.

    Raises:
        DataError: a first input without token_type_ids; prefix tokens or packed samples after a filled cache; an
            attention mask that leaves the cached tokens out.
    """
    num_new, total = embeds.shape[1], attention_mask.shape[1]
    first = total == num_new
    _check_cached(facts, given, num_new, first)
    result: dict[str, Tensor] = {}
    for layer_type in dict.fromkeys(facts.layer_types):
        window = facts.window if layer_type == SLIDING else None
        layer = facts.layer_types.index(layer_type)  # layers of one type have caches of one size
        num_keys, first_key = _key_range(given.cache, layer, total, num_new)
        if first:
            allowed = _pad_keys(_first_mask(facts, given, attention_mask, window), num_keys)
        else:
            allowed = masks.decode_mask(attention_mask, num_new, num_keys, first_key, window=window)
        result[layer_type] = masks.additive(allowed, embeds.dtype)
    return result


def no_padding(inputs_embeds: Tensor, cache: Any) -> Tensor:
    """The attention mask of a batch without padding, int64[B, T], for cached and new tokens (generate() drops a mask
    that holds no zero)."""
    held = 0 if cache is None else int(cache.get_seq_length())
    rows, new = inputs_embeds.shape[:2]
    return torch.ones(rows, held + new, dtype=torch.int64, device=inputs_embeds.device)


def _check_cached(facts: Facts, given: Inputs, num_new: int, first: bool) -> None:
    """Refuse what would give a wrong mask beside a cache, or none at all."""
    # Asked at the first input only: on a GPU the answer may be a tensor, and every step would wait for it.
    if first and given.cache is not None and int(given.cache.get_seq_length()):
        raise DataError(
            f"attention_mask covers the {num_new} new tokens only, but the cache holds"
            f" {int(given.cache.get_seq_length())} more; it must cover cached and new tokens"
        )
    if first and given.token_type_ids is None:
        raise DataError(
            "token_type_ids is missing: without it prefix and suffix cannot be told apart; pass the"
            " processor's whole batch: model(**batch)"
        )
    if not first and given.sequence_ids is not None:
        raise DataError(
            "sequence_ids beside a filled cache: which packed sample the cached tokens belong to is not known"
            " any more; generate for samples that are not packed"
        )
    # Prefix tokens see those after them: cached ones cannot any more. To a causal decoder all tokens are alike.
    types = given.token_type_ids if facts.bidirectional_prefix else None
    if not first and types is not None and bool((types[:, -num_new:] == 0).any()):
        raise DataError("prefix tokens after a filled cache would not be seen by it; pass the whole prefix at once")


def _first_mask(facts: Facts, given: Inputs, attention_mask: Tensor, window: int | None) -> Tensor:
    """bool[B, S, S], before anything is cached."""
    types = given.token_type_ids
    assert types is not None
    if not facts.bidirectional_prefix:
        types = torch.ones_like(types)
    return masks.prefix_lm_mask(attention_mask, types, given.sequence_ids, window=window)


def _pad_keys(allowed: Tensor, num_keys: int) -> Tensor:
    """Hide the key slots of a static cache that are not written yet."""
    return nn.functional.pad(allowed, (0, num_keys - allowed.shape[-1]))


def _key_range(cache: Any, layer: int, total: int, num_new: int) -> tuple[int, int]:
    """(number of keys, position of the first key) that attention will see in this layer: every token so far without a
    cache, else what the cache will return (all slots of a static one, the last ones of a sliding one)."""
    if cache is None:
        return total, 0
    keys, first = cache.get_mask_sizes(num_new, layer)
    return int(keys), int(first)
