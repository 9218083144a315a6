"""`run`: a whole training run. The spine is `run` -> `train_stage` (stage.py) -> `training_step` (step.py).

This file reads, opens and composes; each part is handed what it needs. At its top it is light: what must be refused is
refused before torch is imported.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import ranks, registry, settings
from vlm.train.config import EvaluateConfig, ModelConfig, RunConfig
from vlm.train.rundir import RunDirectory, open_run
from vlm.train.runlog import log_to, saved
from vlm.train.signals import Stopped, StopSignal

if TYPE_CHECKING:
    from vlm.model.forward import VLM
    from vlm.model.processor import Processor
    from vlm.train.plan import Stage
    from vlm.train.preview import Preview

log = logging.getLogger("vlm")


def run(config: RunConfig, *, resume: bool = False, skip_bad: bool = False, accept_changes: bool = False) -> Path:
    """Train all stages of `config`, each from the last one's model, and return the directory of the final model.

    Everything is written below `config.out` (see `vlm.train.rundir`). Killed at any moment and started again with
    `resume=True`, the run ends with the same weights, on a CPU bit for bit. One that ends before its first step leaves
    nothing.

    Args:
        resume: continue the run in `config.out` after its newest complete checkpoint; without a run there, start one.
        accept_changes: go on although settings or data that change the result are others now (see
        `vlm.train.changes`); what changed is recorded in `versions.json`.
        skip_bad: leave out annotations that are wrong, and list them, instead of refusing the file.

    Raises:
        VLMError: anything the caller can mend: configuration, data, a directory in use, a non-finite loss, a full disk.
        Stopped: (a SystemExit with code 143 or 130) SIGTERM or SIGINT came; a checkpoint was saved.
    """
    for wanted in config.stages:
        if wanted.objective not in registry.kinds("vlm.train.objectives"):
            # Only to say which there are: one that is known would load torch.
            registry.part("vlm.train.objectives", wanted.objective)
    main = ranks.is_main()
    try:
        with (
            StopSignal() as stop,
            open_run(config, resume=resume, main=main, accept_changes=accept_changes) as directory,
            log_to(config.out, main),
        ):
            from vlm.train import randomness, summary
            from vlm.train.features import encode, store
            from vlm.train.processes import join_process_group
            from vlm.train.quiet import quiet_transformers
            from vlm.train.record import Record
            from vlm.train.save import finished
            from vlm.train.stage import train_stage

            ranks.end_with_launcher()
            with ranks.all_or_none("then start all of them again with --resume"):
                began = time.monotonic()
                join_process_group()
                work = _prepared(config, directory, main=main, skip_bad=skip_bad)
                done: list[str] = []
                model_at = work.start
                with randomness.kept(), quiet_transformers():
                    for stage in work.stages:
                        if finished(stage):
                            log.info("stage %s: finished before", stage.config.name)
                        else:
                            model, processor = _opened(stage, model_at, work.tell)
                            record = Record(stage, main, done)
                            how: dict[str, Any] = {
                                "evaluator": _evaluator(config.evaluate, work.jobs, processor),
                                "features": encode.encoded,
                            }
                            train_stage(stage, model, processor, record, stop, **how)
                            if main:
                                publish(model, processor, stage.model, summary.provenance(stage))
                        if main:
                            store.remove(stage.features, stage.config.name)
                        ranks.current().barrier()
                        model_at = stage.model
                        done.append(stage.config.name)
                final = config.out / "model"
                if main:
                    summary.finish(config, model_at, final, work.skipped, time.monotonic() - began)
                ranks.current().barrier()
                return final
    except Stopped:
        if main:
            log.warning("stopped; %s", saved(config))
        raise


# --- before the first step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What a run does, all of it checked."""

    stages: list[Stage]
    start: Path
    """The model before the first stage."""
    jobs: dict[str, Any]
    """Name -> `vlm.eval.job.Job`: what is evaluated while it trains."""
    skipped: int
    """Annotations that were left out."""
    tell: Preview


def _prepared(config: RunConfig, directory: RunDirectory, *, main: bool, skip_bad: bool) -> _Work:
    """Read the data, make the stages and the model that the first one begins with. Raises `VLMError`."""
    from vlm.model.config import VLMConfig
    from vlm.train import checkpoint, context_fit, plan, preview, sources
    from vlm.train.quiet import quiet_transformers

    examples, counts, skipped = sources.read_sources(config, skip_bad)
    val, skipped_val = sources.read_val(config, skip_bad)
    jobs = read_jobs(config.evaluate, skip_bad=skip_bad, strip_control=config.data.strip_control)
    sources.tell_skipped([problem for job in jobs.values() for problem in job.problems])
    skipped += skipped_val + sum(len(job.problems) for job in jobs.values())
    read = plan.Sources(examples, counts, val, sources.data_digest(examples))
    objectives = [registry.part("vlm.train.objectives", wanted.objective).Objective(wanted) for wanted in config.stages]
    stages = plan.make_stages(config, read, objectives)
    preview.check(stages)
    start = config.out / "start"
    steps = {stage.config.name: stage.steps for stage in stages}
    directory.settle(read.digest, steps, lambda: _makes_the_same(config.model, start))
    if main and checkpoint.problem(start):
        with quiet_transformers():
            publish(*make_model(config.model), start, {"model": settings.to_dict(config.model)})
    ranks.current().barrier()
    kept, jobs, left_out = context_fit.fitting(read, jobs, context_fit.rooms_of(config, start), skip_bad=skip_bad)
    if left_out:
        stages = plan.make_stages(config, kept, objectives)
    decoder = VLMConfig.from_pretrained(start).text_config
    for stage in stages:
        context_fit.check_precision(stage, decoder)
    return _Work(stages, start, jobs, skipped + left_out, preview.Preview(stages, main))


def read_jobs(config: EvaluateConfig | None, *, skip_bad: bool = False, strip_control: bool = False) -> dict[str, Any]:
    """Name -> what is evaluated (`vlm.eval.job.Job`). Raises VLMError for anything that is wrong with it, before
    training begins.

    Args:
        skip_bad: of a JSONL file, leave out and list the broken annotations.
        strip_control: remove control spellings from the prompts.
    """
    if config is None:
        return {}
    from vlm.eval.job import FileReading, Reading, file_job, task_job
    from vlm.eval.tasks.catalogue import select
    from vlm.train.evaluate import part_of

    if config.tasks is not None:
        reading = Reading(strip_control=strip_control)
        jobs = {one.label: task_job(one, config.data, reading) for one in select(config.tasks)}
    else:
        how = FileReading(skip_bad=skip_bad, strip_control=strip_control, image_root=config.image_root)
        jobs = {config.data.stem: file_job(config.data, config.metrics, config.decoding, how)}
    return {name: part_of(job, config.limit) for name, job in jobs.items()}


def _evaluator(config: EvaluateConfig | None, jobs: dict[str, Any], processor: Processor) -> Any:
    """What scores the model's answers while a stage trains, if anything does."""
    if config is None:
        return None
    from vlm.eval import results
    from vlm.eval.job import requests
    from vlm.train.evaluate import Asking, Evaluator

    return Evaluator(jobs, processor, config.batch_size, Asking(requests, results.unanswered, results.score))


# --- models -----------------------------------------------------------------------------------------------------------


def make_model(config: ModelConfig) -> tuple[VLM, Processor]:
    """The model a run starts from, in float32. Raises `VLMError`."""
    from vlm.build.assembly import new
    from vlm.checkpoints.directory import load
    from vlm.checkpoints.geometry import with_geometry
    from vlm.train.models import new_arguments

    if config.path is None:
        model, processor = new(**new_arguments(config))
    else:
        model, processor = load(config.path, dtype="float32")
        model, processor = with_geometry(model, processor, **config.geometry(), seed=config.seed)
    for name in ("softcap_in_loss", "softcap_in_generation"):
        if getattr(config, name) is not None:
            setattr(model.config, name, getattr(config, name))
    return model, processor


def publish(model: VLM, processor: Processor, target: Path, provenance: dict[str, Any]) -> None:
    """Write a complete model directory, with `training.json` beside the weights, in one step."""
    from vlm.checkpoints.saving import save
    from vlm.train import checkpoint

    with checkpoint.publishing(target) as folder:
        save(model, processor, folder)
        (folder / "training.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def _makes_the_same(config: ModelConfig, start: Path) -> bool:
    """Whether a model that was configured anew is the one that the run began with: it may have moved."""
    from vlm.checkpoints import identity
    from vlm.checkpoints.directory import load
    from vlm.train.quiet import quiet_transformers

    with quiet_transformers():
        return identity.of_model(*make_model(config)) == identity.of_model(*load(start, dtype="float32"))


def _opened(stage: Stage, start: Path, tell: Preview) -> tuple[VLM, Processor]:
    """The model that a stage trains, with the stage's geometry, and its processor. Raises `VLMError`."""
    from vlm.checkpoints.directory import load
    from vlm.checkpoints.geometry import with_geometry
    from vlm.train.context_fit import check_lengths, room_of

    # Loaded even when it was just saved: a run that was interrupted has no other way, and both must do the same.
    model, processor = load(start, dtype="float32")
    model, processor = with_geometry(model, processor, **stage.config.geometry(), seed=stage.run.seed)
    tell(stage, model, processor)
    cut = check_lengths(stage.examples, room_of(stage.config, stage.run.data, processor, model.config))
    if cut:
        log.warning(
            "stage %s: %d of %d answers are longer than max_text_length and will be cut",
            *(stage.config.name, cut, len(stage.examples)),
        )
    return model, processor
