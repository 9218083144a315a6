"""Which items are answered together: batches of similar length, a function of the data alone."""

from __future__ import annotations

from collections.abc import Sequence

from vlm.data.budget import cut
from vlm.data.examples import Example
from vlm.errors import ImageError
from vlm.images.load import image_size


def image_sizes(example: Example) -> list[tuple[int, int]]:
    """(width, height) of the images of an item, from their headers; none where one cannot be opened (it will be among
    the failures)."""
    try:
        return [image_size(image) for image in example.images]
    except ImageError:
        return []


def plan(
    examples: Sequence[Example],
    batch_size: int,
    *,
    lengths: Sequence[int] | None = None,
    batch_tokens: int | None = None,
) -> list[list[int]]:
    """Positions of the examples in batches of similar length, so that little is padded.

    The plan depends on the data alone. A run that resumes therefore forms the same batches as one that was never
    stopped, and even the last bits of its numbers agree.

    Args:
        batch_size: items of a batch, ordered by the length of their prompts.
        lengths: image and prompt tokens of each item; with `batch_tokens`, the most tokens of a batch with its padding,
            they take the place of both.
    """
    if lengths is not None and batch_tokens is not None:
        return cut(lengths, batch_tokens)
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index].prefix), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
