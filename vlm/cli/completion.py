"""Completion for shells: commands, options and their choices, read off the parsers; files everywhere else.

A script is text that knows all options, so completing starts no Python.
"""

from argparse import SUPPRESS, Action
from collections.abc import Mapping
from shlex import quote

from vlm.cli.options import Command, Parser

_Words = dict[str, list[str]]


def script(shell: str, known: Mapping[str, tuple[Command, Parser]]) -> str:
    """The completion script of `bash`, `zsh` or `fish` for these commands."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](known)


def _options(parser: Parser) -> list[Action]:
    """The options of a command; those without a name are files or texts."""
    return [action for action in parser.actions() if action.option_strings and action.help != SUPPRESS]


def _choices(parser: Parser) -> _Words:
    """Option -> what it can be."""
    return {
        name: [str(choice) for choice in action.choices]
        for action in _options(parser)
        if action.choices
        for name in action.option_strings
    }


def _first_words(known: Mapping[str, tuple[Command, Parser]]) -> list[str]:
    return [name for name in known if " " not in name] + ["help"]


def _bash(known: Mapping[str, tuple[Command, Parser]]) -> str:
    cases = []
    for name, (_, parser) in known.items():
        choices = [
            f'            {option}) COMPREPLY=($(compgen -W {quote(" ".join(words))} -- "$word")); return;;'
            for option, words in _choices(parser).items()
        ]
        names = " ".join(option for action in _options(parser) for option in action.option_strings)
        cases += [
            f"    {quote(name)})",
            *(['        case "$before" in', *choices, "        esac"] if choices else []),
            f"        options={quote(names)};;",
        ]
    below = {name.split()[0]: name.split()[1] for name in known if " " in name}
    deeper = [
        f'    if [ "$command ${{COMP_WORDS[2]}}" = {quote(f"{first} {second}")} ]; then command="{first} {second}"; fi'
        for first, second in below.items()
    ]
    return "\n".join(
        [
            '# vlm completion for bash: eval "$(vlm completion bash)"',
            "_vlm() {",
            '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
            '    local command="${COMP_WORDS[1]}" options=""',
            "    COMPREPLY=()",
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f'        COMPREPLY=($(compgen -W {quote(" ".join(_first_words(known)))} -- "$word")); return',
            "    fi",
            *deeper,
            '    case "$command" in',
            *cases,
            "    esac",
            '    if [ "${word#-}" != "$word" ]; then COMPREPLY=($(compgen -W "$options" -- "$word")); return; fi',
            '    COMPREPLY=($(compgen -f -- "$word"))',
            "}",
            "complete -o filenames -F _vlm vlm",
            "",
        ]
    )


def _zsh(known: Mapping[str, tuple[Command, Parser]]) -> str:
    listed = [f"        {quote(f'{name}:{one.help}')}" for name, (one, _) in known.items() if " " not in name]
    cases = []
    for name, (_, parser) in known.items():
        specs = [quote(_zsh_option(action)) for action in _options(parser)]
        cases += [f"    {quote(name)})", *(f"        specs+=({spec})" for spec in specs), "        ;;"]
    below = {name.split()[0]: name.split()[1] for name in known if " " in name}
    deeper = [
        f'    if [[ "$command" = {first} && "$words[3]" = {second} ]]; then command={quote(f"{first} {second}")}; fi'
        for first, second in below.items()
    ]
    return "\n".join(
        [
            "#compdef vlm",
            '# vlm completion for zsh: eval "$(vlm completion zsh)", after compinit',
            "_vlm() {",
            '    local command="$words[2]"',
            "    local -a listed specs",
            "    listed=(",
            *listed,
            "    )",
            "    if (( CURRENT == 2 )); then _describe command listed; return; fi",
            *deeper,
            '    case "$command" in',
            *cases,
            "    esac",
            "    _arguments $specs '*:file:_files'",
            "}",
            "compdef _vlm vlm",
            "",
        ]
    )


def _zsh_option(action: Action) -> str:
    """One option as `_arguments` reads it."""
    name = action.option_strings[0]
    about = (action.help or "").replace("[", "(").replace("]", ")").replace(":", " -").replace("%%", "%")
    if action.nargs == 0:
        return f"{name}[{about}]"
    what = f"({' '.join(map(str, action.choices))})" if action.choices else "_files"
    return f"{name}[{about}]:value:{what}"


def _fish(known: Mapping[str, tuple[Command, Parser]]) -> str:
    lines = ["# vlm completion for fish: vlm completion fish | source"]
    for name, (one, parser) in known.items():
        first, _, second = name.partition(" ")
        if second:
            where = f"__fish_seen_subcommand_from {first}; and __fish_seen_subcommand_from {second}"
            lines.append(
                f"complete -c vlm -n {quote(f'__fish_seen_subcommand_from {first}')} -a {second} -d {quote(one.help)}"
            )
        else:
            where = f"__fish_seen_subcommand_from {first}"
            lines.append(f"complete -c vlm -n __fish_use_subcommand -a {first} -d {quote(one.help)}")
        lines += [f"complete -c vlm -n {quote(where)} {_fish_option(action)}" for action in _options(parser)]
    return "\n".join([*lines, ""])


def _fish_option(action: Action) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in action.option_strings]
    if action.choices:
        names.append(f"-xa {quote(' '.join(map(str, action.choices)))}")
    elif action.nargs != 0:
        names.append("-r")
    return " ".join([*names, f"-d {quote((action.help or '').replace('%%', '%'))}"])
