"""The `vlm` command line: `main` starts it, the commands are in `vlm.cli.commands`."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (`argv` without the program's name; by default that of the process) and return its exit code."""
    try:
        from vlm.children import endings

        with endings():
            from vlm.cli.commands import parse

            run, options = parse(argv)
            if options.encoder_class:
                from vlm.registry import use

                use("vlm.encoders", options.encoder_class)
            return run(options)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:  # before `endings` has begun
        print("interrupted", file=sys.stderr)
        return 130
