"""Loaders: one file per official format, with a function `read(source) -> Iterator[Item]`.

The name of the file is the name of the format; a new format is a new file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules

from vlm.data.source import Item, Source
from vlm.errors import ConfigError, nearest

Loader = Callable[[Source], Iterator[Item]]


def formats() -> list[str]:
    """Every format that can be read."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def get(name: str) -> Loader:
    """The loader of exactly this format. Raises ConfigError that names the nearest."""
    known = formats()
    if name not in known:
        raise ConfigError(f"unknown format {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    read: Loader = import_module(f"{__name__}.{name}").read
    return read
