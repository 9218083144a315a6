"""The two Lightning modules of training: `FrozenEncoderModule` and `FullModule`, over one base.

What the base adds to Lightning's loop is exactness. The loss of a micro-batch is left as a sum; once the gradients of
all micro-batches and ranks are together they are divided by the weight of all of them (tokens or examples), so neither
accumulation nor the number of processes changes the gradient. Only then are they checked, clipped and applied.

Micro-batches come in two ways. `accumulate` gives Lightning a fixed number of them, one per call of `training_step`. A
token budget cuts each rank's examples of a step as their lengths ask, so ranks and steps differ in number, which
Lightning's counter cannot say: `training_step` then gets all of them, and does all but the last one's backward pass
itself, without exchanging gradients. The last goes Lightning's way, and its backward pass exchanges the sum.
"""

import hashlib
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from vlm.data.order import Key
from vlm.encoders.contract import EncoderOutput
from vlm.errors import TrainingError, VLMError
from vlm.images.transforms import Pixels
from vlm.model.batch import Batch
from vlm.train import optim, parts
from vlm.train.batches import MicroBatch
from vlm.train.config import StageConfig
from vlm.train.features.store import FeatureBatch
from vlm.train.schedule import multiplier
from vlm.words import listed

log = logging.getLogger(__name__)

PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
DEAD_STEPS = 5
"""Steps in a row in which a part that trains may get no gradient at all before the run stops."""
MAX_SKIPPED = 20
"""fp16 steps in a row that may overflow (the loss scale is then lowered and the step left out) before the run stops."""


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


class StageModule(pl.LightningModule):
    """One stage of training.

    Args:
        model: a `vlm.VLM`, already frozen as the stage says (see `vlm.train.parts.frozen`). stage: the stage. rows: the
        manifest of `model`. steps: optimizer steps of the whole stage (the schedule's length). seed: of dropout.
        make_loader: called with this module once the processes exist; gives an iterable of `MicroBatch`.
        optimizer_state: what `optim.state_tensors` gave, to resume. should_stop: asked once per step on
        every rank; when any says True, all stop after that step.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: StageConfig,
        rows: list[parts.Row],
        *,
        steps: int,
        seed: int,
        make_loader: Callable[["StageModule"], Any],
        optimizer_state: Mapping[str, Tensor] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        inspect: Callable[[MicroBatch], VLMError | None] = lambda item: item.error,
        judge: Callable[[int, int], VLMError | None] = lambda read, failed: None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.stage, self.rows = model, stage, rows
        self.steps, self.seed, self.fused = steps, seed, fused
        self.make_loader, self.optimizer_state = make_loader, optimizer_state
        self.should_stop, self.inspect, self.judge = should_stop, inspect, judge
        self.report: StepReport | None = None
        self.stopped = False
        self._micros: list[tuple[Tensor, Tensor, Batch]] = []
        self._step = 0
        self._skipped = 0
        self._dead = dict.fromkeys(stage.train, 0)
        """Part -> steps in a row in which its gradient was zero."""
        self._parts = [row.part for row in rows if row.trainable]
        self._first: int | None = None

    # --- what Lightning asks for ------------------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        return self.make_loader(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = optim.adamw(self.model, self.rows, self.stage, fused=self.fused)
        if self.optimizer_state is not None:
            optim.load_state_tensors(optimizer, self.optimizer_state)
            self.optimizer_state = None
        return optimizer

    def on_train_start(self) -> None:
        parts.check_manifest(self.model, self.stage, self.rows, "while the trainer was set up")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Called by Lightning; each batch moves when its turn comes, so that only one is on the device."""
        return batch

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Called by Lightning between `training_step` and the backward pass: too late, gradients may be there by then.
        They are cleared when a step begins."""

    def training_step(self, item: MicroBatch, batch_idx: int) -> Tensor:
        """The unnormalised loss of the last micro-batch of the item; the gradients of those before are added up."""
        self._agree_on_errors(item)
        if item.key.micro == 0:
            self._micros, self._step = [], item.key.step
            self._adamw().zero_grad()
            optim.set_rates(self._adamw(), multiplier(self.stage, item.key.step, self.steps))
        *before, last = item.batches
        for number, batch in enumerate(before):
            self._add_gradients(self._loss(item.key, number, batch))
        # Lightning divides by the number of micro-batches; we divide by their weight, once it is known.
        return self._loss(item.key, len(before), last) * self.trainer.accumulate_grad_batches

    def _loss(self, key: Key, number: int, batch: Batch) -> Tensor:
        """The summed loss of the batch at `number` among those of a key."""
        reseed(self.seed, self.stage.name, key.step, key.micro + number, self.global_rank)
        out = self.compute(batch.to(self.device, non_blocking=True))
        self._micros.append((out.loss_sum.detach(), out.loss_weight.detach(), batch))
        loss: Tensor = out.loss_sum
        return loss if has_images(batch) else loss + self._untouched()

    def _untouched(self) -> Tensor:
        """Zero, and zero gradients for the parts that a batch of text alone does not reach.

        Data parallel training waits for the gradient of every parameter, and would wait for ever on a rank whose batch
        has no image. With one process they are zero too and not missing, so that the optimizer does the same whatever
        the number of processes and of micro-batches.
        """
        model: Any = self.model
        unreached = [p for name in ("encoder", "projector") for p in model.parts()[name].parameters()]
        # Sums of nothing: their gradient is zero whatever the values are.
        sums = [p.flatten()[:0].sum() for p in unreached if p.requires_grad]
        return torch.stack(sums).sum() if sums else torch.zeros((), device=self.device)

    def _add_gradients(self, loss: Tensor) -> None:
        """A backward pass like Lightning's, inside the step. Data parallel training exchanges nothing here, whatever
        the other ranks do: it waits for the backward pass that follows the end of its forward pass."""
        strategy = self.trainer.strategy
        hold = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        # We are inside mixed precision's forward context, which a backward pass should not be.
        with hold, torch.autocast(self.device.type, enabled=False):
            strategy.backward(loss, None)
        torch.clear_autocast_cache()  # it holds casts of the weights with the graph that is now gone

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise, check and clip the gradients. Raises `TrainingError` before a step would spoil the weights."""
        totals = self._totals()
        loss = totals["loss_sum"] / totals["weight"]
        step = self._step
        rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
        if not math.isfinite(loss):
            raise TrainingError(self._not_finite(f"the loss is {loss}", step, rates))
        if self.report is None:
            self._warn_of_missing_gradients()
        norm, alive = self._normalise(totals["weight"])
        if not math.isfinite(norm):
            self._on_overflow(norm, step, rates)
        else:
            self._skipped = 0
            self._check_life(alive, totals["images"] > 0, loss, step)
        self.stopped = totals["stop"] > 0
        self.report = StepReport(
            step=step + 1,
            loss=loss,
            grad_norm=norm,
            rates=rates,
            examples=int(totals["examples"]),
            tokens=int(totals["tokens"]),
            seen=int(totals["seen"]),
        )

    def compute(self, batch: Batch) -> Any:
        """The model's output for one batch."""
        return self.model(**batch, reduction=self.stage.loss_reduction, skip_logits=True)

    # --- the parts of a step ----------------------------------------------------------------------------------------

    def _adamw(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def _agree_on_errors(self, item: MicroBatch) -> None:
        """Raise the error of a micro-batch on every rank at once, or the others would wait for this one for ever."""
        error = self.inspect(item)
        counts = (int(error is not None), item.images_read, len(item.failures))
        if self.trainer.world_size > 1:
            totals = torch.tensor(counts, dtype=torch.int64, device=self.device)
            dist.all_reduce(totals)
            counts = tuple(totals.tolist())
        # The same on every rank, so all of them say it.
        error = error or self.judge(*counts[1:])
        if error is not None:
            raise error
        if counts[0]:
            raise TrainingError("another process could not load its micro-batch; its message says why")

    def _totals(self) -> dict[str, float]:
        """Sums over the micro-batches of this step, then over ranks."""
        batches = [batch for _, _, batch in self._micros]
        local = {
            "loss_sum": torch.stack([loss for loss, _, _ in self._micros]).double().sum(),
            "weight": torch.stack([torch.as_tensor(weight) for _, weight, _ in self._micros]).double().sum(),
            "examples": sum(len(batch) for batch in batches),
            "tokens": sum((batch.labels != -100).sum() for batch in batches if batch.labels is not None),
            "images": float(any(has_images(batch) for batch in batches)),
            # Below 2**53 for two million examples, so float64 holds it exactly.
            "seen": checksum(batches),
            "stop": float(self.should_stop()),
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

    def _check_life(self, alive: set[str], images: bool, loss: float, step: int) -> None:
        """Raise `TrainingError` when a part that trains gets no gradient at all for several steps.

        A loss of zero leaves nothing to learn, text alone none for tower and projector, and a projector that begins at
        zero none for the tower in the first step: these are no signs of a dead part.
        """
        self._first = step if self._first is None else self._first
        enough = min(DEAD_STEPS, max(1, self.steps - max(1, self._first)))
        for part in self._dead:
            if part in alive:
                self._dead[part] = 0
            elif step > 0 and loss > 1e-6 and (images or part == "decoder"):
                self._dead[part] += 1
            if self._dead[part] >= enough:
                raise TrainingError(
                    f"stage {self.stage.name}, step {step + 1}: the gradient of the {part} (learning rate"
                    f" {self.stage.train[part]:g}) was zero in the last {self._dead[part]} steps: it is trained and"
                    f" learns nothing. Its weights have run away, or what comes behind it passes nothing on: look"
                    f" at the part it feeds, or lower the learning rates, from the start or after the last checkpoint"
                    f" (--resume --accept-changes)"
                )

    def _warn_of_missing_gradients(self) -> None:
        missing = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if missing and self.trainer.is_global_zero:
            log.warning(
                "stage %s: %d trainable parameters got no gradient, so they will not change: %s",
                *(self.stage.name, len(missing), ", ".join(missing[:5])),
            )

    def _on_overflow(self, norm: float, step: int, rates: dict[str, float]) -> None:
        """fp16: leave the step out (the gradient scaler does) unless it keeps happening; otherwise stop."""
        self._skipped += 1
        if self.trainer.precision == "16-mixed" and self._skipped <= MAX_SKIPPED:
            return
        bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        raise TrainingError(self._not_finite(f"the gradient norm is {norm} ({', '.join(bad[:3])})", step, rates))

    def _not_finite(self, what: str, step: int, rates: dict[str, float]) -> str:
        ids = [
            name
            for loss, _, batch in self._micros
            if self.trainer.world_size == 1 or not bool(loss.isfinite())
            for name in batch.ids
            if not bool(loss.isfinite()) or "gradient" in what
        ]
        shown = listed(ids, 8)
        lr = ", ".join(f"{part} {rate:g}" for part, rate in rates.items())
        return (
            f"stage {self.stage.name}, step {step + 1}: {what}; samples: {shown or 'of another process'}; "
            f"learning rates: {lr}. The weights were not touched; look at these samples, or lower the learning rates"
            f" and go on with --resume --accept-changes"
        )


class FrozenEncoderModule(StageModule):
    """A stage whose vision tower is frozen: the tower runs in eval mode, and no graph is built through it."""

    def compute(self, batch: Batch) -> Any:
        """The model's output, with the tower run beforehand under `no_grad`, unless the batch holds its features."""
        if isinstance(batch, FeatureBatch):
            texts, features = batch.split()
            return self.model(**texts, encoded=features, reduction=self.stage.loss_reduction, skip_logits=True)
        tensors = {name: batch[name] for name in batch.keys()}
        pixels = {name: tensors.pop(name) for name in PIXELS if name in tensors}
        encoded = None
        if pixels:
            with torch.no_grad():
                encoded = self.model.encode(**pixels)  # type: ignore[operator]
        return self.model(**tensors, encoded=encoded, reduction=self.stage.loss_reduction, skip_logits=True)

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


def has_images(batch: Batch) -> bool:
    """Whether a batch shows any image, as pixels or as features."""
    return batch.pixel_values is not None or (isinstance(batch, FeatureBatch) and batch.features is not None)


def checksum(batches: Sequence[Batch]) -> int:
    """The sum over all examples of 32 bits of the sha256 of id and supervised tokens. So it tells which examples a step
    really saw, whatever their order and however they were cut into micro-batches and shared by processes."""
    total = 0
    for batch in batches:
        assert batch.labels is not None
        for name, labels in zip(batch.ids, batch.labels.numpy(), strict=True):
            text = f"{name} {labels[labels != -100].tolist()}".encode("utf-8", "surrogatepass")
            total += int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
    return total


def reseed(*parts_of_seed: int | str) -> None:
    """Seed torch, numpy and Python from these values alone: a micro-batch's dropout depends on no earlier step."""
    digest = hashlib.sha256("/".join(map(str, parts_of_seed)).encode()).digest()
    value = int.from_bytes(digest[:8], "little") >> 1
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
