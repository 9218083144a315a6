"""Strict settings: a frozen dataclass from a mapping or a YAML file, and back.

    @dataclass(frozen=True, kw_only=True)
    class Optimizer:
        lr: float
        betas: tuple[float, float] = (0.9, 0.95)

    settings.load(Optimizer, "run.yaml", ["lr=3e-4"])

An unknown key, a missing key or a value of another type raises `ConfigError` with the dotted name of the place, so
nothing is ever ignored or converted in silence. Field types: dataclasses, `list[T]`, `tuple[T, ...]`, `tuple[A, B]`,
`dict[str, T]`, `A | B`, `Literal`, `bool`, `int`, `float`, `str`, `Path` and `Any`.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from vlm.errors import ConfigError, nearest

T = TypeVar("T")


def option(
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    least: int | None = None,
    shown: str | None = None,
    place: bool = False,
    either: str = "",
    parse: Any = None,
    prints: Any = None,
    repeats: bool = False,
    single: bool = False,
) -> Any:
    """A field of a dataclass that is also an option of the command line: its name, type, default and help stand once.

    Args:
        help: what it does; the default is added to it.
        flags: other spellings, such as `-m`; `--name` is always one.
        metavar: what stands for its value in a help text.
        least: the smallest whole number it may be.
        shown: what the help says of the default, where the value itself would say nothing; "" leaves it out.
        place: it is given by its place, without a name.
        either: one of several that exclude each other; those with the same word here. A `!` at the end: one is needed.
        parse: text -> value, where the type does not say it.
        repeats: given more than once, the values add up; otherwise the last ones count.
        single: of a list: one value each time it is given, so that a word behind it is not taken for another one.
        prints: a function whose text is printed, and nothing else is done, as with `--help`.
    """
    about = {name: value for name, value in locals().items() if name != "default"}
    return dataclasses.field(default=default, metadata=about)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SMALLEST_BARE = 10**6
"""A plain number below it is a unit that was forgotten (`5` for 5 GB), not a size in bytes."""


def parse_size(size: str | int) -> int:
    """Bytes of `5GB`, `300KB`, `2GiB` or a plain number of a million and more.

    Raises:
        ConfigError: not a positive size, or a small number without a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip(), re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1 or len(match[1]) > 20:
        raise ConfigError(f"{str(size)[:40]!r} is not a size; write it as 5GB or 500MB")
    if not match[2] and float(match[1]) < _SMALLEST_BARE:
        raise ConfigError(
            f"the size {str(size)!r} has no unit and would be {match[1]} bytes; write {match[1]}GB or {match[1]}MB"
        )
    return int(float(match[1]) * unit)


_SCALARS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "config") -> T:
    """An instance of the dataclass `cls` with the values of `mapping`; `where` begins every error.

    A nested mapping that leaves keys out keeps the values of that field's default. Raises `ConfigError`.
    """
    try:
        return _dataclass(cls, mapping, "", base=None)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The dataclass `cls` from the YAML file `path`, with dotted `overrides` (`stages.0.steps=3`) applied in order.

    Override values are YAML too: `a=3` is a number, `a=[1, 2]` a list, `a=null` nothing. Raises `ConfigError`.
    """
    tree = read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    return from_dict(cls, tree, where=str(path))


def by_field(call: str, given: Mapping[str, Any], *classes: type) -> list[dict[str, Any]]:
    """The keyword arguments of a call, in parts: for each dataclass those that are its fields.

    A name that several have goes to the first. So a function takes options by their names, and each of them, with its
    default, stands once: in its dataclass.

    Raises:
        TypeError: a name that none of them has.
    """
    homes: dict[str, int] = {}
    for place, cls in enumerate(classes):
        for field in dataclasses.fields(cls):
            homes.setdefault(field.name, place)
    parts: list[dict[str, Any]] = [{} for _ in classes]
    for name, value in given.items():
        if name not in homes:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{nearest(name, homes)}")
        parts[homes[name]][name] = value
    return parts


def to_dict(obj: Any) -> Any:
    """`obj` as plain dicts, lists and scalars, so that `from_dict(type(obj), to_dict(obj)) == obj`."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_dict(getattr(obj, field.name)) for field in dataclasses.fields(obj) if field.init}
    if isinstance(obj, Mapping):
        return {key: to_dict(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_dict(value) for value in obj]
    return str(obj) if isinstance(obj, Path) else obj


# --- reading YAML


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that the YAML file `path` holds ({} for an empty file). Raises `ConfigError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    tree = parse_yaml(text, where=str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, got {_kind(tree)}")
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """`text` as YAML, the traps of YAML 1.1 closed (see `_loader`). Raises `ConfigError` that begins with `where`."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())  # noqa: S506 - a SafeLoader subclass
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        # ValueError: an integer of thousands of digits; LookupError: `!!bool x`; RecursionError: thousands of brackets.
        raise ConfigError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from error


def _loader() -> Any:
    """PyYAML's safe loader, minus what surprises: `no` stays text, `1e-4` is a number, a repeated key is an error.

    PyYAML follows YAML 1.1: `on`, `yes`, `no` become booleans, `1e-4` becomes text, `12:30` becomes 750, and the last
    of two equal keys wins. Each of these can change a run in silence.
    """
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if key.value in seen and isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
                if isinstance(key, yaml.ScalarNode):
                    seen.add(key.value)
            return node

    kept = ("null", "merge")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rsplit(":", 1)[-1] in kept]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
    # The first resolver that matches wins, and these append.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Write the value of `a.b.0=value` into `tree`, making the mappings on the way that are not there yet."""
    name, equals, value = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected NAME=VALUE with a dotted name, for example train.steps=100")
    node: Any = tree
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth]) or "the top"
        slot = _slot(node, key, f"override {override!r}: {here}")
        if depth == len(keys) - 1:
            node[slot] = parse_yaml(value, where=f"override {override!r}")
        else:
            if isinstance(node, dict) and node.get(slot) is None:
                node[slot] = {}
            node = node[slot]


def _slot(node: Any, key: str, where: str) -> str | int:
    """`key` as it indexes `node`: text for a mapping, a number in range for a list."""
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise ConfigError(f"{where} is {_kind(node)} and has no {key!r} inside")
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(f"{where} is a list of {len(node)}; expected an index from 0 to {len(node) - 1}, got {key!r}")
    return int(key)


# --- checking values


def _at(where: str, text: str) -> str:
    """An error at the dotted name `where`; at the top there is no name."""
    return f"{where}: {text}" if where else text


def _dataclass(cls: type[T], mapping: Any, where: str, base: Any) -> T:
    """`mapping` as `cls`; keys it leaves out come from the instance `base`, if any, else from the class's defaults."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(_at(where, f"expected keys and values ({cls.__name__}), got {_kind(mapping)}"))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            near = nearest(str(key), fields)
            raise ConfigError(_at(where, f"unknown key {key!r}{near}; known: {', '.join(fields)}"))
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        default = getattr(base, name) if base is not None else _default(field)
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], f"{where}.{name}".lstrip("."), default)
        elif default is dataclasses.MISSING:
            raise ConfigError(_at(where, f"key {name!r} is missing; expected {_expected(hints[name])}"))
        else:
            values[name] = default
    try:
        return cls(**values)
    except ValueError as error:  # a rule of the class's own __post_init__
        raise ConfigError(_at(where, str(error))) from error


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _value(hint: Any, value: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    """`value` checked against the type `hint`; `default` is the field's, for nested dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, where, base=default if isinstance(default, hint) else None)
    if origin in (Union, types.UnionType):
        return _union(hint, value, where, default)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
    elif origin in (list, tuple, Sequence):
        return _sequence(hint, value, where)
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return {_value(args[0], key, where): _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    elif hint is Path:
        if isinstance(value, (str, Path)) and str(value):
            return Path(value)
    elif hint is float:
        # A whole number is a fine float; nan and inf are no setting.
        if type(value) is float and math.isfinite(value):
            return value
        if type(value) is int and abs(value) < 2**63:
            return float(value)
    elif hint in _SCALARS or hint is type(None):
        if type(value) is hint and (hint is not int or abs(value) < 2**63):
            return value
    else:
        raise TypeError(f"{where}: settings cannot read fields of type {hint}")
    raise ConfigError(f"{where}: expected {_expected(hint)}, got {_kind(value)}{_unquoted(hint, value)}")


def _unquoted(hint: Any, value: Any) -> str:
    """What to do about a number (or true, false) in quotes, which is text."""
    kinds = {hint, *typing.get_args(hint)}
    if not isinstance(value, str) or not kinds & {int, float, bool}:
        return ""
    try:
        plain = parse_yaml(value, where="")
    except ConfigError:
        return ""
    return f"; write {value} without quotes" if type(plain) in kinds or (float in kinds and type(plain) is int) else ""


def _sequence(hint: Any, value: Any, where: str) -> Any:
    """`value` as `list[T]`, `tuple[T, ...]` or the fixed `tuple[A, B]`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected {_expected(hint)}, got {_kind(value)}")
    kinds = list(args)
    if origin is not tuple or args[-1] is Ellipsis:
        kinds = [args[0]] * len(value)
    if len(kinds) != len(value):
        raise ConfigError(f"{where}: expected {len(kinds)} values, got {len(value)}: {list(value)!r}")
    items = [_value(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))]
    return items if origin is list else tuple(items)


def _union(hint: Any, value: Any, where: str, default: Any) -> Any:
    """`value` as the first member that takes it.

    A mapping or a list goes to the member of that shape, because that member's error is the useful one.
    """
    members = typing.get_args(hint)
    for shape, names in ((Mapping, (dict, Mapping)), ((list, tuple), (list, tuple, Sequence))):
        fitting = [
            m for m in members if typing.get_origin(m) in names or (shape is Mapping and dataclasses.is_dataclass(m))
        ]
        if isinstance(value, shape) and len(fitting) == 1:
            return _value(fitting[0], value, where, default)
    for member in members:
        try:
            return _value(member, value, where, default)
        except ConfigError:
            continue
    raise ConfigError(f"{where}: expected {_expected(hint)}, got {_kind(value)}{_unquoted(hint, value)}")


def _expected(hint: Any) -> str:
    """A type in words, for errors."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (list, tuple, Sequence):
        return f"a list ({', '.join('...' if arg is Ellipsis else _expected(arg) for arg in args)})"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "keys and values"
    if hint is type(None):
        return "null"
    return "a path" if hint is Path else _SCALARS.get(hint, str(hint))


def _kind(value: Any) -> str:
    """A value and its type in a few words, for errors."""
    if value is None:
        return "nothing (null)"
    names = {
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "keys and values",
    }
    if type(value) is int and abs(value) >= 2**63:
        return "a whole number of more than 64 bits"
    shown = repr(value)
    return f"{names.get(type(value), type(value).__name__)}: {shown if len(shown) <= 60 else shown[:57] + '...'}"
