"""Cross-entropy of the supervised tokens, straight from hidden states.

Only rows that carry a label reach the vocabulary: with V = 257,216 the logits of a whole sequence are by far the
largest tensor of a training step. Large row counts go through in chunks that are recomputed in the backward pass, so
the logits of at most one chunk exist at a time.

Two reductions, both returned as an unnormalised sum and its weight, so that a training loop can divide by the weight
over all micro-batches and ranks:

    token     weight 1 for each supervised token: the mean over all tokens (the default)
    example   weight 1/n for each of an example's n tokens: the mean over examples of their means (PaliGemma's)

Source of `example`: big_vision `trainers/proj/paligemma/train.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm.errors import ConfigError, nearest

Reduction = Literal["token", "example"]
IGNORE = -100
CHUNK_BYTES = 512 * 2**20
"""Logits of one chunk, in float32 bytes."""
Head = Callable[[Tensor], Tensor]
"""An output layer: hidden states float[..., D] to logits float[..., V]."""


class SupervisedRows(NamedTuple):
    """The positions that predict a supervised token.

    Attributes:
        batch: int64[R], sample index.
        position: int64[R], index of the hidden state, one before the token it predicts.
        target: int64[R], the token to predict.
        weight: float32[R], share of each row in the sum.
        total: float32[], what the sum is divided by for this batch alone.
    """

    batch: Tensor
    position: Tensor
    target: Tensor
    weight: Tensor
    total: Tensor


def supervised_rows(
    labels: Tensor, sequence_ids: Tensor | None = None, reduction: Reduction = "token"
) -> SupervisedRows:
    """Find the rows that carry a label (labels are shifted here: the hidden state at s predicts the label at s + 1).

    Args:
        labels: int64[B, S], -100 where nothing is supervised.
        sequence_ids: int[B, S] or None; in a packed batch the examples of the `example` reduction are the packed
            samples.
        reduction: `token` or `example`.

    Raises:
        ConfigError: unknown reduction.
    """
    if reduction not in get_args(Reduction):
        known = list(get_args(Reduction))
        raise ConfigError(
            f"unknown loss reduction {reduction!r}{nearest(str(reduction), known)}; known: {', '.join(known)}"
        )
    target = labels[:, 1:]
    batch, position = (target != IGNORE).nonzero(as_tuple=True)
    weight = torch.ones(batch.shape, dtype=torch.float32, device=labels.device)
    if reduction == "example":
        group = (
            batch if sequence_ids is None else batch * (int(sequence_ids.max()) + 1) + sequence_ids[batch, position + 1]
        )
        _, inverse, count = torch.unique(group, return_inverse=True, return_counts=True)
        weight = 1.0 / count[inverse].float()
        total = torch.tensor(float(count.numel()), device=labels.device)
    else:
        total = weight.sum()
    return SupervisedRows(batch, position, target[batch, position], weight, total)


def linear_cross_entropy(
    hidden: Tensor,
    head: Head | Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    vocabulary: int | None = None,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Weighted sum of `-log softmax(head(hidden))[target]`, in float32.

    Args:
        hidden: float[R, D], hidden states of the supervised rows.
        head: the output layer, which is called: whatever wraps, hooks, quantises or offloads it takes part, once for
            each chunk and, with several chunks, once more in the backward pass. Or its matrix, float[V, D].
        target: int64[R].
        weight: float32[R].
        vocabulary: V, which decides how many rows a chunk has; needed beside a layer only.
        softcap: c of `c * tanh(logits / c)` (Gemma 2), or None.
        chunk_rows: rows at a time; None chooses it so that one chunk of float32 logits takes at most `CHUNK_BYTES`.

    Returns:
        float32[], differentiable in `hidden` and in the parameters of `head`.

    Raises:
        ConfigError: a layer without `vocabulary` or `chunk_rows`.
    """
    size = head.shape[0] if isinstance(head, Tensor) else vocabulary
    if chunk_rows is None and size is None:
        raise ConfigError("linear_cross_entropy of a layer needs vocabulary or chunk_rows: how many rows fit a chunk")
    rows = chunk_rows or max(1, CHUNK_BYTES // (4 * int(size or 1)))
    layer = _of_rows(head)
    if hidden.shape[0] <= rows:
        return _chunk_loss(hidden, layer, target, weight, softcap)
    chunks = zip(hidden.split(rows), target.split(rows), weight.split(rows), strict=True)
    parts = [checkpoint(_chunk_loss, h, layer, t, w, softcap, use_reentrant=False) for h, t, w in chunks]
    return torch.stack(parts).sum()


def _of_rows(head: Head | Tensor) -> Head:
    """The output layer as a function of rows, float[R, D] to float[R, V]."""
    if isinstance(head, Tensor):
        return lambda rows: F.linear(rows, head)
    # As one sequence: what wraps an output layer may expect float[B, S, D], which the layer gets elsewhere. `squeeze`
    # because an index would copy the logits in the backward pass.
    return lambda rows: head(rows.unsqueeze(0)).squeeze(0)


def _chunk_loss(hidden: Tensor, layer: Head, target: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = apply_softcap(layer(hidden).float(), softcap)
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum()


def apply_softcap(logits: Tensor, softcap: float | None) -> Tensor:
    """`c * tanh(logits / c)` (Gemma 2, arXiv 2408.00118, section 2), or the logits themselves when `softcap` is
    None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def sigmoid_contrastive(logits: Tensor) -> Tensor:
    """SigLIP's loss: each image-text pair is a yes/no question of its own; the diagonal holds the pairs that belong
    together.

    `-1/B sum_ij log sigmoid(z_ij * logits_ij)`, z = 1 on the diagonal and -1 elsewhere (arXiv 2303.15343, section 3.2;
    big_vision `trainers/proj/image_text/siglip.py`).

    Args:
        logits: float[B, B], image x text.

    Returns:
        float32[], the sum over texts, averaged over images.

    Raises:
        ConfigError: the matrix is not square.
    """
    _check_pairs(logits)
    sign = 2 * torch.eye(logits.shape[0], device=logits.device) - 1
    return -F.logsigmoid(sign * logits.float()).sum(-1).mean()


def softmax_contrastive(logits: Tensor) -> Tensor:
    """CLIP's loss: for each image its text among all texts, for each text its image among all images, and the mean of
    the two (arXiv 2103.00020, figure 3).

    Args:
        logits: float[B, B], image x text.

    Returns:
        float32[].

    Raises:
        ConfigError: the matrix is not square.
    """
    _check_pairs(logits)
    own = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits.float(), own) + F.cross_entropy(logits.float().T, own)) / 2


def _check_pairs(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ConfigError(f"logits have shape {tuple(logits.shape)}, expected one text per image: [B, B]")
