"""Train and eval mode of a module and of everything in it, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def in_mode(module: Any, *, training: bool = False) -> Iterator[None]:
    """Every module in eval mode (or in train mode); afterwards each has its own mode back.

    `module.train()` at the end would wake a frozen tower that is in eval mode among parts that train.
    """
    modes = [(one, one.training) for one in module.modules()]
    try:
        for one, _ in modes:
            one.training = training
        yield
    finally:
        for one, mode in modes:
            one.training = mode
