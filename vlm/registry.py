"""From a kind to the file that defines it: the files of a room are its kinds, and a room shows its names lazily.

A kind is looked up among the files of a room by its exact name, never imported from a path, so a downloaded
configuration cannot choose code to run.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vlm.errors import ConfigError, nearest

OWN: dict[str, dict[str, Any]] = {"vlm.encoders": {}}
"""Rooms that take parts of the user's own: name `MODULE:CLASS` -> part, put here by `use` and by nothing else."""


def kinds(room: str) -> list[str]:
    """Names of the parts in a room such as `vlm.encoders`: one file each, the file name is the kind. `contract` says
    what a file defines, and files that start with `_` are shared by them."""
    path = importlib.import_module(room).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(path))
    return [name for name in names if name != "contract" and not name.startswith("_")]


def part(room: str, kind: str) -> Any:
    """Import the file of a part by its exact kind.

    Raises:
        ConfigError: there is no such kind; the message lists the known ones.
    """
    own, what = OWN.get(room), room.rsplit(".", 1)[-1].rstrip("s")
    if own is not None and kind in own:
        return own[kind]
    if own is not None and ":" in kind:
        raise ConfigError(
            f"the {what} {kind!r} is code outside this library, which no configuration can load: if you trust it, call"
            f" {room}.use({kind!r}) first, or give `--{what}-class {kind}` on the command line"
        )
    known = kinds(room)
    if kind not in known:
        raise ConfigError(f"unknown {what} {kind!r}{nearest(kind, known)}; known: {', '.join(known)}")
    return importlib.import_module(f"{room}.{kind}")


def parts(room: str) -> dict[str, Any]:
    """Import the file of every kind of a room, by kind; the folder is looked through once."""
    return {kind: importlib.import_module(f"{room}.{kind}") for kind in kinds(room)}


def use(room: str, name: str) -> Any:
    """Make a part of one's own known in this process.

    Only a call imports it: a name in a downloaded configuration never does.

    Args:
        room: one that takes such parts, such as `vlm.encoders`.
        name: `MODULE:CLASS`, such as `mylab.towers:MyTower`. The module declares `SPEC` as the room's `contract` says;
            the class stands in the place of the one that is named there.

    Returns:
        What stands for the part's file: its `SPEC`.

    Raises:
        ConfigError: it cannot be imported, or declares no `SPEC` of this room.
    """
    what = room.rsplit(".", 1)[-1].rstrip("s")
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ConfigError(f"{what} {name!r}: expected MODULE:CLASS, such as mylab.towers:MyTower")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{what} {name!r} cannot be imported ({error}); install it, or set PYTHONPATH") from error
    found = vars(module)
    missing = [entry for entry in ("SPEC", class_name) if entry not in found]
    if missing:
        raise ConfigError(f"{what} {name!r}: {module_name} has no {', '.join(missing)}; see docs/{what}s.md")
    contract = importlib.import_module(f"{room}.contract")
    if not isinstance(found["SPEC"], contract.Spec):
        raise ConfigError(
            f"{what} {name!r}: SPEC of {module_name} is a {type(found['SPEC']).__name__}, expected a {room}.Spec; see"
            f" docs/{what}s.md"
        )
    OWN[room][name] = SimpleNamespace(SPEC=replace(found["SPEC"], **{what: found[class_name]}))
    return OWN[room][name]


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
