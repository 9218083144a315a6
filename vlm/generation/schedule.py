"""Which requests are answered together, and how many at a time: a number, a budget of tokens, or what the memory holds.

Nothing here knows how an answer is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm.data.budget import cut
from vlm.errors import ConfigError, ImageError
from vlm.images.load import ImageInput, image_size

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]

ON_CPU = 8
"""More does not go faster there: a batch of this size keeps the cores of a usual machine busy."""
TRIAL = 4
"""Items of the one batch whose memory is measured on a GPU."""
LARGEST = 256
_SHARE = 0.8  # of the free memory; the rest is for answers that grow longer than those of the trial


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How batches are formed. Answers do not depend on it beyond floating-point rounding.

    Raises:
        ConfigError: a size below 1.
    """

    size: BatchSize = 16
    """Items at a time; `auto`: the largest power of two that fits into the memory."""
    tokens: int | None = None
    """Instead of `size`: as many items as have so many image and prompt tokens, padding included."""
    beams: int = 1
    """What an item counts for in a budget of tokens: once for each beam."""
    order: Literal["length", "given"] = "length"
    """`length`: similar lengths together, so that little is padded; `given`: as they come, for who waits for them."""
    may_shrink: bool = False
    """Go on with smaller batches than `size` when memory runs out; `auto` always does."""
    advice: str = "give a smaller batch size, or 'auto'"
    """What to do when memory runs out and `size` was asked for."""

    def __post_init__(self) -> None:
        if self.size != "auto" and (not isinstance(self.size, int) or self.size < 1):
            raise ConfigError(f"batch_size is {self.size!r}, expected at least 1, or 'auto'")

    @property
    def fixed(self) -> bool:
        """Sizes that were asked for are not changed: their results were asked for as they are."""
        return not self.may_shrink and (self.size != "auto" or self.tokens is not None)


def image_sizes(images: Sequence[ImageInput]) -> list[tuple[int, int]]:
    """(width, height) of the images of an item, from their headers; none where one cannot be opened (it will be among
    the failures)."""
    try:
        return [image_size(image) for image in images]
    except ImageError:
        return []


def plan(
    prompts: Sequence[str],
    batch_size: int,
    *,
    lengths: Sequence[int] | None = None,
    batch_tokens: int | None = None,
) -> list[list[int]]:
    """Positions of the items in batches of similar length, so that little is padded.

    The plan depends on the data alone. A run that resumes therefore forms the same batches as one that was never
    stopped, and even the last bits of its numbers agree.

    Args:
        batch_size: items of a batch, ordered by the length of their prompts.
        lengths: image and prompt tokens of each item; with `batch_tokens`, the most tokens of a batch with its padding,
            they take the place of both.
    """
    if lengths is not None and batch_tokens is not None:
        return cut(lengths, batch_tokens)
    return chunks(sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index)), batch_size)


def chunks(order: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive parts of at most `size`: [0, 1, 2], 2 -> [[0, 1], [2]]."""
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def guess(device: str, trial: Callable[[], object], num_items: int) -> int:
    """A size to start from; what is too large is halved later.

    Args:
        device: where the model is; only on a CUDA device is there something to measure.
        trial: predicts `num_items` of the most demanding items.
    """
    if not device.startswith("cuda"):
        return ON_CPU
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        trial()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return max(1, num_items // 2)
    per_item = max(1, torch.cuda.max_memory_allocated(device) - before) / num_items
    torch.cuda.empty_cache()
    return power_of_two(_SHARE * torch.cuda.mem_get_info(device)[0] / per_item)


def power_of_two(fits: float) -> int:
    """The largest power of two that is at most `fits`, between 1 and `LARGEST`."""
    return 1 << (int(min(max(fits, 1), LARGEST)).bit_length() - 1)


class Limit:
    """The size that is used now.

    Args:
        size: to start from.
        batching: whether it may shrink when memory runs out, and what to advise if not.
    """

    def __init__(self, size: int, batching: Batching) -> None:
        self.size, self.batching = size, batching

    def shrink(self, attempted: int, item: str) -> None:
        """Memory ran out with `attempted` items, the first of them `item`. Raises ConfigError when that is final."""
        if self.batching.fixed:
            raise ConfigError(
                f"out of memory with {attempted} items at a time (from item {item!r}); {self.batching.advice}"
            )
        if attempted == 1:
            raise ConfigError(f"out of memory with item {item!r} alone; free memory, or use another device or dtype")
        self.size = power_of_two(attempted / 2)
        logger.info("out of memory with %d items at a time; going on with %d", attempted, self.size)
