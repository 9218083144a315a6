"""What the commands share: the parser, options that several commands have, and checks of option values."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vlm import children
from vlm.errors import nearest

Run = Callable[[Namespace], int]


class Parser(ArgumentParser):
    """argparse without guessing: an abbreviated option would change its meaning when another one is added."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

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
        unknown += [name for name in names if name.startswith("-") and f"-{name}" in self.option_names]
        if unknown:
            long = [name for name in self.option_names if name.startswith("--")]
            texts = (name + nearest(name, long) for name in dict.fromkeys(unknown))
            self.error("unrecognized arguments: " + ", ".join(texts))

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\nSee `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(children.REFUSED)


def command(commands: Any, run: Run, name: str, help: str, details: str = "") -> ArgumentParser:
    parser: Parser = commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}. {details}".rstrip()
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "--encoder-class", metavar="M:C", help="an encoder of your own that the model needs, as mylab.towers:MyTower"
    )
    return parser


def at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < lowest:
            raise ArgumentTypeError(f"expected at least {lowest}, got {value}")
        return value

    return number


def add_generation(parser: ArgumentParser, batch_size: int | None) -> None:
    """Options of every command that runs a model; without `batch_size` there is only one image."""
    one = at_least(1)
    parser.add_argument("--max-new-tokens", type=one, default=64, metavar="N", help="most tokens of an answer (64)")
    parser.add_argument(
        "--num-beams", type=one, default=1, metavar="N", help="beams of the search; 1, greedy, if not given"
    )
    parser.add_argument(
        "--beam-search",
        choices=("transformers", "big_vision"),
        default="transformers",
        help="whose rule: transformers' (normalised by length), or that of PaliGemma's published results",
    )
    parser.add_argument(
        "--strip-control",
        action="store_true",
        help="remove <image>, <bos>, [INST] and their kind from prompts: text to the model, and told otherwise",
    )
    if batch_size is not None:
        text = f"images at a time ({batch_size})"
        parser.add_argument("--batch-size", type=one, default=batch_size, metavar="N", help=text)
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the model runs; auto: a GPU if there is one",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="number format; auto: the checkpoint's"
    )


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument("--model", "-m", required=True, help="model directory or hub id")


def sizes(text: str) -> int | list[int]:
    """`448`, or `448,512` for the members of a fused tower."""
    found = [at_least(1)(part) for part in text.split(",")]
    return found[0] if len(found) == 1 else found


def add_geometry(parser: ArgumentParser) -> None:
    """At which size a model that is opened reads its images."""
    parser.add_argument(
        "--image-size",
        type=sizes,
        metavar="N",
        help="another image size than the model's, in pixels: its positions are resampled (A,B for a fused tower)",
    )
    parser.add_argument(
        "--max-num-patches", type=at_least(1), metavar="N", help="another patch budget than the NaFlex model's"
    )


def geometry(options: Namespace) -> dict[str, Any]:
    """What `add_geometry` was given, as `vlm.checkpoints.geometry.with_geometry` takes it."""
    image = {} if options.max_num_patches is None else {"max_num_patches": options.max_num_patches}
    given = {"image_size": options.image_size, "image": image}
    return {name: value for name, value in given.items() if value}


def add_overrides(parser: ArgumentParser, help: str) -> None:
    """`--set NAME=VALUE ...`, which may be repeated: a list of texts in `overrides`."""
    parser.add_argument(
        "--set", dest="overrides", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help=help
    )


def unless_auto(choice: str) -> str | None:
    return None if choice == "auto" else choice


def opening(options: Namespace) -> Any:
    """How the model is opened, a `vlm.checkpoints.opening.Opening`."""
    from vlm.checkpoints.opening import Opening

    device, dtype = unless_auto(options.device), unless_auto(options.dtype)
    return Opening(device=device, dtype=dtype, geometry=geometry(options))


def decoding(options: Namespace) -> Any:
    """How answers are made, a `vlm.generation.decoding.Decoding`."""
    from vlm.generation.decoding import Decoding

    names = ("max_new_tokens", "num_beams", "beam_search")
    return Decoding(**{name: getattr(options, name) for name in names})


def check_beams(num_beams: int | None, beam_search: str | None) -> None:
    """Raise ConfigError for a rule of beams without beams."""
    from vlm.errors import ConfigError

    if beam_search == "big_vision" and (num_beams or 1) == 1:
        raise ConfigError("--beam-search big_vision with one beam, which is greedy; add --num-beams N or leave it out")


def check_device(device: str) -> None:
    if device == "cuda":
        import torch

        from vlm.errors import ConfigError

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
