"""`key=value` filters on what is known of each entry: which rows a search may find.

- Different keys must all hold; of one key given several times, one value must.
- The text is compared with what the entry has: with a text exactly, case included; with a number by value (`3` is 3 and
  3.0); with true, false and null by these words. A list holds when one of its elements does.
- `a.b=1` looks into the object `a`, unless the entry has a key `a.b`.
- An entry without the key is not found. A key that no entry has is refused: it is mistyped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError, nearest
from vlm.words import listed

Where = Mapping[str, Sequence[str]]
"""Key -> the values of which one must hold."""


def parse(texts: Iterable[str]) -> dict[str, list[str]]:
    """Filters as they are typed, `key=value` each; the first `=` divides. Raises `ConfigError`: no `=`, or no key."""
    where: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"filter {text!r}: expected key=value, such as split=test")
        where.setdefault(key, []).append(value)
    return where


def allowed(info: Sequence[Mapping[str, Any]], where: Where) -> Tensor:
    """Which entries every filter holds for: bool[N].

    Raises:
        ConfigError: a key that no entry has; names the nearest.
    """
    held = torch.ones(len(info), dtype=torch.bool)
    for key, values in where.items():
        found = [tuple(_values(entry, key)) for entry in info]
        if info and not any(found):
            raise _unknown(key, info)
        held &= torch.tensor(
            [any(_equal(it, value) for it in has for value in values) for has in found], dtype=torch.bool
        )
    return held


def _values(entry: Mapping[str, Any], key: str) -> Iterator[Any]:
    """What an entry has under a key: nothing, one value, or the elements of its list. An empty list yields itself."""
    value: Any = entry
    for part in (key,) if key in entry else key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return
        value = value[part]
    if isinstance(value, list | tuple) and value:
        yield from value
    else:
        yield value


def _equal(value: Any, text: str) -> bool:
    if isinstance(value, str):
        return value == text
    if isinstance(value, bool) or value is None:
        return text == {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        try:
            number = int(text) if isinstance(value, int) and text.lstrip("+-").isdecimal() else float(text)
        except ValueError:
            return False
        return math.isfinite(number) and number == value
    return False


def _unknown(key: str, info: Sequence[Mapping[str, Any]]) -> ConfigError:
    known = sorted({name for entry in info for name in entry})
    has = f"they have {listed(known)}" if known else "they have no metadata; take the vectors of a JSONL file that has"
    return ConfigError(f"filter {key!r}: no entry has this key{nearest(key, known)}; {has}")
