"""Options of the commands, from the dataclasses that they fill: name, type, default and help stand once, in the field.

    @dataclass(frozen=True, kw_only=True)
    class Info:
        model: str = option("model directory or hub id", place=True, metavar="MODEL")
        json: bool = option("print JSON", default=False)

A field whose type is a dataclass of its own stands for all its fields, under a heading of their own: what several
commands share (`Opening`, `Reading`, `Decoding`) is written once too. A field without a help text is no option.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from vlm import children
from vlm.errors import ConfigError, nearest
from vlm.generation.decoding import Decoding
from vlm.settings import option

T = TypeVar("T")
DUAL_MODEL = "demo-siglip"
"""What commands of two towers open unless told otherwise: the package's own, of drawn scenes (a name of
`vlm.checkpoints.places.SHIPPED`, which is not imported for `--help`)."""
GROUPS = {
    "build": "build, bring in, hand out",
    "train": "train and compare",
    "use": "use a model",
    "judge": "judge a model",
    "other": "other",
}
"""Groups of commands and the headings under which `vlm --help` lists them."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: one file in `vlm/cli/commands`, which defines it as `COMMAND`.

    Attributes:
        name: as it is typed; two words are a command below another one.
        help: what it does, in a few words.
        options: the dataclass that its options fill.
        run: called with it; returns the exit code.
        details: what else its help says.
        group: one of `GROUPS`.
        whole: `run` is also given every command, name -> (command, its parser).
    """

    name: str
    help: str
    options: type
    run: Callable[..., int]
    details: str = ""
    group: str = "other"
    whole: bool = False


class Parser(ArgumentParser):
    """argparse without guessing: an abbreviated option would change its meaning when another one is added."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def actions(self) -> list[Action]:
        """Everything that it can be given."""
        return list(self._actions)

    @property
    def option_names(self) -> list[str]:
        """`--data`, `-d` and so on."""
        return list(self._option_string_actions)

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """End with the mistyped options and the nearest known ones; argparse would first name what is missing.

        `-model m` too, which argparse reads as `-m odel` and one more `m`. A word with a blank is no option there.
        """
        given = [word for word in (words[: words.index("--")] if "--" in words else words) if " " not in word]
        names = [word.partition("=")[0] for word in given]
        unknown = [name for name in names if name.startswith("--") and name not in self.option_names]
        known = self.option_names
        unknown += [name for name in names if name.startswith("-") and name not in known and f"-{name}" in known]
        if unknown:
            long = [name for name in self.option_names if name.startswith("--")]
            texts = (name + nearest(name, long) for name in dict.fromkeys(unknown))
            self.error("unrecognized arguments: " + ", ".join(texts))

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\nSee `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(children.REFUSED)


# --- from fields to options -------------------------------------------------------------------------------------------


def add_options(parser: ArgumentParser, cls: type) -> None:
    """Give a parser the options of a dataclass, those of a dataclass inside it under a heading of their own.

    Raises:
        TypeError: two fields have the same name, or a type that no option can have.
    """
    names = [field.name for _, field, _ in _fields(cls)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise TypeError(f"{cls.__name__}: options that stand twice: {', '.join(sorted(twice))}")
    groups: dict[str, Any] = {"": parser}
    for heading, field, hint in _fields(cls):
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        either = _about(field)["either"]
        home = groups[heading]
        if either:
            if either not in groups:
                groups[either] = home.add_mutually_exclusive_group(required=either.endswith("!"))
            home = groups[either]
        _add(home, field, hint)


def filled(cls: type[T], given: Namespace) -> T:
    """The dataclass with what was given. Raises `ConfigError` where its own rules refuse it."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = filled(hints[field.name], given)
        elif hasattr(given, field.name):
            values[field.name] = getattr(given, field.name)
    return cls(**values)


def _fields(cls: type, heading: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(heading, field, type) of every option; the heading of a dataclass is the first line of its docstring."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _fields(hint, (hint.__doc__ or hint.__name__).splitlines()[0].rstrip("."))
        elif "help" in field.metadata:
            yield heading, field, hint


def _add(home: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    about = _about(field)
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    settings: dict[str, Any] = {"help": _help(field, required).replace("%", "%%")}
    if about["prints"] is not None:
        home.add_argument(
            _flag(field), *about["flags"], action=_Prints, nargs=0, prints=about["prints"], default=SUPPRESS, **settings
        )
        return
    if hint is bool:
        home.add_argument(
            _flag(field), *about["flags"], dest=field.name, action="store_true", default=SUPPRESS, **settings
        )
        return
    item, many = _item(hint)
    choices = typing.get_args(item) if typing.get_origin(item) is Literal else None
    if choices is not None and about["parse"] is None:
        settings["choices"] = choices
        settings["type"] = type(choices[0])
    else:
        settings["type"] = about["parse"] or (at_least(about["least"]) if item is int else item)
    if about["metavar"]:
        settings["metavar"] = about["metavar"]
    if about["place"]:
        # Where it may be left out, the field's own default is taken: argparse must not put None there.
        nargs = ("+" if required else "*") if many else None if required else "?"
        home.add_argument(field.name, nargs=nargs, **({} if required else {"default": SUPPRESS}), **settings)
        return
    if about["single"]:
        settings["action"] = "append"
    elif many:
        settings.update(nargs="+", **({"action": "extend"} if about["repeats"] else {}))
    home.add_argument(
        _flag(field),
        *about["flags"],
        dest=field.name,
        required=required and not about["either"],
        default=SUPPRESS,
        **settings,
    )


def _about(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """What `vlm.settings.option` records; a field elsewhere may say only its help."""
    return {
        **dict.fromkeys(("metavar", "least", "shown", "place", "parse", "prints", "repeats", "single")),
        "flags": (),
        "either": "",
        **field.metadata,
    }


def _flag(field: dataclasses.Field[Any]) -> str:
    return f"--{field.name.rstrip('_').replace('_', '-')}"


def _item(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = [one for one in typing.get_args(hint) if one is not type(None)][:1]
    if typing.get_origin(hint) in (list, tuple):
        return typing.get_args(hint)[0], True
    return hint, False


def _help(field: dataclasses.Field[Any], required: bool) -> str:
    """The help text with the default at its end."""
    about = _about(field)
    shown = about["shown"]
    if shown is None:
        value = None if required else field.default
        shown = "" if value in (None, ()) or value is False or value is dataclasses.MISSING else str(value)
    return f"{about['help']} ({shown})" if shown else about["help"]


def version_option(parser: ArgumentParser) -> None:
    """`--version`, as everywhere: one line. The version is read only when it is asked for."""

    def version() -> str:
        from vlm.version import __version__

        return f"vlm {__version__}"

    parser.add_argument(
        "--version", action=_Prints, nargs=0, prints=version, help="print the version and stop (vlm version: of all)"
    )


def chosen_of(cls: type, *names: str, unset: bool = False) -> type:
    """A dataclass with some of the options of another one, and a heading of its own.

    Args:
        unset: whoever was not given one has None: another place says what it is then.
    """
    own = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    made: list[tuple[str, Any, Any]] = []
    for name in names:
        about = {**own[name].metadata, **({"shown": own[name].metadata.get("shown") or ""} if unset else {})}
        hint = hints[name] | None if unset else hints[name]
        made.append((name, hint, dataclasses.field(default=None if unset else own[name].default, metadata=about)))
    result = dataclasses.make_dataclass(cls.__name__, made, frozen=True, kw_only=True)
    result.__doc__ = cls.__doc__
    return result


class _Prints(Action):
    """Like --help: needs none of the options that are required otherwise."""

    def __init__(self, *words: Any, prints: Callable[[], str], **settings: Any) -> None:
        super().__init__(*words, **{**settings, "default": SUPPRESS})
        self._prints = prints

    def __call__(self, *_: Any) -> None:
        with children.endings():
            print(self._prints())
        raise SystemExit(0)


# --- types of values --------------------------------------------------------------------------------------------------


def at_least(lowest: int | None) -> Callable[[str], int]:
    """A whole number, not below `lowest`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if lowest is not None and value < lowest:
            raise ArgumentTypeError(f"expected at least {lowest}, got {value}")
        return value

    return number


def sizes(text: str) -> int | list[int]:
    """`448`, or `448,512` for the members of a fused tower."""
    found = [at_least(1)(part) for part in text.split(",")]
    return found[0] if len(found) == 1 else found


def names(text: str) -> list[str]:
    """`a,b` as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


# --- what several commands share --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Of every command"""

    encoder_class: str | None = option(
        "an encoder of your own that the model needs, as mylab.towers:MyTower", default=None, metavar="M:C"
    )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is asked"""

    strip_control: bool = option(
        "remove <image>, <bos>, [INST] and their kind from prompts: text to the model, and told otherwise",
        default=False,
    )


Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how the model runs"""

    device: Device = option("where the model runs; auto: a GPU if there is one", default="auto", shown="")
    dtype: Dtype = option("number format; auto: the checkpoint's", default="auto", shown="")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the model reads its images"""

    image_size: Any = option(
        "another image size than the model's, in pixels: its positions are resampled (A,B for a fused tower)",
        default=None,
        metavar="N",
        parse=sizes,
    )
    max_num_patches: int | None = option(
        "another patch budget than the NaFlex model's", default=None, metavar="N", least=1
    )

    def geometry(self) -> dict[str, Any]:
        """As `vlm.checkpoints.geometry.with_geometry` takes it."""
        image = {} if self.max_num_patches is None else {"max_num_patches": self.max_num_patches}
        given = {"image_size": self.image_size, "image": image}
        return {name: value for name, value in given.items() if value}


def check_beams(num_beams: int | None, beam_search: str | None) -> None:
    """Raise ConfigError for a rule of beams without beams."""
    if beam_search == "big_vision" and (num_beams or 1) == 1:
        raise ConfigError("--beam-search big_vision with one beam, which is greedy; add --num-beams N or leave it out")


_Writing: Any = chosen_of(Decoding, "max_new_tokens", "num_beams", "beam_search")


class Writing(_Writing):
    """How answers are written"""

    def decoding(self) -> Decoding:
        """As the engine takes it. Raises `ConfigError` for a rule of beams without beams."""
        check_beams(self.num_beams, self.beam_search)
        return Decoding(**dataclasses.asdict(self))


def opening(place: Place, reading: Reading) -> Any:
    """How the model is opened, as `vlm.checkpoints.opening` says. Raises `ConfigError` for a GPU that is not there."""
    from vlm.checkpoints.opening import Opening

    check_device(place.device)
    return Opening(device=unless_auto(place.device), dtype=unless_auto(place.dtype), geometry=reading.geometry())


def unless_auto(choice: str) -> str | None:
    return None if choice == "auto" else choice


def check_device(device: str) -> None:
    """Raise ConfigError where a GPU is asked for and there is none."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")


def chosen_device(device: str) -> str:
    """`auto` is a GPU if there is one. Raises ConfigError as `check_device`."""
    import torch

    check_device(device)
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
