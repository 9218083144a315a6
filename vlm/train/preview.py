"""What a run is about to do, checked and told before its first step: what can be refused then is not refused later."""

import logging
import statistics
from collections.abc import Iterator, Sequence

from vlm.data.augment import pipeline
from vlm.data.examples import Example
from vlm.data.order import StepSampler
from vlm.errors import TrainingError, VLMError
from vlm.images.load import image_size
from vlm.model.forward import VLM
from vlm.model.processor import Processor
from vlm.train.config import RunConfig
from vlm.train.history import begun
from vlm.train.lightning_setup import world_size
from vlm.train.plan import Stage
from vlm.train.schedule import warmup_steps
from vlm.words import aligned

log = logging.getLogger(__name__)

SAMPLE = 64
"""Examples whose tokens are counted for the estimate."""


def check(stages: Sequence[Stage]) -> None:
    """Check what needs no model: shares of a step, names of augmentations. Raises `ConfigError`."""
    for stage in stages:
        pipeline(stage.config.augment)
        config = stage.config
        StepSampler(0, stage.steps, config.batch_size, accumulate=config.accumulate, world=world_size(stage.run))


class Preview:
    """Tells once, before the first step of the first stage that is not finished, what all of them will do."""

    def __init__(self, stages: Sequence[Stage], main: bool) -> None:
        self._stages, self._main, self._told = stages, main, False

    def __call__(self, stage: Stage, model: VLM, processor: Processor) -> None:
        """Raises `TrainingError` for a stage in which nothing would train."""
        if self._told:
            return
        self._told = True
        left = self._stages[self._stages.index(stage) :]
        _check_parts(left, model)
        if self._main:
            for note in notes(stage.run, left):
                log.warning("%s", note)
            log.info("%s", overview(left, model, processor))


def _check_parts(stages: Sequence[Stage], model: VLM) -> None:
    """Later stages are looked at as long as the model keeps its parts."""
    parts = model.parts()
    for stage in stages:
        if stage.config.geometry():
            return
        lacking = [part for part in stage.objective.needs if part not in parts]
        if lacking:
            raise TrainingError(
                f"stage {stage.config.name}: objective {stage.config.objective} needs the {lacking[0]}, and the model"
                f" has {', '.join(parts)}; train this model towards another objective"
            )
        if not any(True for part in stage.config.train for _ in parts[part].parameters()):
            raise TrainingError(
                f"stage {stage.config.name}: no parameter would train ({', '.join(stage.config.train)} have none); "
                f"give another part a learning rate"
            )


def notes(run: RunConfig, stages: Sequence[Stage]) -> Iterator[str]:
    """Settings that do less than they seem to, in sentences."""
    for stage in stages:
        name, steps = stage.config.name, stage.steps
        warmup = warmup_steps(stage.config, steps)
        if warmup > steps:
            yield (
                f"stage {name}: warmup takes {warmup} steps and the stage has {steps}: the learning rates never reach"
                f" more than {steps / warmup:.0%} of what is set"
            )
        if stage.config.batch_size > stage.mixture.epoch_length:
            yield (
                f"stage {name}: batch_size {stage.config.batch_size} is more than an epoch has"
                f" ({stage.mixture.epoch_length} examples): one step shows some of them several times"
            )
    if all(stage.config.precision is not None for stage in stages) and run.precision != "fp32":
        yield f"precision {run.precision} has no effect: every stage has its own"
    if run.force_fp16 and not any(stage.precision == "fp16" for stage in stages):
        yield "force_fp16 has no effect: no stage trains in fp16"
    mixture = stages[0].mixture
    for source, count in zip(run.data.sources(), mixture.counts, strict=True):
        if count * source.repeat < 0.5:
            yield f"{source.path}: repeat {source.repeat:g} of {count} examples is less than one: 1 is seen per epoch"


def overview(stages: Sequence[Stage], model: VLM, processor: Processor) -> str:
    """A short table: per stage its steps, batch, epochs, tokens, and trainable parameters of each part."""
    run, first = stages[0].run, stages[0]
    parts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.parts().items()}
    done = begun(run.out, [stage.config.name for stage in stages])
    header = ("stage", "steps", "batch", "epochs", "tokens/example", "tokens", "trains")
    rows = [header]
    for stage in stages:
        config, tokens = stage.config, tokens_per_example(stage, processor)
        steps = f"{stage.steps:,}"
        if config.name in done:
            steps += f" ({done[config.name].step:,} done)"
        seen = stage.steps * config.batch_size
        trains = ", ".join(f"{part} {parts[part]:,}" for part in config.train)
        epochs = f"{seen / stage.mixture.epoch_length:.3g}"
        rows.append(
            (config.name, steps, f"{config.batch_size:,}", epochs, f"{tokens:.0f}", _short(seen * tokens), trains)
        )
    files = f"{len(first.mixture.counts)} files" if len(first.mixture.counts) > 1 else "1 file"
    held_out = f", {len(first.val):,} held out" if first.val else ""
    heading = f"{run.out}: {len(first.examples):,} training examples in {files}{held_out}"
    return "\n".join([heading, *aligned(rows, left=(0, len(header) - 1)), _when(run, stages)])


def _when(run: RunConfig, stages: Sequence[Stage]) -> str:
    """When things happen; that an interval is longer than every stage shows here."""
    longest = max(stage.steps for stage in stages)

    def every(what: str, steps: int | None) -> str:
        if steps is None or steps >= longest:
            why = "" if steps is None else f", because {what} is {steps:,}"
            return f"at the end of each stage{why}"
        return f"every {steps:,} steps and at the end of each stage"

    lines = [f"saved {every('checkpoint_every', run.checkpoint_every)}"]
    if run.data.val is not None:
        lines.append(f"validated {every('validate_every', run.validate_every)}")
    if run.evaluate is not None:
        lines.append(f"evaluated {every('evaluate_every', run.evaluate_every)}")
    return "; ".join(lines)


def tokens_per_example(stage: Stage, processor: Processor) -> float:
    """Tokens of an example, images and text, averaged over some that are spread over the data; headers are read."""
    spread = stage.examples[:: max(1, len(stage.examples) // SAMPLE)][:SAMPLE]
    counted = [tokens for example in spread if (tokens := _tokens(example, stage, processor)) is not None]
    return statistics.fmean(counted) if counted else 0.0


def _tokens(example: Example, stage: Stage, processor: Processor) -> int | None:
    try:
        (tokens,) = processor.lengths(
            [[image_size(image) for image in example.images]],
            [example.prefix],
            [example.suffix or ""],
            ids=[example.id],
            max_text_length=stage.config.max_text_length,
        )
    except VLMError:  # said by the checks of the data, or listed when the image is read
        return None
    return tokens


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
