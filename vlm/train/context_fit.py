"""What of a run's data fits its models: length against context in every stage, before the first one begins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints.geometry_plan import planned
from vlm.checkpoints.preprocessing import own_transform
from vlm.data.examples import Example
from vlm.data.problems import Problem
from vlm.errors import ConfigError
from vlm.model import decoder as decoders
from vlm.model.config import VLMConfig
from vlm.model.lengths import Room, context_of, refuse, too_long
from vlm.model.processor import Processor
from vlm.train.batches import with_budget
from vlm.train.config import DataConfig, RunConfig
from vlm.train.plan import Sources, Stage
from vlm.train.sources import data_digest, tell_skipped
from vlm.train.stage_config import StageConfig


@dataclass(frozen=True)
class Rooms:
    """What a sample may take in a stage: when it trains, and (with the model's own patch budget) otherwise."""

    training: Room
    own: Room


def fitting(
    sources: Sources, jobs: Mapping[str, Any], rooms: Sequence[Rooms], *, skip_bad: bool
) -> tuple[Sources, dict[str, Any], int]:
    """The data, and what is evaluated, without what is too long for the model in one of the stages; how much that was.

    Raises `DataError` that lists it with file and line, where it may not be left out.

    Args:
        jobs: name -> `vlm.eval.job.Job`.
    """
    own = [stage.own for stage in rooms]
    examples = _over(sources.examples, [stage.training for stage in rooms], targets)
    val = _over(sources.val, own, targets)
    answering = [replace(room, max_text_length=None) for room in own]
    asked = {name: _over(job.examples, answering, job.candidates or (lambda example: ())) for name, job in jobs.items()}
    found = [problem for part in (examples, val, *asked.values()) for problem in part.values()]
    if not found:
        return sources, dict(jobs), 0
    counts, start = [], 0
    for count in sources.counts:
        counts.append(count - sum(start <= index < start + count for index in examples))
        start += count
    left = [*counts, *(len(job.examples) - len(asked[name]) for name, job in jobs.items())]
    if not skip_bad or 0 in left:
        refuse(found)
    tell_skipped(found)
    kept = _without(sources.examples, examples)
    sources = Sources(kept, tuple(counts), _without(sources.val, val), data_digest(kept))
    return (
        sources,
        {name: replace(job, examples=_without(job.examples, asked[name])) for name, job in jobs.items()},
        len(found),
    )


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


def rooms_of(config: RunConfig, start: Path) -> list[Rooms]:
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
        rooms.append(Rooms(room_of(stage, config.data, now, model), own))
    return rooms


def room_of(stage: StageConfig, data: DataConfig, processor: Processor, model: VLMConfig) -> Room:
    """What a training example may take in a stage: with the largest patch budget, where it draws one."""
    if data.budgets():
        processor = with_budget(processor, max(data.budgets()))
    return Room(processor=processor, context=context_of(model), max_text_length=stage.max_text_length)


def check_lengths(examples: Sequence[Example], room: Room) -> int:
    """Check that every example fits; returns how many suffixes will be cut to `max_text_length`.

    Raises `DataError` listing the examples that do not fit. Text can have no more tokens than bytes, so only long texts
    are tokenised.
    """
    refuse(list(too_long(examples, room, targets).values()))
    if room.max_text_length is None:
        return 0
    cut = 0
    for example in examples:
        suffix = example.suffix or ""
        if len(example.prefix.encode()) + len(suffix.encode()) + 3 > room.max_text_length:
            batch = room.processor(
                None, [example.prefix], [suffix], ids=[example.id], max_text_length=room.max_text_length
            )
            cut += bool(batch.truncated)
    return cut


def targets(example: Example) -> list[str]:
    """What follows the prompt in training."""
    return [] if example.suffix is None else [example.suffix]


def check_precision(stage: Stage, decoder: PreTrainedConfig) -> None:
    """Refuse fp16 where it overflows or cannot be."""
    if stage.precision == "fp16" and decoders.spec(decoder).overflows_float16 and not stage.run.force_fp16:
        raise ConfigError(
            f"stage {stage.config.name}: precision fp16 overflows in {decoder.model_type}; use bf16, or set"
            f" force_fp16: true"
        )
    if stage.precision == "fp16" and (stage.run.accelerator == "cpu" or not torch.cuda.is_available()):
        raise ConfigError(f"stage {stage.config.name}: precision fp16 needs a GPU; use bf16 or fp32")
