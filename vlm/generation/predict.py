"""Every item's answer, in batches: images decoded ahead, bad ones recorded, memory that runs out, shares of processes.

What an answer is, the caller says: text that was generated, or the likeliest of some candidates.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlm.data.examples import Example
from vlm.errors import ConfigError, DataError, ImageError
from vlm.generation import batch_size, batches
from vlm.generation.batch_size import BatchSize, Limit
from vlm.generation.journal import PredictionStore, Record
from vlm.generation.progress import Progress
from vlm.images.load import load_image
from vlm.ranks import ALONE, Processes

logger = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 100
"""So many undecodable images one after another mean a broken disk or a wrong folder, not bad luck: the run stops."""

Pictures = list[Image.Image]
Answer = Callable[[Sequence[Example], Sequence[Pictures]], list[dict[str, Any]]]
"""Examples and the decoded images of each -> the fields of their records, `prediction` among them."""

_DECODERS = 2  # threads that decode images while the model works; Pillow releases the interpreter lock


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Who answers.

    Attributes:
        answer: called with items whose images could all be decoded.
        background: RGB shown behind transparent pixels.
        device: where the model is, for `batch_size.guess`.
        lengths: image and prompt tokens of each example, for batches by a budget of tokens.
    """

    answer: Answer
    background: tuple[int, int, int]
    device: str = "cpu"
    lengths: Callable[[Sequence[Example]], list[int]] | None = None


def predict(
    who: Answerer,
    examples: Sequence[Example],
    store: PredictionStore,
    size: BatchSize,
    *,
    batch_tokens: int | None = None,
    group: Processes = ALONE,
    progress: bool = True,
) -> int:
    """Predict what the store does not hold yet, this process its share of the batches; returns the size of the largest.

    With `batch_tokens` batches are as many items as have so many image and prompt tokens, and `size` is not read.

    A batch of which a part is there already (the run was killed while it was written, or had another batch size) is
    predicted whole, so that its numbers do not depend on the interruption; only the missing items are added.

    Raises:
        DataError: `MAX_BAD_IN_A_ROW` images in a row could not be decoded.
        ConfigError: memory runs out with a fixed size, or with one item.
    """
    if all(example.id in store.records for example in examples):
        return 0 if size == "auto" else size
    batches, chosen = _plan(who, examples, size, batch_tokens, group)
    todo = [batch for batch in batches if any(example.id not in store.records for example in batch)]
    mine = todo[group.rank :: group.world]
    limit = Limit(chosen, fixed=size != "auto" or batch_tokens is not None)
    bad_in_a_row = 0
    label = "predict" if group.world == 1 else f"predict (process {group.rank} of {group.world})"
    total = len(examples) if group.world == 1 else sum(map(len, mine))
    done = len(store.records) if group.world == 1 else 0
    with Progress(total, done=done, label=label, visible=progress and group.main) as bar:
        for batch, images in _decoded(mine, who.background):
            for records in _answered(who, batch, images, limit):
                for record in records:
                    bad_in_a_row = bad_in_a_row + 1 if "error" in record else 0
                new = [record for record in records if record["id"] not in store.records]
                store.append(new)
                bar.advance(len(new))
                if bad_in_a_row >= MAX_BAD_IN_A_ROW:
                    last = records[-1]["error"]["message"]
                    raise DataError(f"{bad_in_a_row} images in a row could not be decoded; the last: {last}")
    return limit.size


def answer_all(who: Answerer, batches: Sequence[Sequence[Example]]) -> list[Record]:
    """The records of these batches, kept in memory only."""
    limit = Limit(max(map(len, batches), default=1), fixed=False)
    return [
        record
        for batch, images in _decoded(batches, who.background)
        for records in _answered(who, batch, images, limit)
        for record in records
    ]


def _plan(
    who: Answerer, examples: Sequence[Example], size: BatchSize, batch_tokens: int | None, group: Processes
) -> tuple[list[list[Example]], int]:
    """All batches, the same in every process, and the most items of one."""
    if batch_tokens is None:
        chosen = _choose(who, examples, size, group)
        plan = batches.plan(examples, chosen)
    else:
        if who.lengths is None:
            raise ConfigError("batch_tokens needs to know how long prompts are, and this predictor has no `lengths`")
        plan = batches.plan(examples, 1, lengths=who.lengths(examples), batch_tokens=batch_tokens)
        chosen = max(map(len, plan))
    return [[examples[i] for i in batch] for batch in plan], chosen


def _choose(who: Answerer, examples: Sequence[Example], size: BatchSize, group: Processes) -> int:
    """The size of this run, the same for all processes."""
    if size != "auto":
        return size
    hardest = [examples[i] for i in batches.plan(examples, len(examples))[0][-batch_size.TRIAL :]]
    decoded = [(example, decode(example, who.background)) for example in hardest]
    usable = [(example, images) for example, images in decoded if not isinstance(images, ImageError)]

    def trial() -> None:
        who.answer([example for example, _ in usable], [images for _, images in usable])

    guessed = batch_size.guess(who.device, trial, len(usable)) if usable else 1
    chosen = min([*group.gather(guessed), batch_size.power_of_two(len(examples))])
    if group.main:
        logger.info("batch size %d (auto, on %s)", chosen, who.device)
    return chosen


# --- One batch --------------------------------------------------------------------------------------------------------


def _answered(
    who: Answerer, batch: Sequence[Example], images: Sequence[Pictures | ImageError], limit: Limit
) -> Iterator[list[Record]]:
    """The records of a batch, in parts where the whole no longer fits."""
    start = 0
    while start < len(batch):
        end = min(len(batch), start + limit.size)
        records = _attempt(who, batch[start:end], images[start:end])
        if records is None:
            limit.shrink(end - start, batch[start].id)
            continue
        yield records
        start = end


def _attempt(who: Answerer, batch: Sequence[Example], images: Sequence[Pictures | ImageError]) -> list[Record] | None:
    """One record per example, or None when memory ran out."""
    usable = [(ex, im) for ex, im in zip(batch, images, strict=True) if not isinstance(im, ImageError)]
    fields: list[dict[str, Any]] | None = []
    try:
        if usable:
            fields = who.answer([example for example, _ in usable], [pictures for _, pictures in usable])
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        fields = None
    if fields is None:
        _free()  # only here: inside `except`, the frames of the exception still hold their tensors
        return None
    said = dict(zip((example.id for example, _ in usable), fields, strict=True))
    return [_record(example, pictures, said) for example, pictures in zip(batch, images, strict=True)]


def _record(example: Example, pictures: Pictures | ImageError, said: dict[str, dict[str, Any]]) -> Record:
    head = {"id": example.id, "prefix": example.prefix}
    if isinstance(pictures, ImageError):
        return {**head, "prediction": "", "error": {"code": pictures.code, "message": str(pictures)}}
    return {**head, **said[example.id]}


def _out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Images -----------------------------------------------------------------------------------------------------------


def decode(example: Example, background: tuple[int, int, int]) -> Pictures | ImageError:
    """All images of an example, or the error of the first that cannot be used."""
    try:
        return [load_image(image, background=background) for image in example.images]
    except ImageError as error:
        return error


def _decoded(
    batches: Sequence[Sequence[Example]], background: tuple[int, int, int]
) -> Iterator[tuple[Sequence[Example], list[Pictures | ImageError]]]:
    """Each batch with its decoded images, one batch ahead of the consumer."""
    with ThreadPoolExecutor(_DECODERS) as pool:
        waiting: list[list[Future[Pictures | ImageError]]] = []
        for position, batch in enumerate(batches):
            for ahead in batches[position + len(waiting) : position + 2]:
                waiting.append([pool.submit(decode, example, background) for example in ahead])
            yield batch, [future.result() for future in waiting.pop(0)]
