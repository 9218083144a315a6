"""From a kind to the file that defines it: the files of a room are its kinds, and a room shows its names lazily.

A kind is looked up among the files of a room by its exact name, never imported from a path, so a downloaded
configuration cannot choose code to run.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vlm.errors import ConfigError, nearest


def kinds(package: str) -> list[str]:
    """Names of the parts in a room such as `vlm.encoders`: one file each, the file name is the kind."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


OWN_ENCODERS: dict[str, Any] = {}
"""Encoders of the user's own by `MODULE:CLASS`, put here by `vlm.encoders.use` and by nothing else."""


def part(package: str, kind: str) -> Any:
    """Import the file of a part by its exact kind.

    Raises:
        ConfigError: there is no such kind; the message lists the known ones.
    """
    if package == "vlm.encoders" and kind in OWN_ENCODERS:
        return OWN_ENCODERS[kind]
    known = kinds(package)
    if package == "vlm.encoders" and ":" in kind:
        raise ConfigError(
            f"the encoder {kind!r} is code outside this library, which no configuration can load: if you trust it, call"
            f" vlm.encoders.use({kind!r}) first, or give `--encoder-class {kind}` on the command line"
        )
    if kind not in known:
        what = package.rsplit(".", 1)[-1].rstrip("s")
        raise ConfigError(f"unknown {what} {kind!r}{nearest(kind, known)}; known: {', '.join(known)}")
    return importlib.import_module(f"{package}.{kind}")


def door(room: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a room that shows names of its modules, each imported when it is first used.

    Args:
        room: the package, its `__name__`.
        homes: name -> the module that defines it, below the room, or from `vlm` on in another; "" where the name is a
            module of the room.

    Raises:
        ImportError: the room was found past the package, through one of the links at the root of the repository: a
            second copy of all that it holds.
    """
    if room.partition(".")[0] != "vlm":
        text = f"import vlm.{room}, not {room}: the link of that name only shows where the code is"
        raise ImportError(text, name=room)

    def resolve(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}; it has {', '.join(homes)}")
        home = homes[name] if homes[name].startswith("vlm.") else f"{room}.{homes[name] or name}"
        module = importlib.import_module(home)
        value = getattr(module, name) if homes[name] else module
        setattr(sys.modules[room], name, value)
        return value

    return resolve, lambda: sorted({*vars(sys.modules[room]), *homes})
