"""The global random states: set for every micro-batch, and given back to the caller afterwards."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def reseed(*parts_of_seed: int | str) -> None:
    """Seed torch, numpy and Python from these values alone: a micro-batch's dropout depends on no earlier step."""
    digest = hashlib.sha256("/".join(map(str, parts_of_seed)).encode()).digest()
    value = int.from_bytes(digest[:8], "little") >> 1
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


@contextmanager
def kept() -> Iterator[None]:
    """Training seeds the global generators before every micro-batch; the caller gets its own state back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
