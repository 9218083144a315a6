"""Formats that can be written: what is written, how it is opened again, and what both sides make of the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vlm.checkpoints.files import SINGLE
from vlm.exchange import paligemma, probes, theirs, tower_probes, towers
from vlm.exchange.samples import Outputs
from vlm.model.forward import VLM
from vlm.model.processor import Processor


@dataclass(frozen=True)
class Part:
    """What is written into one directory of an export.

    Attributes:
        name: of the directory below the one to make; empty for the only part.
        source: the model, or a tower alone.
        reader: its processor or image transform.
    """

    name: str
    source: Any
    reader: Any


@dataclass(frozen=True)
class Format:
    """A layout that can be written, and how to compare it.

    Attributes:
        parts: what is written; raises ConfigError for a model that the layout cannot hold.
        write: writes the files of one, returns name in the files -> the model's tensor.
        weights: name of a part's weights file.
        inputs, written_inputs: what both sides' processors make of the samples.
        open: opens what was written.
        run, run_written: what both sides' models make of the same inputs.
        reader: who opened it.
    """

    parts: Callable[[VLM, Processor], list[Part]]
    write: Callable[[Path, Any, Any, torch.dtype, str | int], dict[str, Tensor]]
    weights: Callable[[Any], str]
    inputs: Callable[[Any], Outputs]
    written_inputs: Callable[[Path], Outputs]
    open: Callable[..., Any]
    run: Callable[[Any, Any, torch.dtype], Outputs]
    run_written: Callable[[Any, Any, Any], Outputs]
    reader: Callable[[Any], str]


def _paligemma(model: VLM, processor: Processor) -> list[Part]:
    paligemma.check(model, processor)
    return [Part("", model, processor)]


def _open_paligemma(folder: Path, model: VLM, *, empty: bool = False) -> Any:
    return theirs.opened(folder, empty=True) if empty else theirs.opened(folder, theirs.backends(model.config))


def _open_tower(folder: Path, one: towers.Alone, *, empty: bool = False) -> Any:
    return towers.opened(folder, one, theirs.opened, theirs.tower_backend(one.tower), empty=empty)


def _library(one: towers.Alone) -> str:
    name = one.published.architecture
    return f"{name} of transformers {transformers.__version__}" if one.published.transformers else name


FORMATS = {
    "paligemma": Format(
        _paligemma,
        paligemma.write,
        lambda model: SINGLE,
        probes.paligemma_inputs,
        probes.written_paligemma_inputs,
        _open_paligemma,
        probes.run_paligemma,
        lambda written, model, processor: probes.run_written_paligemma(written, processor),
        lambda model: f"{paligemma.ARCHITECTURE} of transformers {transformers.__version__}",
    ),
    "tower": Format(
        lambda model, processor: [Part(one.name, one, one.image_transform) for one in towers.parts(model, processor)],
        towers.write,
        lambda one: one.published.weights,
        tower_probes.tower_inputs,
        tower_probes.written_tower_inputs,
        _open_tower,
        lambda one, transform, dtype: tower_probes.run_tower(one.tower, transform, dtype),
        lambda written, one, transform: tower_probes.run_written_tower(written, one.published.features, transform),
        _library,
    ),
}
