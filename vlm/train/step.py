"""One optimizer step: forward passes, sums of losses and weights, backward passes, normalise, clip, step.

    batches of a step -> (loss sum, weight) of each -> gradients of the sums, added up over micro-batches and ranks
                      -> divided once by the weight of all of them -> checked -> clipped -> AdamW

What is added to Lightning's loop is exactness. The loss of a micro-batch is left as a sum; once the gradients of all
micro-batches and ranks are together they are divided by the weight of all of them (tokens or examples), so neither
accumulation nor the number of processes changes the gradient: an average of averages would weigh a short answer more in
a small micro-batch than in a large one. Only then are they checked, clipped and applied: `training_step`, then
Lightning's backward pass, then `on_before_optimizer_step`, then AdamW.

Micro-batches come in two ways. `accumulate` gives Lightning a fixed number of them, one per call of `training_step`. A
token budget cuts each rank's examples of a step as their lengths ask, so ranks and steps differ in number, which
Lightning's counter cannot say: `training_step` then gets all of them, and does all but the last one's backward pass
itself, without exchanging gradients. The last goes Lightning's way, and its backward pass exchanges the sum.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from vlm.data.order import Key
from vlm.encoders.contract import EncoderOutput
from vlm.errors import TrainingError, VLMError
from vlm.images.transforms import Pixels
from vlm.model.batch import Batch
from vlm.train import freezing, optim
from vlm.train.features.batch import PIXELS, FeatureBatch
from vlm.train.health import Health
from vlm.train.items import MicroBatch, StepReport, checksum
from vlm.train.objectives.contract import Loss, Objective
from vlm.train.randomness import reseed
from vlm.train.schedule import multiplier
from vlm.train.stage_config import StageConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a stage's module is given beside its model."""

    objective: Objective
    steps: int
    """Optimizer steps of the whole stage: the schedule's length."""
    seed: int
    """Of dropout."""
    make_loader: Callable[["StageModule"], Any]
    """Called with the module once the processes exist; gives an iterable of `MicroBatch`."""
    optimizer_state: Mapping[str, Tensor] | None = None
    """What `optim.state_tensors` gave, to resume."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked once per step on every rank; when any says True, all stop after that step."""
    inspect: Callable[[MicroBatch], VLMError | None] = lambda item: item.error
    judge: Callable[[int, int], VLMError | None] = lambda read, failed: None
    fused: bool = True
    """The gradient scaler of fp16 cannot look at the gradients before a fused step."""


class StageModule(pl.LightningModule):
    """One stage of training.

    Args:
        model: a `vlm.VLM`, already frozen as the stage says (see `vlm.train.freezing.frozen`). rows: its manifest.
    """

    def __init__(self, model: nn.Module, stage: StageConfig, rows: list[freezing.Row], setting: Setting) -> None:
        super().__init__()
        self.model, self.stage, self.rows, self.setting = model, stage, rows, setting
        self.report: StepReport | None = None
        self.stopped = False
        self._optimizer_state = setting.optimizer_state
        self._losses: list[tuple[Loss, Batch]] = []
        """Of the micro-batches of this step so far; without their graphs."""
        self._step = 0
        self._health = Health(stage, setting.steps)
        # A tied parameter (lm_head and embedding) is one row and one gradient: `named_parameters` gives it once.
        self._parts = [row.part for row in rows if row.trainable]

    # --- the step -----------------------------------------------------------------------------------------------------

    def training_step(self, item: MicroBatch, batch_idx: int) -> Tensor:
        """The unnormalised loss of the last micro-batch of the item; the gradients of those before are added up."""
        self._agree_on_errors(item)
        if item.key.micro == 0:
            self._losses, self._step = [], item.key.step
            self._adamw().zero_grad()
            optim.set_rates(self._adamw(), multiplier(self.stage, item.key.step, self.setting.steps))
        *before, last = item.batches
        for number, batch in enumerate(before):
            self._add_gradients(self._loss(item.key, number, batch))
        # Lightning divides by the number of micro-batches; we divide by their weight, once it is known.
        return self._loss(item.key, len(before), last) * self.trainer.accumulate_grad_batches

    def _loss(self, key: Key, number: int, batch: Batch) -> Tensor:
        """The summed loss of the batch at `number` among those of a key."""
        reseed(self.setting.seed, self.stage.name, key.step, key.micro + number, self.global_rank)
        loss = self.compute(batch.to(self.device, non_blocking=True))
        self._losses.append((Loss(loss.sum.detach(), loss.weight.detach()), batch))
        unreached = {*self._model_parts()} - self.setting.objective.reached(batch)
        return loss.sum + self._nothing(unreached) if unreached else loss.sum

    def compute(self, batch: Batch) -> Loss:
        """The loss of one batch."""
        return self.setting.objective.loss(self.model, dict(batch.items()))

    def _add_gradients(self, loss: Tensor) -> None:
        """A backward pass like Lightning's, inside the step. Data parallel training exchanges nothing here, whatever
        the other ranks do: it waits for the backward pass that follows the end of its forward pass."""
        strategy = self.trainer.strategy
        hold = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        # We are inside mixed precision's forward context, which a backward pass should not be.
        with hold, torch.autocast(self.device.type, enabled=False):
            strategy.backward(loss, None)
        # autocast keeps its casts of the weights until its context is left, and they hold the graph that is now gone:
        # the next forward pass would run into it.
        torch.clear_autocast_cache()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise, check and clip the gradients; AdamW steps next. Raises `TrainingError` before a step would spoil
        the weights.

        Lightning has taken fp16's scale off the gradients by now. Its own clipping is off: it would come before the
        normalisation, and so depend on how a step was cut.
        """
        totals = self._totals()
        loss, step = totals["loss_sum"] / totals["weight"], self._step
        rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
        if not math.isfinite(loss):
            raise self._health.not_finite(f"the loss is {loss}", step, rates, self._samples(all_of_them=False))
        if self.report is None and self.trainer.is_global_zero:
            self._health.warn_of_missing_gradients(self.model)
        norm, alive = self._normalise(totals["weight"])
        if math.isfinite(norm):
            self._health.check_life(alive, [part for part in self._model_parts() if totals[part] > 0], loss, step)
        # fp16: the gradient scaler leaves the step out by itself and lowers its scale, unless it keeps happening.
        elif not self._health.overflowed(scaled=self.trainer.precision == "16-mixed"):
            bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            what = f"the gradient norm is {norm} ({', '.join(bad[:3])})"
            raise self._health.not_finite(what, step, rates, self._samples(all_of_them=True))
        self.stopped = totals["stop"] > 0
        counts = {name: int(totals[name]) for name in ("examples", "tokens", "seen")}
        self.report = StepReport(step=step + 1, loss=loss, grad_norm=norm, rates=rates, **counts)

    def _totals(self) -> dict[str, float]:
        """Sums over the micro-batches of this step, then over ranks."""
        batches = [batch for _, batch in self._losses]
        reached = [self.setting.objective.reached(batch) for batch in batches]
        local = {
            "loss_sum": torch.stack([loss.sum for loss, _ in self._losses]).double().sum(),
            "weight": torch.stack([torch.as_tensor(loss.weight) for loss, _ in self._losses]).double().sum(),
            "examples": sum(len(batch) for batch in batches),
            "tokens": sum((batch.labels != -100).sum() for batch in batches if batch.labels is not None),
            # Below 2**53 for two million examples, so float64 holds it exactly.
            "seen": checksum(batches),
            "stop": float(self.setting.should_stop()),
            **{part: float(any(part in one for one in reached)) for part in self._model_parts()},
        }
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in local.values()])
        if self.trainer.world_size > 1:
            dist.all_reduce(values)
        return dict(zip(local, values.tolist(), strict=True))

    def _normalise(self, weight: float) -> tuple[float, set[str]]:
        """Divide the summed gradients by the global weight, clip, and return the norm before clipping and the parts
        whose gradient is not zero."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        there = [(p.grad, part) for p, part in zip(trained, self._parts, strict=True) if p.grad is not None]
        grads = [grad for grad, _ in there]
        # As `torch.nn.utils.get_total_norm` computes it, bit for bit; one transfer brings it and its terms to the host.
        norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1)
        total, *each = torch.cat([torch.linalg.vector_norm(norms)[None], norms]).tolist()
        alive = {part for (_, part), own in zip(there, each, strict=False) if own != 0}
        # Data parallel training has averaged over ranks; what is wanted is their sum.
        scale = self.trainer.world_size / weight
        norm = total * scale
        if self.stage.clip_norm is not None and norm > self.stage.clip_norm:
            scale *= self.stage.clip_norm / norm
        if math.isfinite(norm):
            torch._foreach_mul_(grads, scale)
        return norm, alive

    # --- what Lightning asks for --------------------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        return self.setting.make_loader(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = optim.adamw(self.model, self.rows, self.stage, fused=self.setting.fused)
        if self._optimizer_state is not None:
            optim.load_state_tensors(optimizer, self._optimizer_state)
            self._optimizer_state = None
        return optimizer

    def on_train_start(self) -> None:
        freezing.check_manifest(self.model, self.stage, self.rows, "while the trainer was set up")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Called by Lightning; each batch moves when its turn comes, so that only one is on the device."""
        return batch

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Called by Lightning between `training_step` and the backward pass: too late, gradients may be there by then.
        They are cleared when a step begins."""

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _adamw(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def _model_parts(self) -> dict[str, nn.Module]:
        return freezing.parts_of(self.model)

    def _nothing(self, names: set[str]) -> Tensor:
        """Zero, and zero gradients for parts that a batch does not reach, as text alone does not reach the tower.

        Data parallel training waits for the gradient of every parameter, and would wait for ever on a rank whose batch
        has no image. With one process they are zero too and not missing, so that the optimizer does the same whatever
        the number of processes and of micro-batches.
        """
        unreached = [p for name, part in self._model_parts().items() if name in names for p in part.parameters()]
        # Sums of nothing: their gradient is zero whatever the values are.
        sums = [p.flatten()[:0].sum() for p in unreached if p.requires_grad]
        return torch.stack(sums).sum() if sums else torch.zeros((), device=self.device)

    def _agree_on_errors(self, item: MicroBatch) -> None:
        """Raise the error of a micro-batch on every rank at once, or the others would wait for this one for ever."""
        error = self.setting.inspect(item)
        counts = (int(error is not None), item.images_read, len(item.failures))
        if self.trainer.world_size > 1:
            totals = torch.tensor(counts, dtype=torch.int64, device=self.device)
            dist.all_reduce(totals)
            counts = tuple(totals.tolist())
        # The same on every rank, so all of them say it.
        error = error or self.setting.judge(*counts[1:])
        if error is not None:
            raise error
        if counts[0]:
            raise TrainingError("another process could not load its micro-batch; its message says why")

    def _samples(self, *, all_of_them: bool) -> list[str]:
        """Ids of the examples in micro-batches whose loss is not finite; or in all, unless other ranks have some."""
        every = all_of_them and self.trainer.world_size == 1
        shown = [batch for loss, batch in self._losses if every or not bool(loss.sum.isfinite())]
        return [name for batch in shown for name in batch.ids]


class FrozenEncoderModule(StageModule):
    """A stage whose vision tower is frozen: the tower runs in eval mode, and no graph is built through it."""

    def compute(self, batch: Batch) -> Loss:
        """The loss, with the tower run beforehand under `no_grad`, unless the batch holds its features."""
        if isinstance(batch, FeatureBatch):
            return self.setting.objective.loss(self.model, *batch.split())
        tensors = dict(batch.items())
        pixels = {name: tensors.pop(name) for name in PIXELS if name in tensors}
        encoded = None
        if pixels:
            with torch.no_grad():
                encoded = self.model.encode(**pixels)  # type: ignore[operator]
        return self.setting.objective.loss(self.model, tensors, encoded)

    def encode(self, pixels: Pixels) -> EncoderOutput:
        """The tower's features, in the precision in which the stage trains."""
        inputs = [None if tensor is None else tensor.to(self.device) for tensor in pixels[:3]]
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            encoded: EncoderOutput = self.model.encode(*inputs)  # type: ignore[operator]
        return encoded


class FullModule(StageModule):
    """A stage in which any part may train."""


def module_class(stage: StageConfig) -> type[StageModule]:
    """The module a stage asks for."""
    return {"frozen_encoder": FrozenEncoderModule, "full": FullModule}[stage.module]
