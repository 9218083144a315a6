"""The demo: draw a small world, train a model on it in two stages, score it on what it has never seen, show it.

    vlm.demo.main("out")

Importing this package imports nothing heavy.
"""

import os
from typing import Any

__all__ = ["main"]


def main(*args: Any, **settings: Any) -> dict[str, Any]:
    """See `vlm.demo.run.main`."""
    # Threads that wait should sleep: on a shared machine spinning makes a step several times slower. Read when torch
    # loads, so it has no effect in a program that has imported torch already.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vlm.demo import run

    return run.main(*args, **settings)
