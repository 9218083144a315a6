"""From a `Key` to a batch: the dataset's items are whole micro-batches, so all slow work is the loading process's."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vlm.data.augment import Augmentation, OfImages, apply
from vlm.data.budget import cut
from vlm.data.examples import Example
from vlm.data.order import Key, Mixture, drawn
from vlm.errors import ConfigError, DataError, ImageError, VLMError
from vlm.images.load import load_image
from vlm.model.batch import Batch
from vlm.model.processor import Processor
from vlm.train.items import Chosen, Failure, MicroBatch

IN_A_ROW = 100


class MicroBatches(Dataset[MicroBatch]):
    """`dataset[key]` decodes, augments and processes the examples of one micro-batch.

    An item depends on the key alone: never on what was loaded before it, by which process, or on any global random
    state. Images that do not decode are reported in the item, and their examples replaced by others, or with
    `substitute=False` left out. Errors meant for the user travel in the item too, because an exception that crosses a
    process border loses its one-line message.

    Of `budgets` (patches per image, for a NaFlex tower) each optimizer step draws one. `batch_tokens` cuts the examples
    of a key into batches of at most so many tokens, padding included.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        mixture: Mixture,
        processor: Processor,
        *,
        max_text_length: int | None = None,
        augmentations: Sequence[Augmentation | OfImages] = (),
        cache_images_mb: int = 0,
        budgets: Sequence[int] = (),
        batch_tokens: int | None = None,
        substitute: bool = True,
    ) -> None:
        assert len(examples) == mixture.num_examples
        self.examples, self.mixture, self.processor = examples, mixture, processor
        self.max_text_length, self.augmentations = max_text_length, augmentations
        self.batch_tokens, self.substitute = batch_tokens, substitute
        # By image, not by example: a picture often has several questions.
        self._cache: dict[Path | tuple[int, int], Image.Image] = {}
        self._cache_left = cache_images_mb * 10**6
        self._by_budget = {budget: with_budget(processor, budget) for budget in budgets}

    def __getitem__(self, key: Key) -> MicroBatch:
        item = MicroBatch(key)
        try:
            picked = [self._pick(position, item) for position in key.positions]
            chosen = [one for one in picked if one is not None]
            processor = self._processor(key)
            item.batches = [
                self._batch(processor, [chosen[place] for place in places])
                for places in self._cut(processor, chosen, item)
            ]
        except VLMError as error:
            item.error = error
        return item

    def _batch(self, processor: Processor, chosen: Sequence[Chosen]) -> Batch:
        return processor([shown.images for shown in chosen], **self._texts(chosen))

    def _texts(self, chosen: Sequence[Chosen]) -> dict[str, Any]:
        """What the processor is told of the examples, beside their images."""
        return {
            "text": [shown.prefix for shown in chosen],
            "suffix": [shown.suffix for shown in chosen],
            "ids": [self.examples[shown.index].id for shown in chosen],
            "max_text_length": self.max_text_length,
        }

    def _cut(self, processor: Processor, chosen: Sequence[Chosen], item: MicroBatch) -> list[list[int]]:
        """Places in `chosen`, in batches."""
        if self.batch_tokens is None or not chosen:
            return [list(range(len(chosen)))] if chosen else []
        lengths = self._lengths(processor, chosen)
        item.over_budget = [
            self.examples[shown.index].id
            for shown, length in zip(chosen, lengths, strict=True)
            if length > self.batch_tokens
        ]
        return cut(lengths, self.batch_tokens)

    def _lengths(self, processor: Processor, chosen: Sequence[Chosen]) -> list[int]:
        """Tokens of each example, image and text."""
        return processor.lengths([[image.size for image in shown.images] for shown in chosen], **self._texts(chosen))

    def _processor(self, key: Key) -> Processor:
        """The processor with the patch budget of the key's optimizer step."""
        if not self._by_budget:
            return self.processor
        return self._by_budget[drawn(self.mixture.seed, key.step, list(self._by_budget))]

    def _pick(self, position: int, item: MicroBatch) -> Chosen | None:
        """The example at a position and its images; while images fail, the position's next substitute, if any."""
        index = self.mixture.example(position)
        for attempt in range(IN_A_ROW):
            images: list[Any] = []
            try:
                for number in range(len(self.examples[index].images)):
                    item.images_read += 1
                    images.append(self._image(index, number))
            except ImageError as error:
                example = self.examples[index]
                item.failures.append(Failure(example, example.images[len(images)], error.code, str(error)))
                if not self.substitute:
                    return None
                index = self.mixture.substitute(position, attempt)
                continue
            return self._augment(index, images, position)
        raise DataError(
            f"{IN_A_ROW} images in a row could not be decoded (see failures.jsonl); last: {item.failures[-1].message}"
        )

    def _image(self, index: int, number: int) -> Any:
        """One of the images of an example."""
        source = self.examples[index].images[number]
        key = source if isinstance(source, Path) else (index, number)
        if key in self._cache:
            return self._cache[key]
        image = load_image(source, background=self.processor.image_transform.background)
        size = image.width * image.height * 3
        if size <= self._cache_left:
            self._cache[key] = image
            self._cache_left -= size
        return image

    def _augment(self, index: int, images: list[Any], position: int) -> Chosen:
        """One view of an example, drawn from the position: one that is repeated within an epoch is seen in another."""
        example = self.examples[index]
        if not self.augmentations:
            return Chosen(index, images, example.prefix, example.suffix)
        seed = (self.mixture.seed, position)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        shown, texts = apply(self.augmentations, images, [example.prefix, example.suffix or ""], rng)
        return Chosen(index, shown, texts[0], None if example.suffix is None else texts[1])


def with_budget(processor: Processor, budget: int) -> Processor:
    """The same processor with another patch budget.

    Raises `ConfigError` when its images are squares.
    """
    transform = processor.image_transform
    if not transform.any_aspect:
        raise ConfigError(
            f"data.max_num_patches: {budget} patches, but the model's tower reads squares ({transform.describe()});"
            " leave it out, or start from a NaFlex model (`vlm new --encoder-kind siglip2_naflex`)"
        )
    other = copy.copy(processor)
    other.image_transform = replace(transform, max_num_patches=budget)
    return other
