"""The `vlm` command line: the commands are the files of `vlm/cli/commands`, their options those of dataclasses."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.cli.options import Command, Parser

__all__ = ["known", "main", "parse", "parser"]

ROOM = "vlm.cli.commands"
EXIT_CODES = """\
exit codes:
  0        done; also where the reader of the output has left (vlm ... | head)
  1        vlm check: a check failed
  2        refused; the reason is on stderr
  3        done, but some items were skipped; they are listed
  130/143  stopped by Ctrl-C / SIGTERM"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` without the program's name; by default that of the process) and return its exit code."""
    try:
        from vlm.children import endings

        with endings():
            command, options = parse(argv)
            if options.shared.encoder_class:
                from vlm.registry import use

                use("vlm.encoders", options.shared.encoder_class)
            if command.whole:
                return command.run(options, {name: (one, parser(one)) for name, one in known().items()})
            return command.run(options)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:  # before `endings` has begun
        print("interrupted", file=sys.stderr)
        return 130


def known() -> "dict[str, Command]":
    """Every command by its name, those of a group together."""
    from vlm.cli.options import GROUPS
    from vlm.registry import kinds, part

    found = [part(ROOM, kind).COMMAND for kind in kinds(ROOM)]
    return {one.name: one for one in sorted(found, key=lambda one: (list(GROUPS).index(one.group), one.name))}


def parse(argv: Sequence[str] | None) -> "tuple[Command, Any]":
    """The command that `argv` names, and its options. Raises `SystemExit`: 0 after help, 2 on misuse."""
    from vlm.cli.options import filled

    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    chosen, rest = _chosen(words)
    if chosen is None:
        _about_all(words)
        raise SystemExit(0)
    command = parser(chosen)
    if rest and not rest[0].startswith("-"):
        _refuse_unknown_below(chosen, command, rest[0])
    command.refuse_unknown(rest)
    given, unknown = command.parse_known_intermixed_args(rest)
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return chosen, filled(chosen.options, given)


def _chosen(words: list[str]) -> "tuple[Command | None, list[str]]":
    """The command that the words begin with, the longest name first, and the words behind it. Only its file is read."""
    from vlm.registry import kinds, part

    files = kinds(ROOM)
    for length in (2, 1):
        name = "_".join(words[:length]).replace("-", "_")
        for kind in (name, f"{name}_"):  # `import` is a word of Python
            if len(words) >= length and kind in files:
                found: Command = part(ROOM, kind).COMMAND
                if found.name == " ".join(words[:length]):
                    return found, words[length:]
    return None, words


def _about_all(words: list[str]) -> None:
    """What `vlm` without a command does: its help, its version, or a word that is none."""
    from argparse import RawDescriptionHelpFormatter

    from vlm.cli.options import Parser, version_option
    from vlm.errors import nearest

    found = known()
    top = Parser(
        prog="vlm",
        usage="vlm [-h] [--version] COMMAND ...",
        description="Build, train, evaluate and run PaliGemma-style vision-language models.\n\n" + _listed(found),
        epilog=EXIT_CODES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    version_option(top)
    if words and not words[0].startswith("-"):
        names = [name for name in found if " " not in name]
        top.error(f"unknown command: {words[0]}{nearest(words[0], names)}; the commands are {', '.join(names)}")
    top.refuse_unknown(words[:1])
    top.parse_args(words)
    top.print_help()


def _refuse_unknown_below(chosen: "Command", parser: "Parser", word: str) -> None:
    """A mistyped second word of a command that takes no such word, where other commands lie below it."""
    from vlm.errors import nearest
    from vlm.registry import kinds

    begin = f"{chosen.name}_"
    deeper = [kind.removeprefix(begin) for kind in kinds(ROOM) if kind.startswith(begin) and kind != begin]
    if deeper:
        parser.error(f"vlm {chosen.name} takes no {word!r}{nearest(word, deeper)}")


def parser(command: "Command") -> "Parser":
    """The parser of one command."""
    from vlm.cli.options import Parser, add_options

    about = f"{command.help[0].upper()}{command.help[1:]}. {command.details}".rstrip()
    made = Parser(prog=f"vlm {command.name}", description=about)
    add_options(made, command.options)
    return made


def _listed(known: "dict[str, Command]") -> str:
    """The commands under the headings of their groups."""
    from vlm.cli.options import GROUPS

    wide = max(map(len, known)) + 2
    lines = []
    for group, heading in GROUPS.items():
        own = [one for one in known.values() if one.group == group]
        lines += [f"{heading}:", *(f"    {one.name:{wide}}{one.help}" for one in own), ""] if own else []
    return "\n".join(lines).rstrip()
