"""Loss on held-out examples, with the same processor, model and reduction as training."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from vlm.data import Example
from vlm.errors import DataError, VLMError
from vlm.processor import Processor
from vlm.train.data import MicroBatches
from vlm.train.modules import StageModule
from vlm.train.plan import Key, Mixture


class Validator:
    """The mean loss over all of `examples`, each counted once, shared by the ranks.

    Args:
        size: examples that are loaded together: a forward pass, unless `batch_tokens` cuts them further.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        size: int,
        *,
        max_text_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self._data = MicroBatches(
            examples,
            Mixture((len(examples),), (1.0,), seed=0),
            processor,
            max_text_length=max_text_length,
            batch_tokens=batch_tokens,
        )
        count = len(examples)
        self._keys = [Key(0, 0, first, min(size, count - first)) for first in range(0, count, size)]

    @torch.no_grad()
    def __call__(self, module: StageModule) -> float:
        """Called on every rank. Raises `DataError` for an example that cannot be read."""
        trainer = module.trainer
        totals = torch.zeros(3, dtype=torch.float64, device=module.device)
        error: VLMError | None = None
        module.model.eval()
        for key in self._keys[module.global_rank :: trainer.world_size]:
            item = self._data[key]
            if item.failures:
                item.error = DataError(f"validation: {item.failures[0].message}; validation data must be complete")
            if item.error is not None:
                error = item.error
                break
            for batch in item.batches:
                with trainer.precision_plugin.forward_context():
                    out = module.compute(batch.to(module.device))
                totals[:2] += torch.stack([out.loss_sum, torch.as_tensor(out.loss_weight)]).double()
        # Frozen parts stay in eval mode whatever is asked of them.
        module.model.train()
        totals[2] = float(error is not None)
        if trainer.world_size > 1:
            dist.all_reduce(totals)
        if error is not None or totals[2] > 0:
            raise error or DataError("validation failed in another process; its message says why")
        return float(totals[0] / totals[1])
