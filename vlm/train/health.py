"""Signs that a stage spoils its weights or learns nothing: what is not finite, parts without a gradient."""

import logging
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from vlm.errors import TrainingError
from vlm.train.stage_config import StageConfig
from vlm.words import listed

log = logging.getLogger(__name__)

DEAD_STEPS = 5
"""Steps in a row in which a part that trains may get no gradient at all before the run stops."""
MAX_SKIPPED = 20
"""fp16 steps in a row that may overflow (the loss scale is then lowered and the step left out) before the run stops."""


class Health:
    """Watches the steps of one stage.

    Args:
        steps: optimizer steps of the whole stage.
    """

    def __init__(self, stage: StageConfig, steps: int) -> None:
        self._stage, self._steps = stage, steps
        self._skipped = 0
        self._dead = dict.fromkeys(stage.train, 0)
        """Part -> steps in a row in which its gradient was zero."""
        self._first: int | None = None

    def overflowed(self, scaled: bool) -> bool:
        """Whether a step whose gradient is not finite is left out; without a gradient scaler none is."""
        self._skipped += 1
        return scaled and self._skipped <= MAX_SKIPPED

    def check_life(self, alive: Collection[str], reached: Collection[str], loss: float, step: int) -> None:
        """Raise `TrainingError` when a part that trains gets no gradient at all for several steps.

        A loss of zero leaves nothing to learn, text alone none for tower and projector, and a projector that begins at
        zero none for the tower in the first step: these are no signs of a dead part.

        Args:
            alive: parts whose gradient is not zero. reached: parts that the step's batches could reach.
        """
        self._skipped = 0
        self._first = step if self._first is None else self._first
        enough = min(DEAD_STEPS, max(1, self._steps - max(1, self._first)))
        for part in self._dead:
            if part in alive:
                self._dead[part] = 0
            elif step > 0 and loss > 1e-6 and part in reached:
                self._dead[part] += 1
            if self._dead[part] >= enough:
                raise TrainingError(
                    f"stage {self._stage.name}, step {step + 1}: the gradient of the {part} (learning rate"
                    f" {self._stage.train[part]:g}) was zero in the last {self._dead[part]} steps: it is trained and"
                    f" learns nothing. Its weights have run away, or what comes behind it passes nothing on: look"
                    f" at the part it feeds, or lower the learning rates, from the start or after the last checkpoint"
                    f" (--resume --accept-changes)"
                )

    def not_finite(self, what: str, step: int, rates: Mapping[str, float], samples: Sequence[str]) -> TrainingError:
        """The error that ends the run before a step would spoil the weights."""
        lr = ", ".join(f"{part} {rate:g}" for part, rate in rates.items())
        return TrainingError(
            f"stage {self._stage.name}, step {step + 1}: {what}; samples: {listed(samples, 8) or 'of another process'};"
            f" learning rates: {lr}. The weights were not touched; look at these samples, or lower the learning rates"
            f" and go on with --resume --accept-changes"
        )

    def warn_of_missing_gradients(self, model: nn.Module) -> None:
        """Trainable parameters that no loss reaches are told of; they are no reason to stop."""
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if missing:
            log.warning(
                "stage %s: %d trainable parameters got no gradient, so they will not change: %s",
                *(self._stage.name, len(missing), ", ".join(missing[:5])),
            )
