"""Loss on held-out examples, with the same processor, model and reduction as training."""

import logging
import time

import torch
import torch.distributed as dist

from vlm import ranks
from vlm.data.order import Key
from vlm.errors import DataError, VLMError
from vlm.model.processor import Processor
from vlm.train.items import Failure, Validation
from vlm.train.plan import Stage
from vlm.train.step import StageModule

log = logging.getLogger(__name__)

TELL_EVERY_S = 30


class Validator:
    """The mean loss over a stage's held-out examples, each counted once, shared by `world` ranks.

    An example with an image that does not decode is left out: it must not end a run that trains well.
    """

    def __init__(self, stage: Stage, processor: Processor, world: int) -> None:
        self._data = stage.held_out(processor)
        count = len(stage.val)
        # Examples that are loaded together: a forward pass, unless `batch_tokens` cuts them further.
        size = max(1, stage.config.batch_size // (stage.config.accumulate * world))
        self._keys = [Key(0, 0, first, min(size, count - first)) for first in range(0, count, size)]

    @torch.no_grad()
    def __call__(self, module: StageModule) -> Validation:
        """Called on every rank. Raises `DataError` for a text that cannot be used."""
        device = module.device
        totals = torch.zeros(4, dtype=torch.float64, device=device)
        error: VLMError | None = None
        failures: list[Failure] = []
        began = told = time.monotonic()
        module.model.eval()
        mine = self._keys[module.global_rank :: ranks.current().world]
        for number, key in enumerate(mine):
            item = self._data[key]
            failures += item.failures
            if item.error is not None:
                error = item.error
                break
            for batch in item.batches:
                with module.trainer.precision_plugin.forward_context():
                    part = module.compute(batch.to(device))
                totals[:2] += torch.stack([part.sum, torch.as_tensor(part.weight)]).double()
            if module.global_rank == 0 and time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                log.info("validation: %d %% after %.0f s", 100 * (number + 1) // len(mine), told - began)
        # Frozen parts stay in eval mode whatever is asked of them.
        module.model.train()
        totals[2:] = torch.tensor([error is not None, len(failures)], dtype=torch.float64)
        if ranks.current().world > 1:
            dist.all_reduce(totals)
        if error is not None or totals[2] > 0:
            raise error or DataError("validation failed in another process; its message says why")
        loss = float(totals[0] / totals[1]) if totals[1] else None
        return Validation(loss, int(totals[3]), failures)
