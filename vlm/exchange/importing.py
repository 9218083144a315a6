"""`vlm import`: a published checkpoint as a model directory of this library, with the proof that it is the same model.

PaliGemma directories are compared with transformers' own class on the same images and prompts; big_vision files are
turned back into big_vision's arrays and compared with the file bit by bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vlm.checkpoints import big_vision, manifest, names
from vlm.checkpoints.big_vision_configs import EMBEDDING
from vlm.checkpoints.big_vision_names import to_array
from vlm.checkpoints.directory import load
from vlm.checkpoints.files import read_json
from vlm.checkpoints.places import locate
from vlm.checkpoints.saving import save
from vlm.checkpoints.source import FLOATS
from vlm.checkpoints.weights import Weights
from vlm.errors import CheckpointError, ConfigError
from vlm.exchange import probes
from vlm.exchange.parity import EQUAL, LIMITS, Parity, ParityReport, Row, compare
from vlm.exchange.publishing import published
from vlm.exchange.samples import SAMPLES
from vlm.exchange.theirs import opened
from vlm.model import decoder
from vlm.model.config import VLMConfig
from vlm.model.dtypes import dtype_name
from vlm.model.processor import Processor
from vlm.siglip import loading as siglip
from vlm.siglip.saving import write as write_towers

log = logging.getLogger(__name__)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    parity: Parity = "full",
    max_shard_size: str = "5GB",
    allow_nonfinite: bool = False,
    verify: manifest.Verify = "quick",
    revision: str | None = None,
) -> ParityReport:
    """Write a published checkpoint as a directory of this library.

    Args:
        source: a PaliGemma directory or hub id, or a big_vision `.npz` of PaliGemma. A big_vision `.npz` of SigLIP or
            SigLIP 2 becomes a transformers SigLIP directory, which `vlm.new` and `vlm.siglip.load` open.
        out: the directory to make; it must not exist, or be empty.
        tokenizer: the sentencepiece `.model` of a `.npz`; one of SigLIP is written without where it is not given.
        dtype: `float32` or `bfloat16`; None keeps the source's.
        parity: `full` runs the written model and the source in float32 and compares; `weights` compares the tensors;
            `none` compares nothing.
        max_shard_size, allow_nonfinite, verify, revision: as `vlm.save` and `vlm.load` take them.

    Returns:
        the report, also saved as `parity.json`.

    Raises:
        CheckpointError: the source cannot be opened, or what was written is not equal; nothing is left behind.
    """
    how = Conversion(tokenizer, dtype, parity, max_shard_size, allow_nonfinite, verify, revision)
    with published(Path(out)) as folder:
        convert_one = _from_npz if Path(source).suffix == ".npz" else _from_directory
        report = convert_one(source, folder, out, how)
        report.require()
        report.write(folder)
        manifest.write(folder)
    return report


@dataclass(frozen=True)
class Conversion:
    """How a source is opened, written and proven, as `convert` takes it."""

    tokenizer: str | Path | None
    dtype: str | None
    parity: Parity
    max_shard_size: str
    allow_nonfinite: bool
    verify: manifest.Verify
    revision: str | None


# --- directories ------------------------------------------------------------------------------------------------------


def _from_directory(source: str | Path, folder: Path, out: str | Path, how: Conversion) -> ParityReport:
    origin = locate(source, revision=how.revision)
    if _kind(origin) == VLMConfig.model_type and how.dtype is None:
        raise ConfigError(f"{source}: is a model directory already; use it as it is")
    model, processor = load(
        source,
        dtype=how.dtype,
        tokenizer=how.tokenizer,
        allow_nonfinite=how.allow_nonfinite,
        verify=how.verify,
        revision=how.revision,
    )
    save(model, processor, folder, max_shard_size=how.max_shard_size, allow_nonfinite=how.allow_nonfinite)
    stored = None if how.dtype is None else model.dtype
    del model
    return _compare_directory(origin, folder, out, stored, processor, how.parity)


def _compare_directory(
    source: Path, folder: Path, out: str | Path, dtype: torch.dtype | None, processor: Processor, parity: Parity
) -> ParityReport:
    """`dtype`: that all tensors were converted to; None where each kept its own."""
    report = ParityReport("vlm", str(out), "", dtype_names(Weights(folder)))
    if parity == "none":
        report.notes.append("nothing was compared (parity=none)")
        return report
    origin = Weights(source).source(str(source))
    kept = [name for name in origin.shapes if name != names.HEAD]
    report.rows.append(_compare_tensors(folder, kept, origin.read, dtype))
    unchanged = dtype is None or {FLOATS[origin.dtypes[name]] for name in kept} == {dtype}
    if parity == "full" and unchanged and _kind(source) == "paligemma":
        _compare_with_transformers(report, source, folder, processor)
    else:
        report.notes.append("the models were not run: only their tensors were compared")
    return report


def _kind(folder: Path) -> str:
    return str(read_json(folder / "config.json").get("model_type"))


def dtype_names(weights: Weights) -> str:
    """Such as `bfloat16`, or `bfloat16 and float32`."""
    found = {FLOATS[info.dtype] for info in weights.tensors.values()}
    return " and ".join(sorted(dtype_name(dtype) for dtype in found))


def _compare_tensors(folder: Path, names: list[str], read: Any, dtype: torch.dtype | None) -> Row:
    written = Weights(folder)
    different = len(set(names) ^ set(written.tensors))
    for name in names:
        wanted = read(name) if dtype is None else read(name).to(dtype)
        different += name in written.tensors and not _same(written.read(name), wanted)
    return Row(f"{len(names)} tensors on disk", float(different), None, str(EQUAL), different == 0)


def _same(one: Tensor, two: Tensor) -> bool:
    """Equal bits (NaN equals NaN)."""
    return one.shape == two.shape and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def _compare_with_transformers(report: ParityReport, source: Path, folder: Path, processor: Processor) -> None:
    """The written model here and the source in transformers, on the same inputs."""
    log.info("parity: running the imported model on %d samples in float32", len(SAMPLES))
    ours_model, _ = load(folder, dtype="float32")
    attention = {
        part: getattr(ours_model.config, part)._attn_implementation for part in ("vision_config", "text_config")
    }
    ours = {**probes.paligemma_inputs(processor), **probes.run_paligemma(ours_model, processor)}
    windowed = decoder.facts(ours_model.config.text_config).windowed
    del ours_model
    log.info("parity: running the source, opened by transformers")
    theirs_model = opened(source, attention)
    if not windowed:
        _without_window(theirs_model, report)
    theirs = {
        **probes.written_paligemma_inputs(source),
        **probes.run_written_paligemma(theirs_model, processor),
    }
    report.reader = f"{type(theirs_model).__name__} of transformers {transformers.__version__}"
    report.rows += [compare(name, ours[name], theirs[name], LIMITS[name]) for name in LIMITS if name in theirs]
    report.texts = [processor.decode(ids.flatten()) for ids in theirs["greedy tokens"]]
    report.notes.append("both models ran in float32; `logits` and `loss` are without a final soft-cap on both sides")


def _without_window(model: Any, report: ParityReport) -> None:
    """transformers' PaliGemma 2 without its sliding window, as the original and this library run it."""
    text = model.config.text_config
    if not decoder.facts(text).windowed:
        return
    decoder.spec(text).drop_window(text, model.model.language_model)
    report.notes.append(
        "transformers ran without Gemma 2's sliding window, which the original PaliGemma 2 does not have"
    )


# --- big_vision -------------------------------------------------------------------------------------------------------


def _from_npz(source: str | Path, folder: Path, out: str | Path, how: Conversion) -> ParityReport:
    with big_vision.open_npz(source) as arrays:
        two_towers = any(name.startswith("txt/") for name in arrays)
        if two_towers:
            towers, images = siglip.load(
                source, tokenizer=how.tokenizer, dtype=how.dtype, allow_nonfinite=how.allow_nonfinite
            )
            write_towers(towers, images, folder, max_shard_size=how.max_shard_size)
            parameters = dict(towers.model.state_dict())
        else:
            parameters = _write_paligemma(source, folder, how)
        stored = next(iter(parameters.values())).dtype
        report = ParityReport("siglip" if two_towers else "vlm", str(out), "", dtype_name(stored))
        if how.parity != "none":
            report.rows.append(_compare_arrays(arrays, parameters, two_towers=two_towers))
        report.notes.append("the parameters were turned back into big_vision's arrays and compared with the file")
    return report


def _write_paligemma(source: str | Path, folder: Path, how: Conversion) -> dict[str, Tensor]:
    """A model directory; returns what is in it."""
    model, processor = load(
        source, tokenizer=how.tokenizer, dtype=how.dtype, allow_nonfinite=how.allow_nonfinite, force_fp16=True
    )
    if torch.float16 in {parameter.dtype for parameter in model.parameters()}:
        raise CheckpointError(
            f"{source}: float16 weights; Gemma overflows in float16, import them as --dtype float32 or bfloat16"
        )
    save(model, processor, folder, max_shard_size=how.max_shard_size, allow_nonfinite=how.allow_nonfinite)
    return dict(model.state_dict())


def _compare_arrays(arrays: big_vision.Arrays, parameters: Mapping[str, Tensor], *, two_towers: bool) -> Row:
    """Count arrays that do not come back bit for bit (rounded, where the model has another dtype)."""
    different = 0
    for name, rebuilt in _rebuilt(arrays, parameters, two_towers):
        different += not _same(rebuilt, to_array(arrays[name]).to(rebuilt.dtype))
    return Row(f"{len(arrays)} arrays of big_vision", float(different), None, str(EQUAL), different == 0)


def _rebuilt(
    arrays: big_vision.Arrays, parameters: Mapping[str, Tensor], two_towers: bool
) -> Iterator[tuple[str, Tensor]]:
    shapes, _ = big_vision.headers(arrays, "arrays")
    # Rows that were added for <image> are not part of the file.
    cut = {**parameters}
    if EMBEDDING in shapes:
        cut[names.EMBEDDING] = parameters[names.EMBEDDING][: shapes[EMBEDDING][0]]
    yield from big_vision.rebuild(cut, shapes, two_towers=two_towers)
