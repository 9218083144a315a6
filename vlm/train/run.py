"""`run`: a whole training run. This module stays light: what must be refused is refused before torch is imported."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm import ranks
from vlm.train.config import RunConfig
from vlm.train.rundir import begun, open_run, trained
from vlm.train.signals import Stopped, StopSignal

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
    main = ranks.is_main()
    try:
        with (
            StopSignal() as stop,
            open_run(config, resume=resume, main=main, accept_changes=accept_changes) as directory,
            _log_to(config.out, main),
        ):
            from vlm.train.stages import run_stages

            ranks.end_with_launcher()
            with ranks.all_or_none("then start all of them again with --resume"):
                return run_stages(config, directory, main=main, skip_bad=skip_bad, stop=stop)
    except Stopped:
        if main:
            log.warning("stopped; %s", saved(config))
        raise


def saved(config: RunConfig) -> str:
    """What is on the disk of a run that has stopped, in words."""
    if not trained(config.out):
        return "no step was trained, and nothing is saved"
    stages = begun(config.out, [stage.name for stage in config.stages])
    if not stages:
        return "there is no checkpoint yet: it will begin again"
    name, state = list(stages.items())[-1]
    if state.finished:
        return f"stage {name} is finished: {config.out / name / 'model'}"
    return f"saved: {config.out / name / 'checkpoints' / f'step-{state.step:08d}'}"


@contextmanager
def _log_to(out: Path, main: bool) -> Iterator[None]:
    """Copy what the package logs to `train.log`, from INFO on; ranks above 0 log only errors."""
    level = log.level
    if not main:
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
        return
    handler = logging.FileHandler(out / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    if log.getEffectiveLevel() > logging.INFO:
        log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        # For the file only: whoever catches the exception tells the person.
        text = f"stopped: {type(error).__name__}: {error}"
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None))
        raise
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()
