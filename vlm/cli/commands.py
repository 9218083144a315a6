"""The commands: their options as data for argparse, and bodies that only wire.

Bodies import what they need, so that `--help` costs no torch. argparse and not typer: typer builds its options with
pydantic, which alone costs more than the 0.2 s that help may take.
"""

import json
import sys
from argparse import Action, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.cli import check, compare, console, demo, eval_, export, import_, new, score
from vlm.cli.options import (
    Parser,
    Run,
    add_generation,
    add_geometry,
    add_model,
    add_overrides,
    check_beams,
    check_device,
    command,
    decoding,
    opening,
)
from vlm.errors import ConfigError, nearest

DIFF = "eval-diff"
"""`vlm eval diff` is a command of its own for argparse: it shares no option with `eval`."""
EXIT_CODES = """\
exit codes:
  0        done; also where the reader of the output has left (vlm ... | head)
  1        vlm check: a check failed
  2        refused; the reason is on stderr
  3        done, but some items were skipped; they are listed
  130/143  stopped by Ctrl-C / SIGTERM"""


def parse(argv: Sequence[str] | None) -> tuple[Run, Namespace]:
    """The body of the command that `argv` names, and its options. Raises `SystemExit`: 0 after help, 2 on misuse."""
    parser, commands = parsers()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if words and not words[0].startswith("-") and words[0] not in commands:
        known = [name for name in commands if name != DIFF]
        parser.error(f"unknown command: {words[0]}{nearest(words[0], known)}; the commands are {', '.join(known)}")
    if words[:2] == ["eval", "diff"]:
        words[:2] = [DIFF]
    elif words[:1] == ["eval"] and len(words) > 1 and not words[1].startswith("-"):
        commands["eval"].error(f"vlm eval takes no {words[1]!r}{nearest(words[1], ['diff'])}")
    if words:
        chosen = commands.get(words[0])
        chosen.refuse_unknown(words[1:]) if chosen else parser.refuse_unknown(words[:1])
    options, unknown = parser.parse_known_args(words)
    if unknown:
        getattr(options, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if "run" not in options:
        parser.print_help()
        raise SystemExit(console.OK)
    return options.run, options


def parsers() -> tuple[Parser, Mapping[str, Parser]]:
    """That of `vlm`, and those of its commands by name; `vlm eval diff` is `DIFF`."""
    parser = Parser(
        prog="vlm",
        description="Build, train, evaluate and run PaliGemma-style vision-language models.",
        epilog=EXIT_CODES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop (vlm version: of all)")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for add in (
        new.add,
        _train,
        eval_.add,
        score.add,
        compare.add,
        _caption,
        _ask,
        _info,
        check.add,
        export.add,
        import_.add,
        demo.add,
        _version,
    ):
        add(commands)
    return parser, commands.choices


class _Version(Action):
    """As `--version` everywhere: one line. Reads the package's version only when it is asked for."""

    def __call__(self, *_: Any) -> None:
        from vlm.version import __version__

        print(f"vlm {__version__}")
        raise SystemExit(console.OK)


# --- train ------------------------------------------------------------------------------------------------------------


def _train(commands: Any) -> None:
    parser = command(commands, run_train, "train", "train a model in stages")
    parser.add_argument("--config", "-c", type=Path, required=True, metavar="FILE", help="the run, as YAML")
    add_overrides(
        parser,
        "change settings: --set seed=1 stages.0.steps=100",
    )
    parser.add_argument("--resume", action="store_true", help="go on after the newest complete checkpoint")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: go on although settings or data that change the result are others now; it is recorded",
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip and list broken annotations")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")


def run_train(options: Namespace) -> int:
    """`vlm train`: the final model's directory on stdout."""
    from vlm import settings
    from vlm.train.config import load_config
    from vlm.train.run import run
    from vlm.train.rundir import trained
    from vlm.train.signals import Stopped

    if options.accept_changes and not options.resume:
        raise ConfigError("--accept-changes is about a run that goes on; add --resume")
    config = load_config(options.config, options.overrides)
    if options.print_config:
        import yaml

        print(yaml.safe_dump(settings.to_dict(config), sort_keys=False), end="")
        return console.OK
    try:
        print(run(config, resume=options.resume, skip_bad=options.skip_bad, accept_changes=options.accept_changes))
    except Stopped:
        if trained(config.out):
            print(f"to go on: {console.again('--resume', without='--accept-changes')}", file=sys.stderr)
        raise
    summary = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    return console.SKIPPED if summary["skipped_annotations"] or summary["failed_images"] else console.OK


# --- caption, ask -----------------------------------------------------------------------------------------------------


def _caption(commands: Any) -> None:
    details = "Images that cannot be read are named on stderr, the others are described (exit code 3)."
    parser = command(commands, run_caption, "caption", "describe images", details)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    add_model(parser)
    parser.add_argument("--prompt", default="caption en", help="what the model is asked (caption en)")
    add_geometry(parser)
    add_generation(parser, batch_size=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object per image, errors included")


def run_caption(options: Namespace) -> int:
    """`vlm caption`: one line per image on stdout."""
    return _answer(options, [[image] for image in options.images], options.prompt, options.batch_size)


def _ask(commands: Any) -> None:
    details = "Several images are shown together, in their order; without one the question is about text alone."
    parser = command(commands, run_ask, "ask", "ask a question about images", details)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about them, in English")
    add_model(parser)
    add_geometry(parser)
    add_generation(parser, batch_size=None)
    parser.add_argument("--json", action="store_true", help="print a JSON object, also for an error")


def run_ask(options: Namespace) -> int:
    """`vlm ask`: the answer on stdout."""
    if not options.images and Path(options.question).is_file():
        from vlm.errors import ConfigError

        raise ConfigError(f"{options.question} is a file, and there is no question; write it behind the image")
    return _answer(options, [options.images], f"answer en {options.question}", batch_size=1)


def _answer(options: Namespace, groups: list[list[str]], prompt: str, batch_size: int) -> int:
    from vlm.cli.ask import Asking, ask_about

    check_device(options.device)
    check_beams(options.num_beams, options.beam_search)
    asking = Asking(
        prompt=prompt,
        model=options.model,
        opening=opening(options),
        decoding=decoding(options),
        batch_size=batch_size,
        strip_control=options.strip_control,
    )
    return ask_about(groups, asking, as_json=options.json)


# --- info, version ----------------------------------------------------------------------------------------------------


def _info(commands: Any) -> None:
    parser = command(commands, run_info, "info", "show the parts of a model, their sizes and costs")
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_info(options: Namespace) -> int:
    """`vlm info`: a table on stdout."""
    from vlm.measure.info import describe, table

    console.quiet_transformers()
    facts = describe(options.model)
    print(json.dumps(facts, indent=1) if options.json else table(facts))
    return console.OK


def _version(commands: Any) -> None:
    command(commands, run_version, "version", "print the versions of vlm and of what it stands on")


def run_version(_options: Namespace) -> int:
    """`vlm version`: one `name version` a line."""
    import platform
    from importlib import metadata

    from vlm.version import __version__

    print(f"vlm {__version__}\npython {platform.python_version()}")
    for name in ("torch", "transformers", "lightning", "accelerate", "Pillow"):
        try:
            print(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            print(name, "is not installed")
    return console.OK
