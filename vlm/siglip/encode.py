"""Images and texts to embeddings, whole collections of them: decoding runs ahead in threads, so that the model never
waits for a file."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.errors import ConfigError, DataError, ImageError
from vlm.images.load import load_image
from vlm.model.modes import in_mode
from vlm.siglip.processor import DualProcessor


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
    for keys, inputs, bad in read_ahead(processor, images, batch_size=batch_size, decoders=decoders):
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
    _positive("batch_size", batch_size)
    rows, cut = [torch.zeros(0, model.embedding_size)], []
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        ids, longer = processor.texts(chunk)
        with torch.no_grad(), in_mode(model):
            rows.append(model.encode_text(ids.to(model.device)).float().cpu())
        check_finite(rows[-1], chunk)
        cut += [start + number for number in longer]
    return TextVectors(torch.cat(rows), tuple(cut))


def read_ahead(
    processor: DualProcessor,
    images: Iterable[tuple[Any, Any]],
    *,
    batch_size: int,
    decoders: int | None = None,
) -> Iterator[tuple[list[Any], dict[str, Tensor], list[tuple[Any, ImageError]]]]:
    """Batches of what `encode_image` takes: (keys, keyword arguments, bad ones). Decoded and resized by threads while
    the caller works on the batch before; arguments as in `encode_images`."""
    _positive("batch_size", batch_size)
    threads = min(8, len(os.sched_getaffinity(0))) if decoders is None else decoders
    _positive("decoders", threads)

    def read(source: Any) -> dict[str, Tensor] | ImageError:
        try:
            return processor.images([load_image(source, background=processor.transform.background)])
        except ImageError as error:
            return error

    waiting: deque[tuple[Any, Future[dict[str, Tensor] | ImageError]]] = deque()
    coming = iter(images)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            while True:
                for key, source in islice(coming, 2 * batch_size - len(waiting)):
                    waiting.append((key, pool.submit(read, source)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                found = [(key, future.result()) for key, future in batch]
                bad = [(key, result) for key, result in found if isinstance(result, ImageError)]
                good = [(key, result) for key, result in found if not isinstance(result, ImageError)]
                yield [key for key, _ in good], together([result for _, result in good]), bad
        finally:
            for _, future in waiting:
                future.cancel()


def together(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of single images as one batch; shorter ones are padded with zeros (NaFlex)."""
    if not inputs:
        return {}
    return {name: _padded([one[name] for one in inputs]) for name in inputs[0]}


def _padded(rows: list[Tensor]) -> Tensor:
    if len({row.shape[1:] for row in rows}) == 1:
        return torch.cat(rows)
    longest = max(row.shape[1] for row in rows)
    whole = rows[0].new_zeros(len(rows), longest, *rows[0].shape[2:])
    for place, row in zip(whole, rows, strict=True):
        place[: row.shape[1]] = row[0]
    return whole


def on(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on a device."""
    return {name: value.to(device) for name, value in inputs.items()}


def check_finite(vectors: Tensor, names: Sequence[Any]) -> None:
    """Raise `DataError` naming the first row that holds NaN or infinity."""
    odd = (~vectors.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if odd:
        raise DataError(f"the tower gives NaN or infinity for {str(names[odd[0]])[:200]}; look at both")


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}, expected at least 1")
