"""The stages of a run, one after the other: read the data, make the first model, train, publish each stage's model."""

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from vlm import files, ranks, settings
from vlm.build.assembly import new
from vlm.build.choice import Choice
from vlm.build.towers import choose
from vlm.checkpoints import identity
from vlm.checkpoints.checks import guarded
from vlm.checkpoints.directory import load
from vlm.checkpoints.geometry import with_geometry
from vlm.checkpoints.geometry_plan import planned
from vlm.checkpoints.preprocessing import own_transform
from vlm.checkpoints.saving import save
from vlm.data import content
from vlm.data.control import without_control
from vlm.data.examples import Example
from vlm.data.problems import Problem, listing
from vlm.data.reading import read
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.eval.job import Job
from vlm.model import decoder as decoders
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM
from vlm.model.lengths import Room, context_of, refuse, too_long
from vlm.model.parts import model_types
from vlm.model.processor import Processor
from vlm.train import checkpoint, failures, metrics, preview
from vlm.train.batches import check_lengths, targets, with_budget
from vlm.train.config import DataConfig, ModelConfig, RunConfig, StageConfig
from vlm.train.evaluate import read_jobs
from vlm.train.features import store as features
from vlm.train.processes import join_process_group
from vlm.train.quiet import quiet_transformers
from vlm.train.recorder import Recorder
from vlm.train.rundir import RunDirectory, accepted, read_record
from vlm.train.signals import StopSignal
from vlm.train.stage import Stage, make_stage, train_stage

log = logging.getLogger(__name__)


def run_stages(config: RunConfig, directory: RunDirectory, *, main: bool, skip_bad: bool, stop: StopSignal) -> Path:
    """See `vlm.train.run`."""
    began = time.monotonic()
    join_process_group()
    examples, counts, skipped = read_sources(config, skip_bad)
    val, skipped_val = _read_val(config, skip_bad)
    jobs = read_jobs(config.evaluate, skip_bad=skip_bad, strip_control=config.data.strip_control)
    skipped += skipped_val + sum(len(job.problems) for job in jobs.values())
    tell_skipped([problem for job in jobs.values() for problem in job.problems])
    digest = data_digest(examples)
    stages = [make_stage(config, i, examples, counts, val, digest, jobs) for i in range(len(config.stages))]
    preview.check(stages)
    start = config.out / "start"
    directory.settle(
        digest, {stage.config.name: stage.steps for stage in stages}, lambda: _makes_the_same(config.model, start)
    )
    if main and checkpoint.problem(start):
        with quiet_transformers():
            model, processor = make_model(config.model)
            _publish_model(model, processor, start, {"model": settings.to_dict(config.model)})
    ranks.current().barrier()
    kept, left_out = _fitting(_Data(examples, counts, val, jobs), _rooms(config, start), skip_bad)
    if left_out:
        digest = data_digest(kept.examples)
        stages = [
            make_stage(config, i, kept.examples, kept.counts, kept.val, digest, kept.jobs)
            for i in range(len(config.stages))
        ]
    decoder = VLMConfig.from_pretrained(start).text_config
    for stage in stages:
        _check_precision(stage, decoder)
    finished: list[str] = []
    tell = preview.Preview(stages, main)
    with _global_random_state(), quiet_transformers():
        for stage in stages:
            start = _run_stage(stage, start, finished, main, stop, tell)
            finished.append(stage.config.name)
    final = config.out / "model"
    if main:
        _finish(config, start, final, skipped + left_out, time.monotonic() - began)
    ranks.current().barrier()
    return final


def _run_stage(
    stage: Stage, start: Path, finished: list[str], main: bool, stop: StopSignal, tell: preview.Preview
) -> Path:
    """Train one stage from the model at `start`, unless it is finished already; returns its model directory."""
    target = stage.folder / "model"
    if _finished(stage, target):
        log.info("stage %s: finished before", stage.config.name)
        if main:
            features.remove(stage.features, stage.config.name)
        return target
    # Loaded even when it was just saved: a run that was interrupted has no other way, and both must do the same.
    model, processor = load(start, dtype="float32")
    model, processor = with_geometry(model, processor, **stage.config.geometry(), seed=stage.run.seed)
    tell(stage, model, processor)
    cut = check_lengths(stage.examples, _room(stage.config, stage.run.data, processor, model.config))
    if cut:
        log.warning(
            "stage %s: %d of %d answers are longer than max_text_length and will be cut",
            *(stage.config.name, cut, len(stage.examples)),
        )
    recorder = Recorder(main, finished)
    try:
        train_stage(stage, model, processor, recorder, stop)
    finally:
        recorder.close()
    stop.raise_if_stopped()
    if main:
        _publish_model(model, processor, target, _provenance(stage))
        features.remove(stage.features, stage.config.name)
    ranks.current().barrier()
    return target


def _finished(stage: Stage, target: Path) -> bool:
    """Whether the stage's model is there, and is that of its last step: more steps may have been asked for since."""
    if checkpoint.problem(target) is not None:
        return False
    done = json.loads((target / "training.json").read_text(encoding="utf-8"))["steps"]
    if done < stage.steps and not any((stage.folder / "checkpoints").glob("step-*")):
        raise CheckpointError(
            f"stage {stage.config.name}: its {done} steps are done, and it cannot go on to {stage.steps}:"
            f" {stage.folder / 'checkpoints'} holds no checkpoint; set steps to {done}, or add a stage"
        )
    return bool(done >= stage.steps)


# --- data -----------------------------------------------------------------------------------------------------------


def read_sources(config: RunConfig, skip_bad: bool) -> tuple[list[Example], tuple[int, ...], int]:
    """All training examples, how many came from each file, and how many annotations were skipped.

    Raises `DataError` with the problems of all files together.
    """
    examples: list[Example] = []
    counts, problems, skipped = [], [], 0
    for source in config.data.sources():
        try:
            own, bad = read(source.path, image_root=source.image_root, require=("suffix",), skip_bad=skip_bad)
        except DataError as error:
            problems.append(str(error))
            continue
        if not own:
            problems.append(f"{source.path}: no usable example")
        tell_skipped(bad)
        own = _without_control(own, config)
        examples += own
        counts.append(len(own))
        skipped += len(bad)
    if problems:
        raise DataError("\n".join(problems))
    if skipped:
        log.warning("%d annotations skipped, %d kept", skipped, len(examples))
    return examples, tuple(counts), skipped


def _read_val(config: RunConfig, skip_bad: bool) -> tuple[list[Example], int]:
    """The validation examples, and how many annotations were skipped."""
    if config.data.val is None:
        return [], 0
    root = config.data.image_root
    examples, bad = read(config.data.val, image_root=root, require=("suffix",), skip_bad=skip_bad)
    tell_skipped(bad)
    return _without_control(examples, config), len(bad)


def _without_control(examples: list[Example], config: RunConfig) -> list[Example]:
    return without_control(examples, "`strip_control: true` under `data`", strip=config.data.strip_control)


@dataclass(frozen=True)
class _Rooms:
    """What a sample may take in a stage: when it trains, and (with the model's own patch budget) otherwise."""

    training: Room
    own: Room


@dataclass(frozen=True)
class _Data:
    """All that a run reads: training examples with the number from each file, validation, and what is evaluated."""

    examples: list[Example]
    counts: tuple[int, ...]
    val: list[Example]
    jobs: dict[str, Job]


def _fitting(data: _Data, rooms: Sequence[_Rooms], skip_bad: bool) -> tuple[_Data, int]:
    """The data without what is too long for the model in one of the stages, and how much that was.

    Raises `DataError` that lists it with file and line, where it may not be left out.
    """
    own = [stage.own for stage in rooms]
    examples = _over(data.examples, [stage.training for stage in rooms], targets)
    val = _over(data.val, own, targets)
    answering = [replace(room, max_text_length=None) for room in own]
    jobs = {
        name: _over(job.examples, answering, job.candidates or (lambda example: ())) for name, job in data.jobs.items()
    }
    found = [problem for part in (examples, val, *jobs.values()) for problem in part.values()]
    if not found:
        return data, 0
    counts, start = [], 0
    for count in data.counts:
        counts.append(count - sum(start <= index < start + count for index in examples))
        start += count
    left = [*counts, *(len(job.examples) - len(jobs[name]) for name, job in data.jobs.items())]
    if not skip_bad or 0 in left:
        refuse(found)
    tell_skipped(found)
    kept = {name: replace(job, examples=_without(job.examples, jobs[name])) for name, job in data.jobs.items()}
    return _Data(_without(data.examples, examples), tuple(counts), _without(data.val, val), kept), len(found)


def _over(
    examples: Sequence[Example], rooms: Sequence[Room], answers: Callable[[Example], Sequence[str]]
) -> dict[int, Problem]:
    """`too_long` in any of the rooms."""
    found: dict[int, Problem] = {}
    for room in rooms:
        found = {**too_long(examples, room, answers), **found}
    return dict(sorted(found.items()))


def _without(examples: Sequence[Example], bad: Mapping[int, Any]) -> list[Example]:
    return [example for index, example in enumerate(examples) if index not in bad]


def tell_skipped(problems: Sequence[Problem]) -> None:
    """List the annotations that `--skip-bad` leaves out."""
    for line in listing(problems):
        log.warning("skipped %s", line)


def data_digest(examples: list[Example]) -> str:
    """sha256 over what is trained on, in order: texts and the content of images, so that data may move.

    The processes of a run share the reading; each must call this.
    """
    found: dict[Path, str] = {}
    for part in ranks.current().gather(content.of_files(ranks.current().share(content.image_files(examples)))):
        found |= part
    return content.of_items(examples, ("id", "prefix", "suffix"), found)


def _rooms(config: RunConfig, start: Path) -> list[_Rooms]:
    """What a sample may take in each stage.

    Follows the model's geometry through the stages, so that one which is impossible is refused before the first.
    """
    model, transform, processor = VLMConfig.from_pretrained(start), own_transform(start), None
    rooms = []
    for stage in config.stages:
        try:
            model, transform = planned(model, transform, **stage.geometry())
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error
        processor = processor or Processor.from_pretrained(start)
        now = Processor(processor.tokenizer, transform, model.projector_config)
        own = Room(processor=now, context=context_of(model), max_text_length=stage.max_text_length)
        rooms.append(_Rooms(_room(stage, config.data, now, model), own))
    return rooms


def _room(stage: StageConfig, data: DataConfig, processor: Processor, model: VLMConfig) -> Room:
    """What a training example may take in a stage: with the largest patch budget, where it draws one."""
    if data.budgets():
        processor = with_budget(processor, max(data.budgets()))
    return Room(processor=processor, context=context_of(model), max_text_length=stage.max_text_length)


# --- models ---------------------------------------------------------------------------------------------------------


def make_model(config: ModelConfig) -> tuple[VLM, Processor]:
    """The model a run starts from, in float32. Raises `VLMError`."""
    if config.path is None:
        model, processor = _new_model(config)
    else:
        model, processor = load(config.path, dtype="float32")
        model, processor = with_geometry(model, processor, **config.geometry(), seed=config.seed)
    for name in ("softcap_in_loss", "softcap_in_generation"):
        if getattr(config, name) is not None:
            setattr(model.config, name, getattr(config, name))
    return model, processor


def _makes_the_same(config: ModelConfig, start: Path) -> bool:
    """Whether a model that was configured anew is the one that the run began with: it may have moved."""
    with quiet_transformers():
        return identity.of_model(*make_model(config)) == identity.of_model(*load(start, dtype="float32"))


def _new_model(config: ModelConfig) -> tuple[VLM, Processor]:
    decoder = _part(config.decoder, "decoder")
    return new(
        _towers(config),
        config.projector or "linear",
        decoder,
        config.tokenizer,
        seed=config.seed,
        **_tower_settings(config),
    )


def make_tower(config: ModelConfig) -> Choice:
    """The tower (or towers) that `make_model` would make; no weight is read. Raises `VLMError`."""
    return choose(_towers(config), **_tower_settings(config))


def _towers(config: ModelConfig) -> Any:
    if isinstance(config.encoder, list):
        return [_tower(one, config.encoder_kind) for one in config.encoder]
    return _tower(config.encoder, config.encoder_kind)


def _tower_settings(config: ModelConfig) -> dict[str, Any]:
    return {
        "encoder_kind": config.encoder_kind,
        "image_size": config.image_size,
        "image": config.image or None,
        "layer": config.layer,
        "fuse": config.fuse or None,
    }


def _tower(value: Any, own: str | None) -> Any:
    """A checkpoint's name, or keys and values: of one of our encoders' configurations, else of transformers'."""
    if isinstance(value, dict) and value.get("model_type") in model_types(own):
        return value
    return _part(value, "encoder")


def _part(value: str | dict[str, Any] | None, name: str) -> Any:
    """A checkpoint's path as it is; keys and values as a transformers configuration."""
    if not isinstance(value, dict):
        return value
    settings_of_part = dict(value)
    kind = settings_of_part.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.{name}: model_type {kind!r} is not known to transformers; for example siglip_vision_model or gemma"
        )
    # A value of another type, such as "28" in quotes, or a number that overflows.
    return guarded(lambda: AutoConfig.for_model(kind, **settings_of_part), f"model.{name}", ConfigError)


def _publish_model(model: VLM, processor: Processor, target: Path, provenance: dict[str, Any]) -> None:
    """Write a complete model directory, with `training.json` beside the weights, in one step."""
    with checkpoint.publishing(target) as folder:
        save(model, processor, folder)
        (folder / "training.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def _provenance(stage: Stage) -> dict[str, Any]:
    record = read_record(stage.run.out)
    changed = accepted(stage.run.out)
    return {
        "stage": stage.config.name,
        "steps": stage.steps,
        "config": settings.to_dict(stage.run),
        "data_sha256": stage.data_digest,
        "examples": len(stage.examples),
        "libraries": record[-1]["libraries"] if record else {},
        **({"changes": changed} if changed else {}),
    }


def _check_precision(stage: Stage, decoder: PreTrainedConfig) -> None:
    if stage.precision == "fp16" and decoders.spec(decoder).overflows_float16 and not stage.run.force_fp16:
        raise ConfigError(
            f"stage {stage.config.name}: precision fp16 overflows in {decoder.model_type}; use bf16, or set"
            f" force_fp16: true"
        )
    if stage.precision == "fp16" and (stage.run.accelerator == "cpu" or not torch.cuda.is_available()):
        raise ConfigError(f"stage {stage.config.name}: precision fp16 needs a GPU; use bf16 or fp32")


def _finish(config: RunConfig, last: Path, final: Path, skipped: int, seconds: float) -> None:
    """`model/` (hard links to the last stage's files where the disk can), the loss curve and a summary."""
    with checkpoint.clean_failure(final), files.publishing(final) as folder:
        shutil.copytree(last, folder, copy_function=files.link_or_copy, dirs_exist_ok=True)
    metrics.plot(config.out / "metrics.csv", config.out / "loss.html")
    failed = failures.count(config.out)
    rows = metrics.read(config.out / "metrics.csv")
    stages = metrics.summary(rows)
    summary = {
        "model": str(final),
        "seconds": round(seconds, 1),
        "steps": len(rows),
        "stages": stages,
        "skipped_annotations": skipped,
        "failed_images": sum(failed.values()),
        "failed_images_in": failed,
    }
    files.write_json(config.out / "summary.json", summary)
    for name, found in stages.items():
        losses = ", ".join(f"{what.replace('_', '-')} {found[what]:.4f}" for what in found if what != "steps")
        log.info("stage %s: %d steps, %s", name, found["steps"], losses.replace("-loss", " loss"))
    log.info("trained model: %s (%.0f s)", final, seconds)


@contextmanager
def _global_random_state() -> Iterator[None]:
    """Training seeds the global generators before every micro-batch; the caller gets its own state back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
