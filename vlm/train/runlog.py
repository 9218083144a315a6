"""`train.log`, and what is said of a run that was stopped."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.train.config import RunConfig
from vlm.train.history import begun, trained

log = logging.getLogger("vlm")


@contextmanager
def log_to(out: Path, main: bool) -> Iterator[None]:
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
