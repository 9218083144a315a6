"""Lightning's trainer, with everything off that this package does itself; and how many processes there are."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from vlm.errors import ConfigError
from vlm.train.config import RunConfig
from vlm.train.plan import Stage
from vlm.train.quiet import quiet_lightning

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Mixed precision keeps weights and optimizer in float32."""


def make_trainer(stage: Stage, hooks: pl.Callback) -> pl.Trainer:
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
                callbacks=[hooks],
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
