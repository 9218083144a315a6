"""The prefix-LM attention mask, built by us and always passed explicitly.

Image and prefix tokens (token type 0) attend to each other in both directions; suffix tokens (type 1) attend to
everything before them. No token sees padding or another packed sample. With `token_type_ids` 0 0 1 1 (two prefix
tokens, two suffix tokens) the mask is, row = query, column = key,

    1 1 0 0
    1 1 0 0
    1 1 1 0
    1 1 1 1

with one padding token on the right (`attention_mask` 1 1 1 1 0), and on the left (0 1 1 1 1),

    1 1 0 0 0        1 0 0 0 0
    1 1 0 0 0        0 1 1 0 0
    1 1 1 0 0        0 1 1 0 0
    1 1 1 1 0        0 1 1 1 0
    0 0 0 0 1        0 1 1 1 1

A padding query attends to itself alone, so that no softmax row is empty (an empty row is NaN on some backends). Two
packed samples of one prefix and one suffix token each (`sequence_ids` 0 0 1 1, `token_type_ids` 0 1 0 1) give

    1 0 0 0
    1 1 0 0
    0 0 1 0
    0 0 1 1

Source: PaliGemma, section 3.2.1 and figure 2 (arXiv 2407.07726); big_vision `paligemma.make_attn_mask`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_lm_mask(
    attention_mask: Tensor,
    token_type_ids: Tensor,
    sequence_ids: Tensor | None = None,
    *,
    window: int | None = None,
) -> Tensor:
    """Who may attend to whom, over one whole sequence.

    Args:
        attention_mask: int or bool[B, S], 0 on padding.
        token_type_ids: int[B, S], 0 = image and prefix, 1 = suffix.
        sequence_ids: int[B, S] or None, which packed sample a token belongs to.
        window: sliding window of the layer (Gemma 2 and 3): a query sees at most the `window` keys that end with
            itself. The bidirectional prefix block is exempt, as in transformers.

    Returns:
        bool[B, S, S], True where query (row) may attend to key (column).
    """
    valid = attention_mask.bool()
    index = torch.arange(valid.shape[1], device=valid.device)
    distance = index[:, None] - index[None, :]
    causal = distance >= 0
    if window is not None:
        causal = causal & (distance < window)
    prefix = token_type_ids == 0
    allowed = causal | (prefix[:, :, None] & prefix[:, None, :])
    allowed = allowed & valid[:, :, None] & valid[:, None, :]
    if sequence_ids is not None:
        allowed = allowed & (sequence_ids[:, :, None] == sequence_ids[:, None, :])
    padding_diagonal = torch.diag_embed(~valid)
    return allowed | padding_diagonal


def decode_mask(
    attention_mask: Tensor, num_queries: int, num_keys: int, first_key: int = 0, *, window: int | None = None
) -> Tensor:
    """Who may attend to whom while generating: the queries are the last tokens of the sequence, all of them suffix
    tokens.

    Args:
        attention_mask: int or bool[B, T], 0 on padding, for the whole sequence so far (cached tokens and queries).
        num_queries: number of query positions, the last ones of T.
        num_keys: number of key positions that the cache returns. A static cache has more than T: those not written yet
            stay hidden.
        first_key: position of the first key (a sliding-window cache has dropped the ones before it).
        window: sliding window of the layer or None.

    Returns:
        bool[B, num_queries, num_keys].
    """
    total = attention_mask.shape[1]
    device = attention_mask.device
    queries = torch.arange(total - num_queries, total, device=device)
    keys = torch.arange(first_key, first_key + num_keys, device=device)
    distance = queries[:, None] - keys[None, :]
    causal = distance >= 0
    if window is not None:
        causal = causal & (distance < window)
    written = keys < total
    valid = attention_mask.bool()[:, keys.clamp(max=total - 1)] & written
    return causal[None] & valid[:, None, :]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to attention scores: 0 where allowed, the most negative finite number elsewhere.

    A float mask is right on the eager and sdpa backends alike; a boolean one is added as 1.0 by eager attention.

    Args:
        allowed: bool[B, Q, K].
        dtype: dtype of the decoder's activations.

    Returns:
        dtype[B, 1, Q, K].
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def position_ids(attention_mask: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
    """Positions that count real tokens only, from 0, and restart in each packed sample.

    Args:
        attention_mask: int or bool[B, S], 0 on padding.
        sequence_ids: int[B, S] or None.

    Returns:
        int64[B, S]; 0 on padding.
    """
    valid = attention_mask.long()
    positions = valid.cumsum(-1) - 1
    if sequence_ids is not None:
        new = torch.ones_like(sequence_ids, dtype=torch.bool)
        new[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
        start = torch.where(new, positions, 0).cummax(-1).values
        positions = positions - start
    return positions.masked_fill(valid == 0, 0).clamp(min=0)
