"""`run`: all checks, or some, on one model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from vlm.check.checks import tower
from vlm.check.dual_subject import DualSubject, kept
from vlm.check.report import Finding, Report, Result, not_applicable
from vlm.check.subject import Check, Disk, Subject, attention_backends, preserved
from vlm.checkpoints.directory import load
from vlm.checkpoints.saving import save
from vlm.data.examples import Example
from vlm.data.reading import read
from vlm.errors import ConfigError, VLMError, nearest
from vlm.model.forward import VLM
from vlm.model.processor import Processor
from vlm.registry import parts

log = logging.getLogger(__name__)


def find(folder: str = "checks") -> tuple[Check, ...]:
    """The checks of every file of `vlm.check.checks` or `vlm.check.dual`, in the order of the table."""
    files = parts(f"vlm.check.{folder}").values()
    return tuple(
        sorted((check for file in files for check in file.CHECKS), key=lambda check: (check.order, check.name))
    )


CHECKS = find()
DUAL_CHECKS = find("dual")
"""Of an image tower with its text tower."""


def run(
    model: VLM,
    processor: Processor,
    *,
    data: str | Path | Sequence[Example] | None = None,
    stage_manifest: str | Path | None = None,
    only: Sequence[str] | None = None,
    path: str | Path | None = None,
    image_root: str | Path | None = None,
    max_text_length: int | None = None,
    export: Callable[..., Any],
) -> Report:
    """Check a model by its behaviour. Weights, mode, attention backend, dtype, device and random state stay as found.

    Args:
        data: training examples, or their JSONL file: their labels are checked.
        stage_manifest: STAGE/manifest.json of a training run; looked for around `path` by default.
        only: names of checks (`vlm.check.CHECKS`); all by default.
        path: where the model was loaded from.
        image_root: folder of the data's images, by default that of the file.
        max_text_length: as in training; longer suffixes are counted.
        export: `vlm.export`; `vlm.check.run` gives it.

    Raises:
        ConfigError: an unknown name in `only`.
        DataError: the data file cannot be used.
    """
    chosen = choose(only)
    examples = read(data, image_root=image_root)[0] if isinstance(data, str | Path) else data
    subject = Subject(
        model=model,
        processor=processor,
        data=examples,
        max_text_length=max_text_length,
        path=None if path is None else Path(path),
        stage_manifest=None if stage_manifest is None else Path(stage_manifest),
        disk=Disk(save, load, export),
    )
    tower_problem = cache(partial(tower.problem, subject))
    backends = ", ".join(dict.fromkeys(attention_backends(model).values()))
    return Report(
        model="" if path is None else str(path),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        attention=backends,
        results=tuple(_run_one(check, subject, partial(preserved, model), tower_problem) for check in chosen),
    )


def run_dual(
    model: Any, processor: Any, *, only: Sequence[str] | None = None, path: str | Path | None = None
) -> Report:
    """Check an image tower with its text tower. Weights, mode and random state stay as found.

    Args:
        model, processor: what `vlm.siglip.load` returns.
        only: names of checks (`vlm.check.DUAL_CHECKS`); all by default.
        path: where the model was loaded from.

    Raises:
        ConfigError: an unknown name in `only`, or a processor without a tokenizer.
    """
    chosen = choose(only, DUAL_CHECKS)
    if processor.tokenizer is None:
        raise ConfigError(
            f"{path or 'the model'}: no tokenizer, and most checks are of texts; open it with tokenizer=..."
        )
    subject = DualSubject(model, processor)
    return Report(
        model="" if path is None else str(path),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        attention=model.attention,
        results=tuple(_run_one(check, subject, partial(kept, model)) for check in chosen),
    )


def choose(only: Sequence[str] | None, known_checks: tuple[Check, ...] | None = None) -> tuple[Check, ...]:
    """The checks of these names, in the order of the table. Raises `ConfigError`: an unknown name (the message has the
    nearest one), or none at all."""
    checks = CHECKS if known_checks is None else known_checks
    if only is None:
        return checks
    known = [check.name for check in checks]
    if not only:
        raise ConfigError(f"no check is named; leave `only` out for all, or name some of {', '.join(known)}")
    for name in only:
        if name not in known:
            raise ConfigError(f"unknown check {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return tuple(check for check in checks if check.name in only)


def _run_one(
    check: Check,
    subject: Any,
    keep: Callable[[], AbstractContextManager[None]],
    tower_problem: Callable[[], str] = lambda: "",
) -> Result:
    log.info("%s: %s", check.name, check.title)
    began = time.monotonic()
    try:
        with keep():
            problem = tower_problem() if check.runs_tower else ""
            finding = Finding(problem=f"not run: {problem}") if problem else check.function(subject)
    except torch.OutOfMemoryError as error:
        finding = not_applicable(f"out of memory: {' '.join(str(error).split())[:200]}")
    except (VLMError, RuntimeError) as error:
        # The model refused an input that a healthy one takes (or torch did, on its behalf): that is a result.
        finding = Finding(problem=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Result.of(check.name, check.title, finding, time.monotonic() - began)
