"""`vlm.export`: a model in the layout that others read, proven equal by opening it again with transformers' classes.

The directory is written beside its final place and renamed when the comparison has passed: a killed or failed export
leaves nothing under the final name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
import transformers

from vlm.checkpoints.pairs import check_pair
from vlm.checkpoints.shards import widest
from vlm.errors import CheckpointError, ConfigError, nearest
from vlm.exchange import card, probes, towers
from vlm.exchange.formats import FORMATS, Format, Part
from vlm.exchange.parity import LIMITS, Parity, ParityReport, compare, compare_files
from vlm.exchange.publishing import published
from vlm.exchange.samples import SAMPLES
from vlm.images.transforms import ImageTransform
from vlm.model import decoder
from vlm.model.dtypes import DTYPES, check_dtype, dtype_name, named
from vlm.model.forward import VLM
from vlm.model.processor import Processor
from vlm.settings import parse_size

log = logging.getLogger(__name__)


def export(
    model: VLM,
    processor: Processor,
    out: str | Path,
    *,
    to: str = "paligemma",
    source: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    parity: Parity = "full",
) -> ParityReport:
    """Write a model for transformers, vLLM and lmms-eval, and prove that what was written is the model.

    Args:
        out: the directory to make; it must not exist, or be empty.
        to: `paligemma`, the layout of PaliGemma checkpoints on the Hub, or `tower`, the vision tower alone in its own
            library's format (a fused one: each member in a directory of its own).
        source: where the model came from (directory or hub id), for the model card.
        dtype: `float32` or `bfloat16`; None keeps the model's.
        max_shard_size: of a safetensors file, such as `5GB`.
        parity: `full` runs the model and the written checkpoint in float32 on the same images and prompts; it takes one
            float32 copy of the model beside the model given. `weights` only reads the tensors back and compares bits.
            `none` compares nothing.

    Returns:
        the report, also saved as `parity.json`.

    Raises:
        ConfigError: the format cannot hold this model, or a setting is wrong.
        CheckpointError: `out` exists, model and processor do not belong together, the disk is full, or the written
            checkpoint is not equal; nothing is left behind.
        GenerationError: the weights are float16, in which Gemma overflows.
    """
    target = _format(to)
    if parity not in get_args(Parity):
        raise ConfigError(
            f"unknown parity {parity!r}{nearest(str(parity), get_args(Parity))}; known: full, weights, none"
        )
    stored = _dtype(model, dtype)
    parse_size(max_shard_size)
    probes.check_in_memory(model)
    check_pair("the model to export", model.config, processor)
    parts = target.parts(model, processor)
    report = ParityReport(to, str(out), "", dtype_name(stored))
    with published(Path(out)) as folder:
        for part in parts:
            _write_part(report, target, folder / part.name, part, Writing(stored, max_shard_size, parity))
        _notes(report, model, parts, parity)
        report.write(folder)
        card.write(folder, model, processor, report, _origin(model, source))
    return report


@dataclass(frozen=True)
class Writing:
    """How an export is written and proven, as `export` takes it."""

    dtype: torch.dtype
    max_shard_size: str | int
    parity: Parity


def _write_part(report: ParityReport, target: Format, folder: Path, part: Part, how: Writing) -> None:
    """Write one part of an export (the only one, or a member of a fused tower) and compare it."""
    folder.mkdir(exist_ok=True)
    tensors = target.write(folder, part.source, part.reader, how.dtype, how.max_shard_size)
    found = ParityReport(report.to, report.out, "", report.dtype)
    if how.parity != "none":
        found.rows.append(compare_files(folder, tensors, how.dtype, target.weights(part.source)))
        found.require()
    del tensors
    if how.parity == "weights":
        target.open(folder, part.source, empty=True)
    if how.parity != "none":
        _compare_inputs(found, target, folder, part)
    if how.parity == "full":
        with _memory(folder):
            _compare_models(found, target, folder, part, how.dtype)
    found.require()
    report.rows += [replace(row, name=f"{part.name}: {row.name}") for row in found.rows] if part.name else found.rows
    report.notes += found.notes
    report.samples, report.texts = found.samples, found.texts
    report.reader = ", ".join(dict.fromkeys(word for word in (report.reader, found.reader) if word))


def _format(to: str) -> Format:
    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}{nearest(to, FORMATS)}; known: {', '.join(FORMATS)}")
    return FORMATS[to]


def _dtype(model: VLM, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype to write: the one asked for, or the narrowest that holds all parts (readers know one for all)."""
    if dtype is None:
        chosen = widest(parameter.dtype for parameter in model.parameters())
    else:
        chosen = named(dtype)
    if chosen not in DTYPES.values():
        raise ConfigError(f"the weights are {dtype_name(chosen)}, which is not written; use dtype='bfloat16'")
    check_dtype(model.config, chosen)
    return chosen


def _compare_inputs(report: ParityReport, target: Format, folder: Path, part: Part) -> None:
    """What both processors make of the samples."""
    ours = target.inputs(part.reader)
    with _their_failure(folder):
        theirs = target.written_inputs(folder)
    exact = inexact_transform(part.reader) is None
    limits = {**LIMITS, "pixels": LIMITS["pixels"] if exact else None}
    report.rows += [compare(name, ours[name], theirs[name], limits[name]) for name in ours if name in theirs]
    report.reader = target.reader(part.source)
    prompts = [f", {prompt!r}" if report.to == "paligemma" else "" for prompt, _, _ in SAMPLES]
    sizes = [f"{width}x{height} px" for _, _, (width, height) in SAMPLES]
    report.samples = [size + prompt for size, prompt in zip(sizes, prompts, strict=True)]


def _compare_models(report: ParityReport, target: Format, folder: Path, part: Part, dtype: torch.dtype) -> None:
    """What both models make of the same inputs: the source first, so that its copy is gone before the other is open."""
    log.info("parity: running the model on %d samples in float32", len(SAMPLES))
    ours = target.run(part.source, part.reader, dtype)
    log.info("parity: running what was written, opened by %s", target.reader(part.source))
    with _their_failure(folder):
        written = target.open(folder, part.source).to(part.source.device)
        theirs = target.run_written(written, part.source, part.reader)
    report.rows += [compare(name, ours[name], theirs[name], LIMITS[name]) for name in LIMITS if name in theirs]
    report.texts = [part.reader.decode(ids.flatten()) for ids in theirs.get("greedy tokens", [])]
    if set(ours) - set(theirs):
        report.notes.append(
            f"transformers {transformers.__version__} does not apply PaliGemma 2's final soft-cap (5.23 does); greedy"
            f" tokens are the same without it, sampled ones are not"
        )


@contextmanager
def _memory(folder: Path) -> Iterator[None]:
    """Too little memory for the comparison becomes a CheckpointError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CheckpointError(
            f"{folder}: not enough memory to run a float32 copy of the model; use --parity weights, which compares the"
            f" files without running them, or another --device"
        ) from error


@contextmanager
def _their_failure(folder: Path) -> Iterator[None]:
    """What transformers refuses of the written directory becomes a CheckpointError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: its library cannot run what was written (transformers {transformers.__version__}):"
            f" {text[:300]}; nothing was left there. This is a bug of the export: report it"
        ) from error


def inexact_transform(reader: Processor | ImageTransform) -> str | None:
    """What of the image transform transformers' image processors do differently, or None."""
    transform = reader.image_transform if isinstance(reader, Processor) else reader
    if transform.any_aspect:
        return "NaFlex images are resized in float here, as in the original; transformers rounds them to 8 bit"
    if transform.crops and not isinstance(reader, Processor):
        return (
            "the middle is cut out here, before or after the resize, whichever is cheaper; transformers cuts it after"
        )
    if not transform.squashes:
        return f"images are prepared by {transform.mode!r} here; transformers squashes them to a square"
    if not transform.antialias:
        return "images are shrunk without antialias here; transformers always antialiases"
    if transform.rounding != "nearest":
        return f"resized values are rounded {transform.rounding!r} here; transformers rounds to nearest"
    return None


def _notes(report: ParityReport, model: VLM, parts: list[Part], parity: Parity) -> None:
    """What a reader of the numbers has to know."""
    if parity == "full":
        report.notes.append("both models ran in float32 on the written weights and on the same inputs")
    else:
        report.notes.append(f"the checkpoint was not run (parity={parity})")
    for part in parts:
        difference = inexact_transform(part.reader)
        if difference is not None:
            start = f"{part.name}: " if part.name else ""
            label = f"{start}pixels"
            measured = next((row.max_abs for row in report.rows if row.name == label), None)
            crops = isinstance(part.reader, ImageTransform) and part.reader.crops
            if report.to == "tower" and crops and not measured:
                continue  # the same numbers, or another library's crop
            shown = "" if measured is None else f"; largest difference of a normalised value: {measured:.2g}"
            report.notes.append(
                f"{start}the format cannot say how this model's images are resized: {difference}{shown}"
            )
    if report.to == "tower":
        report.notes += towers.notes([part.source for part in parts])
    if report.to != "paligemma" or parity != "full":
        return
    facts = decoder.facts(model.config.text_config)
    cap = facts.final_softcap
    if cap is not None:
        in_use = model.config.softcap_in_generation
        written = "" if in_use else "; this model generates without it, so it is written as null"
        report.notes.append(f"`logits` and `loss` are without the final soft-cap of {cap:g} on both sides{written}")
    if facts.attention_softcap is not None:
        report.notes.append("attention ran eagerly on both sides: sdpa has no soft-cap")


def _origin(model: VLM, source: str | Path | None) -> str:
    """Directory or hub id the model was opened from, or an empty string."""
    return str(source or model.config.name_or_path or "")
