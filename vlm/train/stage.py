"""One stage, from a model to a trained model: Lightning's loop with our data order, records and checkpoints."""

import logging
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from vlm.checkpoints import identity
from vlm.data import augment
from vlm.data.examples import Example
from vlm.data.order import Mixture, StepSampler, stage_seed, steps_of
from vlm.errors import CheckpointError, ConfigError
from vlm.eval.job import Job
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor
from vlm.train import checkpoint, parts
from vlm.train.batches import MicroBatches, loader, loading, with_budget
from vlm.train.config import RunConfig, StageConfig
from vlm.train.evaluate import Evaluator
from vlm.train.failures import explain
from vlm.train.features.encode import Encoding
from vlm.train.features.store import FeatureBatches, FeatureStore, Plan
from vlm.train.quiet import quiet_lightning
from vlm.train.recorder import Recorder
from vlm.train.signals import Stopped, StopSignal
from vlm.train.step import FrozenEncoderModule, StageModule, module_class
from vlm.train.validate import Validator

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Stage:
    """A stage with everything that is decided before its first step."""

    run: RunConfig
    config: StageConfig
    seed: int
    examples: list[Example]
    val: list[Example]
    mixture: Mixture
    data_digest: str
    """Of the training examples; a checkpoint of other data is refused."""
    jobs: dict[str, Job]
    """What is evaluated while it trains."""

    @property
    def steps(self) -> int:
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.epochs is not None
        return steps_of(self.config.epochs, self.mixture.epoch_length, self.config.batch_size)

    @property
    def folder(self) -> Path:
        return self.run.out / self.config.name

    @property
    def start(self) -> str:
        """The model that the stage begins with, relative to the run's directory."""
        index = self.run.stages.index(self.config)
        return f"{self.run.stages[index - 1].name}/model" if index else "start"

    @property
    def precision(self) -> str:
        return self.config.precision or self.run.precision

    def dataset(self, processor: Processor, store: FeatureStore | None = None) -> MicroBatches:
        """What trains, with the features of the images if there is a store of them."""
        settings: dict[str, Any] = {
            "max_text_length": self.config.max_text_length,
            "augmentations": augment.pipeline(self.config.augment),
            "cache_images_mb": self.run.data.cache_images_mb,
            "budgets": self.run.data.budgets(),
            "batch_tokens": self.config.batch_tokens,
        }
        if store is not None:
            return FeatureBatches(self.examples, self.mixture, processor, store=store, **settings)
        return MicroBatches(self.examples, self.mixture, processor, **settings)

    @property
    def features(self) -> Path:
        """Folder of the cached features, while the stage trains."""
        return self.folder / "features"


def make_stage(
    run: RunConfig,
    index: int,
    examples: list[Example],
    counts: tuple[int, ...],
    val: list[Example],
    digest: str,
    jobs: dict[str, Job] | None = None,
) -> Stage:
    """The stage at `index`; `counts` are the numbers of examples of the files that `examples` came from.

    Raises `DataError` for examples that the stage's augmentations cannot change.
    """
    seed = stage_seed(run.seed, index)
    mixture = Mixture(counts, tuple(source.repeat for source in run.data.sources()), seed)
    augment.check(augment.pipeline(run.stages[index].augment), examples)
    return Stage(run, run.stages[index], seed, examples, val, mixture, digest, jobs or {})


def train_stage(stage: Stage, model: nn.Module, processor: Processor, recorder: Recorder, stop: StopSignal) -> None:
    """Train `model` in place up to the stage's last step.

    Raises:
        Stopped: a signal came; a checkpoint was saved.
        VLMError: anything a user can mend.
    """
    trainer = make_trainer(stage, recorder)
    with parts.frozen(model, stage.config):
        rows = parts.manifest(model, stage.config)
        frozen = parts.frozen_digests(model, stage.config)
        resumed = _restore(stage, model, frozen)
        parts.check_manifest(model, stage.config, rows, "while the checkpoint was read")
        start = resumed.step if resumed else 0
        module = _module(stage, model, processor, rows, frozen, resumed, recorder, stop)
        validator = _validator(stage, processor, trainer.world_size)
        scaler = resumed.state.get("scaler") if resumed else None
        evaluator = _evaluator(stage, processor)
        recorder.begin(stage, rows, frozen, start, _position(stage, resumed), scaler, validator, evaluator)
        if start < stage.steps:
            _fit(trainer, module, stop)
        else:
            recorder.make_up_outside_training(trainer, module)
        _check_frozen(stage, model, frozen)
        recorder.end(frozen)
    if module.stopped:
        raise Stopped(stop.signum or signal.SIGTERM)


def make_trainer(stage: Stage, recorder: Recorder) -> pl.Trainer:
    """Lightning's trainer, with everything off that this package does itself. Raises `ConfigError`."""
    run = stage.run
    devices = _devices(run)
    try:
        with quiet_lightning():
            trainer = pl.Trainer(
                accelerator=run.accelerator,
                devices=devices,
                num_nodes=run.nodes,
                strategy=_strategy(run, devices),
                precision=PRECISIONS[stage.precision],  # type: ignore[arg-type]
                deterministic=run.deterministic,
                max_epochs=1,  # one pass over the sampler, which holds all steps of the stage
                accumulate_grad_batches=stage.config.accumulate,
                callbacks=[recorder],
                use_distributed_sampler=False,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                num_sanity_val_steps=0,
            )
    except pl.utilities.exceptions.MisconfigurationException as error:
        raise ConfigError(f"stage {stage.config.name}: {str(error).splitlines()[0]}") from error
    return trainer


def world_size(run: RunConfig) -> int:
    """Processes of the run, one device each, on all nodes."""
    return _devices(run) * run.nodes


def _devices(run: RunConfig) -> int:
    """Lightning's `auto` is one process on a CPU already, but says so with a warning."""
    if run.devices != "auto":
        return run.devices
    return torch.cuda.device_count() if run.accelerator != "cpu" and torch.cuda.is_available() else 1


def _strategy(run: RunConfig, devices: int) -> str | DDPStrategy:
    if run.strategy == "auto" and devices * run.nodes == 1:
        return "auto"
    # No buffer of ours changes in training, so there is nothing to send before every forward pass.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def _fit(trainer: pl.Trainer, module: StageModule, stop: StopSignal) -> None:
    stop.saving_possible = True
    try:
        with quiet_lightning(), loading():
            trainer.fit(module)
    except RuntimeError as error:
        explained = explain(error, module.stage)
        if explained is None:
            raise
        raise explained from error
    finally:
        stop.saving_possible = False


def _validator(stage: Stage, processor: Processor, world: int) -> Validator | None:
    if not stage.val:
        return None
    size = max(1, stage.config.batch_size // (stage.config.accumulate * world))
    limits: dict[str, Any] = {
        "max_text_length": stage.config.max_text_length,
        "batch_tokens": stage.config.batch_tokens,
    }
    return Validator(stage.val, processor, size, **limits)


def _evaluator(stage: Stage, processor: Processor) -> Evaluator | None:
    config = stage.run.evaluate
    return Evaluator(stage.jobs, processor, config.batch_size) if config else None


def _module(
    stage: Stage,
    model: nn.Module,
    processor: Processor,
    rows: list[parts.Row],
    frozen: dict[str, str],
    resumed: checkpoint.Checkpoint | None,
    recorder: Recorder,
    stop: StopSignal,
) -> StageModule:
    dataset = stage.dataset(processor)

    def make_loader(module: StageModule) -> Any:
        # Lightning has just put its own signal handlers in; ours save first and give the right exit code.
        stop.install()
        data = dataset
        if stage.config.cache_features:
            data = stage.dataset(processor, _features(stage, module, processor, frozen, stop))
        sampler = StepSampler(
            resumed.step if resumed else 0,
            stage.steps,
            stage.config.batch_size,
            accumulate=stage.config.accumulate,
            rank=module.global_rank,
            world=module.trainer.world_size,
            position=_position(stage, resumed),
        )
        return loader(data, sampler, workers=stage.run.workers, pin_memory=torch.cuda.is_available())

    return module_class(stage.config)(
        model,
        stage.config,
        rows,
        steps=stage.steps,
        seed=stage.seed,
        make_loader=make_loader,
        optimizer_state=resumed.optimizer if resumed else None,
        should_stop=lambda: stop.signum != 0,
        inspect=recorder.inspect,
        judge=recorder.judge,
        # The gradient scaler of fp16 cannot look at the gradients before a fused step.
        fused=stage.precision != "fp16",
    )


def _features(
    stage: Stage, module: StageModule, processor: Processor, frozen: dict[str, str], stop: StopSignal
) -> FeatureStore:
    """The features of all images of the stage, made now where they are not on the disk. Called on every rank."""
    assert isinstance(module, FrozenEncoderModule)
    model: Any = module.model
    budgets = stage.run.data.budgets()
    transform = (with_budget(processor, budgets[0]) if budgets else processor).image_transform
    plan = Plan(
        stage.features,
        stage.examples,
        image_bytes=transform.max_patches * encoder_spec(model.config.encoder).width(model.config.vision_config) * 4,
        identity={
            "tower": [frozen["encoder"], *identity.tower_settings(model)],
            "transform": transform.to_dict(),
            "precision": stage.precision,
        },
    )
    if stage.steps * stage.config.batch_size < len(plan.images):
        log.warning(
            "stage %s: cache_features encodes %d images, but only %d are seen; without it the stage is faster",
            *(stage.config.name, len(plan.images), stage.steps * stage.config.batch_size),
        )
    making = Encoding(
        stage.config.name,
        plan,
        transform,
        module.encode,
        module.device,
        rank=module.global_rank,
        world=module.trainer.world_size,
        workers=stage.run.workers,
        should_stop=lambda: stop.signum != 0,
    )
    store = making.run()
    if store is None:
        raise Stopped(stop.signum or signal.SIGTERM)
    return store


def _restore(stage: Stage, model: nn.Module, frozen: dict[str, str]) -> checkpoint.Checkpoint | None:
    """Put the newest complete checkpoint of the stage into the model, if there is one."""
    found = checkpoint.newest(stage.folder / "checkpoints")
    if found is None:
        return None
    # Whether data and settings are still the same was settled for the whole run (`RunDirectory.settle`).
    if found.state.get("frozen") != frozen:
        raise CheckpointError(
            f"{found.path}: the frozen parts are not those of this checkpoint (then {found.state.get('frozen')!r}, now"
            f" {frozen!r}); put the model back that the stage began with, or start again in another `out`"
        )
    tensors = parts.trained_tensors(model, stage.config)
    if set(tensors) != set(found.model):
        odd = sorted(set(tensors) ^ set(found.model))
        raise CheckpointError(f"{found.path}: its tensors are not those that train now: {', '.join(odd[:5])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found.model[name])
    log.info("stage %s: resumed at step %d of %d from %s", stage.config.name, found.step, stage.steps, found.path)
    threads, now = found.state.get("threads"), torch.get_num_threads()
    if threads not in (None, now) and model.device.type == "cpu":
        log.warning(
            "stage %s: goes on with %d threads, and had %d: the last bits of its weights may differ from those of"
            " a run that was never stopped; OMP_NUM_THREADS=%d keeps them",
            *(stage.config.name, now, threads, threads),
        )
    return found


def _position(stage: Stage, resumed: checkpoint.Checkpoint | None) -> int:
    """Where in the endless line of examples the stage goes on: behind what was seen, whatever the batch was then."""
    if resumed is None:
        return 0
    return int(resumed.state.get("position", resumed.step * stage.config.batch_size))


def _check_frozen(stage: Stage, model: nn.Module, before: dict[str, str]) -> None:
    after = parts.frozen_digests(model, stage.config)
    changed = [part for part in before if before[part] != after[part]]
    if changed:
        raise CheckpointError(f"stage {stage.config.name}: frozen parts changed during training: {', '.join(changed)}")
