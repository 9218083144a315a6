"""What a loading process gives a training step: one `MicroBatch` per key, with what went wrong on the way."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.examples import Example
from vlm.data.order import Key
from vlm.errors import VLMError
from vlm.model.batch import Batch


@dataclass(frozen=True)
class Chosen:
    """An example as it is shown this time."""

    index: int
    images: list[Any]
    """Or what stands for them where features were made before (`vlm.train.features`); none where the example is about
    text alone."""
    prefix: str
    suffix: str | None


@dataclass
class Failure:
    """An image that could not be decoded during training; its place went to another example."""

    example: Example
    image: Path | Image.Image | None
    """Which of its images."""
    code: str
    message: str


@dataclass
class MicroBatch:
    """What one loading step gives: batches, or the error that ends the run, and the images that failed on the way."""

    key: Key
    batches: list[Batch] = field(default_factory=list)
    """One, or (where a token budget cuts the examples) several, each a forward and backward pass of its own."""
    error: VLMError | None = None
    failures: list[Failure] = field(default_factory=list)
    images_read: int = 0
    over_budget: list[str] = field(default_factory=list)
    """Ids of examples that are longer than the token budget, each in a batch of its own."""

    @property
    def batch(self) -> Batch | None:
        """The batch where there is one only."""
        return self.batches[0] if len(self.batches) == 1 else None

    def pin_memory(self) -> "MicroBatch":
        """Called by torch's data loader when the batch goes to a GPU."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


@dataclass(frozen=True)
class Validation:
    """A held-out loss."""

    loss: float | None
    """Over the examples whose images decoded; None when there is none."""
    num_failed: int
    """Examples that were left out, by all ranks."""
    failures: list[Failure]
    """Those of this rank."""


@dataclass(frozen=True)
class Score:
    """One number of an evaluation while a stage trains."""

    task: str
    metric: str
    value: float
    num_items: int


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; sums are over all micro-batches and ranks."""

    step: int
    """Optimizer steps done in the stage, this one included."""
    loss: float
    grad_norm: float
    """Before clipping."""
    rates: dict[str, float]
    examples: int
    tokens: int
    """Supervised tokens."""
    seen: int
    """Which examples the step saw: see `checksum`."""


def checksum(batches: Sequence[Batch]) -> int:
    """The sum over all examples of 32 bits of the sha256 of id and supervised tokens. So it tells which examples a step
    really saw, whatever their order and however they were cut into micro-batches and shared by processes."""
    total = 0
    for batch in batches:
        rows = [()] * len(batch.ids) if batch.labels is None else batch.labels.numpy()
        for name, labels in zip(batch.ids, rows, strict=True):
            supervised = [] if batch.labels is None else labels[labels != -100].tolist()
            text = f"{name} {supervised}".encode("utf-8", "surrogatepass")
            total += int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
    return total
