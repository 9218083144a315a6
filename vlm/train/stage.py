"""One stage, from a model to a trained model: Lightning's loop with our data order, records and checkpoints."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from vlm import ranks
from vlm.data.order import StepSampler
from vlm.errors import CheckpointError
from vlm.model.processor import Processor
from vlm.train import freezing
from vlm.train.failures import explain
from vlm.train.items import MicroBatch
from vlm.train.lightning_setup import make_trainer
from vlm.train.loader import loader, loading
from vlm.train.plan import Stage
from vlm.train.quiet import quiet_lightning
from vlm.train.record import Record
from vlm.train.save import Saver
from vlm.train.signals import Stopped, StopSignal
from vlm.train.step import Setting, StageModule, module_class
from vlm.train.validate import Validator
from vlm.train.watch import Evaluator, Watch

log = logging.getLogger(__name__)


def train_stage(
    stage: Stage,
    model: nn.Module,
    processor: Processor,
    record: Record,
    stop: StopSignal,
    *,
    evaluator: Evaluator | None = None,
    features: Callable[..., Any] | None = None,
) -> None:
    """Train `model` in place up to the stage's last step. Each step is `vlm.train.step.StageModule.training_step`.

    Args:
        features: makes the features of a frozen tower (`vlm.train.features.encode.encoded`); for `cache_features`.

    Raises:
        Stopped: a signal came; a checkpoint was saved.
        VLMError: anything a user can mend.
    """
    hooks = Hooks(record)
    trainer = make_trainer(stage, hooks)
    try:
        with freezing.frozen(model, stage.config):
            rows = freezing.manifest(model, stage.config)
            frozen = freezing.frozen_digests(model, stage.config)
            hooks.saver = saver = Saver(stage, model, frozen)
            freezing.check_manifest(model, stage.config, rows, "while the checkpoint was read")
            feed = _Feed(stage, processor, stage.dataset(processor), saver, frozen, stop, features)
            validator = Validator(stage, processor, trainer.world_size) if stage.val else None
            hooks.watch = watch = Watch(stage, record, saver.start, validator, evaluator)
            setting = Setting(
                objective=stage.objective,
                steps=stage.steps,
                seed=stage.seed,
                make_loader=feed,
                optimizer_state=saver.restored.optimizer if saver.restored else None,
                should_stop=lambda: stop.signum != 0,
                inspect=watch.inspect,
                judge=watch.judge,
                fused=stage.precision != "fp16",
            )
            module = module_class(stage.config)(model, stage.config, rows, setting)
            record.begin(saver.start, rows, frozen)
            if saver.start < stage.steps:
                with _training(stage, stop):
                    trainer.fit(module)
            else:
                watch.make_up_outside_training(trainer, module)
            after = _check_frozen(stage, model, frozen)
            record.end(frozen_after=after, **watch.end())
    finally:
        hooks.close()
    if module.stopped:
        raise Stopped(stop.signum or signal.SIGTERM)
    stop.raise_if_stopped()


@dataclass
class _Feed:
    """Makes the loader of a stage, when Lightning asks for it: the processes exist by then."""

    stage: Stage
    processor: Processor
    dataset: Any
    saver: Saver
    frozen: dict[str, str]
    stop: StopSignal
    features: Callable[..., Any] | None

    def __call__(self, module: StageModule) -> Any:
        # Lightning has just put its own signal handlers in; ours save first and give the right exit code.
        self.stop.install()
        stage, data = self.stage, self.dataset
        if stage.config.cache_features:
            assert self.features is not None
            store = self.features(stage, module, self.processor, self.frozen, self.stop)
            data = stage.dataset(self.processor, store=store)
        sampler = StepSampler(
            self.saver.start,
            stage.steps,
            stage.config.batch_size,
            accumulate=stage.config.accumulate,
            rank=module.global_rank,
            world=module.trainer.world_size,
            position=self.saver.position,
        )
        return loader(data, sampler, workers=stage.run.workers, pin_memory=torch.cuda.is_available())


class Hooks(pl.Callback):
    """What Lightning calls around the steps."""

    saver: Saver
    watch: Watch | None = None

    def __init__(self, record: Record) -> None:
        self._record = record
        self._last_step: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StageModule) and self.watch is not None
        self.watch.device = pl_module.device
        self._record.start_clock()
        self.saver.load_scaler(trainer)
        self.watch.make_up(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StageModule) and self.watch is not None
        report, stopped = pl_module.report, pl_module.stopped
        if report is None or report.step == self._last_step:
            return  # a micro-batch that did not end a step
        self._last_step = report.step
        if self._record.main:
            self._record.step(report)
            self.saver.save_if_due(trainer, report.step, stopped=stopped)
        # After the checkpoint: whatever happens here costs no step. A run that is stopped makes up for it later.
        if not stopped:
            self.watch.measure_if_due(pl_module, report.step)
        if stopped:
            trainer.should_stop = True
            # A process that leaves early is taken for a crash by the launcher, which then kills the one that saves.
            ranks.current().barrier()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; may be called twice."""
        if self.watch is not None:
            self.watch.close()
        self._record.close()


@contextmanager
def _training(stage: Stage, stop: StopSignal) -> Iterator[None]:
    """Around Lightning's loop: signals save first, loading processes end with it, a machine's failure is explained."""
    stop.saving_possible = True
    try:
        with quiet_lightning(), loading():
            yield
    except RuntimeError as error:
        explained = explain(error, stage.config)
        if explained is None:
            raise
        raise explained from error
    finally:
        stop.saving_possible = False


def _check_frozen(stage: Stage, model: nn.Module, before: dict[str, str]) -> dict[str, str]:
    """The digests of the frozen parts, which must be those from before the first step."""
    after = freezing.frozen_digests(model, stage.config)
    changed = [part for part in before if before[part] != after[part]]
    if changed:
        raise CheckpointError(f"stage {stage.config.name}: frozen parts changed during training: {', '.join(changed)}")
    return after
