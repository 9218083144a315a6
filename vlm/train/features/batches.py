"""Micro-batches that read the features of their images from the disk."""

from collections.abc import Sequence
from typing import Any

import torch

from vlm.model.processor import Processor
from vlm.train.batches import MicroBatches
from vlm.train.features.batch import FeatureBatch
from vlm.train.features.store import FeatureStore
from vlm.train.items import Chosen


class FeatureBatches(MicroBatches):
    """`MicroBatches` that reads features where the other decodes images. Images that did not decode when the features
    were made are reported and replaced in the same way."""

    def __init__(self, *arguments: Any, store: FeatureStore, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._store = store

    def _image(self, index: int, number: int) -> Any:
        """(rows, columns): all that is needed to lay out a batch."""
        return self._store.grid(index, number)

    def _lengths(self, processor: Processor, chosen: Sequence[Chosen]) -> list[int]:
        lengths = processor.lengths([[]] * len(chosen), **self._texts(chosen))
        return [
            sum(map(processor.num_image_tokens, shown.images)) + n for shown, n in zip(chosen, lengths, strict=True)
        ]

    def _batch(self, processor: Processor, chosen: Sequence[Chosen]) -> FeatureBatch:
        batch = processor(grids=[shown.images for shown in chosen], **self._texts(chosen))
        rows = [self._store.read(shown.index, number) for shown in chosen for number in range(len(shown.images))]
        if not rows:
            return FeatureBatch(**vars(batch))
        grids = [grid for shown in chosen for grid in shown.images]
        features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = None
        if self._store.masked:
            mask = torch.arange(features.shape[1]) < torch.tensor([[len(row)] for row in rows])
        return FeatureBatch(
            **vars(batch), features=features, feature_mask=mask, feature_grids=torch.tensor(grids, dtype=torch.int64)
        )
