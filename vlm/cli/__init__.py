"""The `vlm` command line: `main` starts it, the commands are in `vlm.cli.commands`."""

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` without the program's name; by default that of the process) and return its exit code."""
    from vlm.cli.commands import parse
    from vlm.cli.console import endings

    try:
        with endings():
            run, options = parse(argv)
            if options.encoder_class:
                from vlm.encoders import use

                use(options.encoder_class)
            return run(options)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
