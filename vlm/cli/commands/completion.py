"""`vlm completion`: what a shell needs to complete commands and options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlm.cli import console
from vlm.cli.options import Command, Parser, Shared
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    shell: Literal["bash", "zsh", "fish"] = option("whose script to print", place=True)


def run(options: Options, known: Mapping[str, tuple[Command, Parser]]) -> int:
    """The script on stdout."""
    from vlm.cli.completion import script

    print(script(options.shell, known), end="")
    return console.OK


COMMAND = Command(
    name="completion",
    help="print a script that completes commands and options",
    details='bash: eval "$(vlm completion bash)"; zsh: the same after compinit; fish: vlm completion fish | source',
    options=Options,
    run=run,
    group="other",
    whole=True,
)
