"""Checkpoints of a stage: the newest one put into the model, and new ones when they are due. Only rank 0 writes."""

import json
import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from vlm.errors import CheckpointError
from vlm.train import checkpoint, freezing, optim
from vlm.train.plan import Stage

log = logging.getLogger(__name__)


class Saver:
    """The checkpoints of one stage.

    Args:
        frozen: digests of the frozen parts, by part.

    Attributes:
        restored: what the stage goes on from, which is in the model now; None where it begins.
        start, position: the optimizer step, and the place in the endless line of examples, where it begins or goes on.

    Raises `CheckpointError` for a checkpoint of another model.
    """

    def __init__(self, stage: Stage, model: nn.Module, frozen: dict[str, str]) -> None:
        self._stage, self._model, self._frozen = stage, model, frozen
        self.restored = checkpoint.newest(stage.folder / "checkpoints")
        self.start = self.position = 0
        if self.restored is not None:
            _restore(self.restored, stage, model, frozen)
            self.start = self.restored.step
            # Behind what was seen, whatever the batch was then.
            self.position = int(self.restored.state.get("position", self.start * stage.config.batch_size))
        self._saved = self.start

    def load_scaler(self, trainer: pl.Trainer) -> None:
        """fp16's loss scale goes on where it was; Lightning has made its gradient scaler by now, not before."""
        scaler = self.restored.state.get("scaler") if self.restored else None
        if scaler is not None:
            trainer.precision_plugin.load_state_dict(scaler)

    def save_if_due(self, trainer: pl.Trainer, step: int, *, stopped: bool) -> None:
        """Every `checkpoint_every` steps, at the end of the stage, and when it is stopped. Raises `VLMError`."""
        run = self._stage.run
        due = step % run.checkpoint_every == 0 or step == self._stage.steps or stopped
        if not due or step == self._saved:
            return
        optimizer = optim.state_tensors(trainer.optimizers[0])
        tensors = freezing.trained_tensors(self._model, self._stage.config)
        folder = self._stage.folder / "checkpoints"
        checkpoint.save(folder, step, tensors, optimizer, self._state(trainer, step), run.keep_checkpoints)
        self._saved = step

    def _state(self, trainer: pl.Trainer, step: int) -> dict[str, Any]:
        stage = self._stage
        return {
            "stage": stage.config.name,
            "steps": stage.steps,
            "position": self.position + (step - self.start) * stage.config.batch_size,
            "start": stage.start,
            "data": stage.sources.digest,
            "frozen": self._frozen,
            "threads": torch.get_num_threads(),
            "scaler": trainer.precision_plugin.state_dict() or None,
        }


def _restore(found: checkpoint.Checkpoint, stage: Stage, model: nn.Module, frozen: dict[str, str]) -> None:
    """Put a checkpoint into the model."""
    # Whether data and settings are still the same was settled for the whole run (`RunDirectory.settle`).
    if found.state.get("frozen") != frozen:
        raise CheckpointError(
            f"{found.path}: the frozen parts are not those of this checkpoint (then {found.state.get('frozen')!r}, now"
            f" {frozen!r}); put the model back that the stage began with, or start again in another `out`"
        )
    tensors = freezing.trained_tensors(model, stage.config)
    if set(tensors) != set(found.model):
        odd = sorted(set(tensors) ^ set(found.model))
        raise CheckpointError(f"{found.path}: its tensors are not those that train now: {', '.join(odd[:5])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found.model[name])
    log.info("stage %s: resumed at step %d of %d from %s", stage.config.name, found.step, stage.steps, found.path)
    threads, now = found.state.get("threads"), torch.get_num_threads()
    if threads not in (None, now) and next(model.parameters()).device.type == "cpu":
        log.warning(
            "stage %s: goes on with %d threads, and had %d: the last bits of its weights may differ from those of"
            " a run that was never stopped; OMP_NUM_THREADS=%d keeps them",
            *(stage.config.name, now, threads, threads),
        )


def finished(stage: Stage) -> bool:
    """Whether the stage's model is there, and is that of its last step: more steps may have been asked for since."""
    if checkpoint.problem(stage.model) is not None:
        return False
    done = int(json.loads((stage.model / "training.json").read_text(encoding="utf-8"))["steps"])
    if done < stage.steps and not any((stage.folder / "checkpoints").glob("step-*")):
        raise CheckpointError(
            f"stage {stage.config.name}: its {done} steps are done, and it cannot go on to {stage.steps}:"
            f" {stage.folder / 'checkpoints'} holds no checkpoint; set steps to {done}, or add a stage"
        )
    return done >= stage.steps
