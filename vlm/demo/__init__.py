"""The demo: draw a small world, train a model on it in two stages, score it on what it has never seen, show it.

    vlm.demo.main("out")

Importing this package imports nothing heavy.
"""

from typing import Any

__all__ = ["main"]


def main(*args: Any, **settings: Any) -> dict[str, Any]:
    """See `vlm.demo.run.main`."""
    from vlm.demo import run
    from vlm.train.run import run as train

    return run.main(*args, train=train, **settings)
