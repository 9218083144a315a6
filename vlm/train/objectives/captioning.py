"""Captioning, answering, locating: the model says an example's suffix after its images and prefix.

The loss is the cross entropy of each supervised token given all before it (PaliGemma's), summed over the batch as
`loss_reduction` says: over its tokens, or over its examples' means.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlm.data import augment
from vlm.data.examples import Example
from vlm.data.order import Mixture
from vlm.encoders.contract import EncoderOutput
from vlm.model.batch import Batch
from vlm.model.processor import Processor
from vlm.train.batches import MicroBatches
from vlm.train.features.batch import has_images
from vlm.train.features.batches import FeatureBatches
from vlm.train.features.store import FeatureStore
from vlm.train.objectives.contract import Loss
from vlm.train.stage_config import StageConfig


class Objective:
    """See `vlm.train.objectives.contract`."""

    needs = ("encoder", "projector", "decoder")

    def __init__(self, stage: StageConfig) -> None:
        self._stage = stage

    def check(self, examples: Sequence[Example]) -> None:
        """Raises `DataError` for examples that the stage's augmentations cannot change."""
        augment.check(augment.pipeline(self._stage.augment), examples)

    def batches(
        self,
        examples: Sequence[Example],
        mixture: Mixture,
        processor: Processor,
        *,
        store: FeatureStore | None = None,
        **how: Any,
    ) -> MicroBatches:
        """Prompts and answers with their images, or with the images' features."""
        if store is not None:
            return FeatureBatches(examples, mixture, processor, store=store, **how)
        return MicroBatches(examples, mixture, processor, **how)

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor], encoded: EncoderOutput | None = None) -> Loss:
        """The logits of a whole batch never exist: only supervised rows reach the vocabulary."""
        out = model(**inputs, encoded=encoded, reduction=self._stage.loss_reduction, skip_logits=True)
        return Loss(out.loss_sum, out.loss_weight)

    def reached(self, batch: Batch) -> set[str]:
        """Text alone reaches the decoder only."""
        return set(self.needs) if has_images(batch) else {"decoder"}
