"""Images and texts to embeddings, whole collections of them: decoding runs ahead in threads, so that the model never
waits for a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.errors import ConfigError, DataError, ImageError
from vlm.model.modes import in_mode
from vlm.siglip.processor import DualProcessor
from vlm.siglip.reading import on, read_ahead


@dataclass(frozen=True)
class Encoded:
    """A batch of images.

    Attributes:
        keys: of those that could be read, in the order they came.
        vectors: float32[n, D] on the CPU, of length 1; n is `len(keys)`.
        bad: key and reason of those that could not.
    """

    keys: list[Any]
    vectors: Tensor
    bad: list[tuple[Any, ImageError]]


class TextVectors(NamedTuple):
    """Embeddings of texts.

    Attributes:
        vectors: float32[N, D] on the CPU, of length 1.
        cut: indexes of the texts that were longer than the context.
    """

    vectors: Tensor
    cut: tuple[int, ...]


def encode_images(
    model: Any,
    processor: DualProcessor,
    images: Iterable[tuple[Any, Any]],
    *,
    batch_size: int = 32,
    decoders: int | None = None,
) -> Iterator[Encoded]:
    """Embed images one batch after the other.

    Args:
        model: a `vlm.model.dual.DualTower`, used where it lies, in eval mode without gradients.
        images: (key, source) of each: a source is whatever `vlm.images.load.load_image` takes. Read only as far ahead
            as the threads need.
        batch_size: images that are read for one batch; those that are bad leave it smaller.
        decoders: threads that decode and resize; None: one for each core, at most eight.

    Yields:
        every image once, in the order given, in `keys` or in `bad`.

    Raises:
        ConfigError: `batch_size` or `decoders` below 1.
        DataError: the model gives NaN or infinity for an image.
    """
    for keys, inputs, bad in read_ahead(processor.transform, images, batch_size=batch_size, decoders=decoders):
        vectors = torch.zeros(0, model.embedding_size)
        if keys:
            with torch.no_grad(), in_mode(model):
                vectors = model.encode_image(**on(inputs, model.device)).float().cpu()
            check_finite(vectors, keys)
        yield Encoded(keys, vectors, bad)


def encode_texts(model: Any, processor: DualProcessor, texts: Sequence[str], *, batch_size: int = 64) -> TextVectors:
    """Embed texts, in the order given.

    Raises:
        ConfigError: the processor has no tokenizer, or `batch_size` is below 1.
        DataError: the model gives NaN or infinity for a text.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    rows, cut = [torch.zeros(0, model.embedding_size)], []
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        ids, longer = processor.texts(chunk)
        with torch.no_grad(), in_mode(model):
            rows.append(model.encode_text(ids.to(model.device)).float().cpu())
        check_finite(rows[-1], chunk)
        cut += [start + number for number in longer]
    return TextVectors(torch.cat(rows), tuple(cut))


def check_finite(vectors: Tensor, names: Sequence[Any]) -> None:
    """Raise `DataError` naming the first row that holds NaN or infinity."""
    odd = (~vectors.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if odd:
        raise DataError(f"the tower gives NaN or infinity for {str(names[odd[0]])[:200]}; look at both")
