"""What an objective's file defines: a class `Objective`, made once per stage as `Objective(stage)`.

Nothing else is needed: `objective: my_file` in a stage of the configuration finds it. The step (`vlm.train.step`) asks
for a sum and a weight and never for a mean, because a mean of the means of micro-batches and ranks is another number.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from vlm.data.examples import Example
from vlm.data.order import Mixture
from vlm.model.batch import Batch


class Loss(NamedTuple):
    """Of one batch."""

    sum: Tensor
    """float[], with its graph."""
    weight: Tensor
    """float[], what the sums of all micro-batches and ranks together are divided by: tokens, examples, ..."""


class Objective(Protocol):
    """What a stage asks of its objective."""

    needs: tuple[str, ...]
    """Parts that the model must have."""

    def check(self, examples: Sequence[Example]) -> None:
        """Look at the examples before anything is trained. Raises `VLMError`."""

    def batches(self, examples: Sequence[Example], mixture: Mixture, processor: Any, **how: Any) -> Any:
        """A dataset whose item at a `Key` is a `MicroBatch`. It depends on the key alone: a stage goes on anywhere.

        Args:
            how: settings of the stage and the run, see `vlm.train.batches.MicroBatches`; `store` (`FeatureStore`)
                where the images were encoded before.
        """

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor], encoded: Any = None) -> Loss:
        """Forward pass and loss of one batch.

        Args:
            inputs: the batch's tensors by name. encoded: what the tower gave where it ran before (`EncoderOutput`); the
                pixels are then not among the inputs.
        """

    def reached(self, batch: Batch) -> set[str]:
        """Parts of the model that the batch's gradient reaches."""
