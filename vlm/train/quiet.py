"""Lightning and transformers without banners, advertisements and warnings about what this package does on purpose."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Each says that something is off that we replace, or on that we want.
_EXPECTED = (
    ".*in eval mode at the start of training.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory.*",
    ".*GPU available but not used.*",
    ".*barrier\\(\\).*",
    ".*broadcast_buffers.*is deprecated.*",
    ".*LeafSpec.*is deprecated.*",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Only warnings and errors that a user can act on, while Lightning runs."""
    # The processor tells of every batch with a cut answer; how many there are was said before the stage.
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "vlm.model.processor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars for reading and writing weights."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
