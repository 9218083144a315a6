"""Images for a tower: decoded and resized by threads, some batches ahead of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError, ImageError
from vlm.images.load import load_image
from vlm.images.transforms import ImageTransform
from vlm.threads import cores


class Prepared(NamedTuple):
    """A batch for a tower.

    Attributes:
        keys: of the images that could be read, in the order they came.
        inputs: keyword arguments of the tower; empty where there is none.
        bad: key and reason of those that could not.
    """

    keys: list[Any]
    inputs: dict[str, Tensor]
    bad: list[tuple[Any, ImageError]]


def pixels(transform: ImageTransform, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """RGB images as keyword arguments of a tower; those of NaFlex come with their mask and grids."""
    found = transform(images)
    if found.pixel_attention_mask is None or found.spatial_shapes is None:
        return {"pixel_values": found.pixel_values}
    return {
        "pixel_values": found.pixel_values,
        "pixel_attention_mask": found.pixel_attention_mask,
        "spatial_shapes": found.spatial_shapes,
    }


def read_ahead(
    transform: ImageTransform, images: Iterable[tuple[Any, Any]], *, batch_size: int, decoders: int | None = None
) -> Iterator[Prepared]:
    """Batches of (key, source), in the order given, while the caller works on the batch before.

    Args:
        images: a source is whatever `vlm.images.load.load_image` takes. At most two batches are read ahead.
        batch_size: images that are read for one batch; those that are bad leave it smaller.
        decoders: threads; None: one for each core, at most eight.

    Raises:
        ConfigError: `batch_size` or `decoders` below 1.
    """
    threads = min(8, cores()) if decoders is None else decoders
    for name, value in (("batch_size", batch_size), ("decoders", threads)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")

    def read(source: Any) -> dict[str, Tensor] | ImageError:
        try:
            return pixels(transform, [load_image(source, background=transform.background)])
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
                yield _batch([(key, future.result()) for key, future in batch])
        finally:
            for _, future in waiting:
                future.cancel()


def _batch(found: list[tuple[Any, dict[str, Tensor] | ImageError]]) -> Prepared:
    good = [(key, result) for key, result in found if not isinstance(result, ImageError)]
    bad = [(key, result) for key, result in found if isinstance(result, ImageError)]
    inputs = [result for _, result in good]
    names = inputs[0] if inputs else {}
    return Prepared([key for key, _ in good], {name: _joined([one[name] for one in inputs]) for name in names}, bad)


def _joined(rows: list[Tensor]) -> Tensor:
    """Single images as one batch; shorter ones are padded with zeros (NaFlex)."""
    if len({row.shape[1:] for row in rows}) == 1:
        return torch.cat(rows)
    longest = max(row.shape[1] for row in rows)
    whole = rows[0].new_zeros(len(rows), longest, *rows[0].shape[2:])
    for place, row in zip(whole, rows, strict=True):
        place[: row.shape[1]] = row[0]
    return whole


def on(inputs: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The tensors on a device."""
    return {name: value.to(device) for name, value in inputs.items()}
