"""A random stream of its own for each new part, so that swapping one leaves the others' weights as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch


def seeded(seed: int, name: str, action: Callable[[], object]) -> None:
    """Run with a random stream of its own, made of seed and name, and leave the caller's stream as it was."""
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng():
        torch.manual_seed(stream)
        action()
