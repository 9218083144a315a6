"""How many items at a time: a number, or `auto`, the largest power of two that fits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from vlm.errors import ConfigError

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]

ON_CPU = 8
"""More does not go faster there: a batch of this size keeps the cores of a usual machine busy."""
TRIAL = 4
"""Items of the one batch whose memory is measured on a GPU."""
LARGEST = 256
_SHARE = 0.8  # of the free memory; the rest is for answers that grow longer than those of the trial


def check(size: BatchSize) -> None:
    """Raise ConfigError unless `size` is at least 1 or `auto`."""
    if size != "auto" and (not isinstance(size, int) or size < 1):
        raise ConfigError(f"batch_size is {size!r}, expected at least 1, or 'auto'")


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
    """The size that is used now. `fixed` sizes are never changed: their results were asked for as they are.

    Args:
        size: to start from.
        fixed: refuse, instead of halving, when memory runs out.
    """

    def __init__(self, size: int, *, fixed: bool) -> None:
        self.size, self.fixed = size, fixed

    def shrink(self, attempted: int, item: str) -> None:
        """Memory ran out with `attempted` items, the first of them `item`. Raises ConfigError when that is final."""
        if self.fixed:
            raise ConfigError(
                f"out of memory with {attempted} items at a time (from item {item!r}); give a smaller batch size, or"
                " 'auto'"
            )
        if attempted == 1:
            raise ConfigError(f"out of memory with item {item!r} alone; free memory, or use another device or dtype")
        self.size = power_of_two(attempted / 2)
        logger.info("out of memory with %d items at a time; going on with %d", attempted, self.size)
