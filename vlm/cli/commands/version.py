"""`vlm version`: what is installed."""

from dataclasses import dataclass

from vlm.cli import console
from vlm.cli.options import Command, Shared


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared


def run(_options: Options) -> int:
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


COMMAND = Command(
    name="version", help="print the versions of vlm and of what it stands on", options=Options, run=run, group="other"
)
