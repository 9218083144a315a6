"""Classes as vectors: the mean of the normalised embeddings of their texts, of length 1 again.

So in CLIP's notebook and in big_vision's `discriminative_classifier.py`. A mean of embeddings that are not normalised
first would be that of the longest ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm.siglip.encode import encode_texts
from vlm.words import listed

if TYPE_CHECKING:
    from vlm.siglip.class_cache import ClassCache
    from vlm.siglip.processor import DualProcessor

log = logging.getLogger(__name__)
CHUNK = 4096
"""About so many texts are embedded, and kept, together."""
Group = tuple[str, ...]
"""The texts of one class, as `vlm.siglip.templates.prompts` makes them."""


def class_embeddings(
    model: Any,
    processor: DualProcessor,
    groups: Sequence[Group],
    *,
    batch_size: int = 64,
    cache: ClassCache | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """float32[C, D] on the CPU, of length 1: one row for each class. Texts that are cut are told in a warning.

    Args:
        model: a `vlm.model.dual.DualTower`, used where it lies.
        groups: the texts of each class, at least one.
        batch_size: texts at a time.
        cache: where embeddings are kept from one process to the next; the same rows come back to the last bit.
        advance: called with a number of texts whenever so many are done.

    Raises:
        ConfigError, DataError: as `vlm.siglip.encode.encode_texts`.
    """
    rows, cut = [torch.zeros(0, model.embedding_size)], []
    for chunk in _chunks(groups):
        texts = [text for group in chunk for text in group]
        found = None if cache is None else cache.get(chunk, model.embedding_size)
        if found is None:
            found = _embedded(model, processor, chunk, batch_size, advance)
            if cache is not None:
                cache.put(chunk, *found)
        else:
            advance(len(texts))
        rows.append(found[0])
        cut += [texts[number] for number in found[1]]
    if cut:
        log.warning(
            "label texts longer than the %d tokens that the model reads, read without their end: %d (%s)",
            processor.context,
            len(cut),
            listed(cut, 3, show=lambda text: repr(text[:60])),
        )
    return torch.cat(rows)


def _chunks(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Neighbouring classes of about `CHUNK` texts; which ones depends on nothing else."""
    chunk: list[Group] = []
    for group in groups:
        chunk.append(group)
        if sum(map(len, chunk)) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _embedded(
    model: Any, processor: DualProcessor, chunk: Sequence[Group], batch_size: int, advance: Callable[[int], None]
) -> tuple[Tensor, list[int]]:
    """The rows of a chunk, and which of its texts were cut."""
    texts = [text for group in chunk for text in group]
    parts: list[Tensor] = []
    cut: list[int] = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        vectors, longer = encode_texts(model, processor, batch, batch_size=batch_size)
        parts.append(vectors)
        cut += [start + number for number in longer]
        advance(len(batch))
    means = [rows.mean(0) for rows in torch.cat(parts).split([len(group) for group in chunk])]
    return normalize(torch.stack(means), dim=-1), cut
