"""The processes that load data: torch's loader, ended without waiting for processes that may be dead."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from vlm import children

LONGEST_WAIT_S = 300
"""The run stops when a micro-batch takes longer to load."""


class _Loader(DataLoader[Any]):
    """Remembers its iterators, so that `loading` can end them."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        _iterators.add(iterator)
        return iterator


_iterators: WeakSet[Any] = WeakSet()


def loader(
    dataset: Dataset[Any], sampler: Iterable[Any], *, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Any]:
    """A loader that gives one item per key (a `MicroBatch`), in order, from `workers` processes (0: this one)."""
    options: dict[str, Any] = {}
    if workers:
        # Torch installs its SIGCHLD handler once, and Lightning takes it away at the end of each stage: without it a
        # worker that died would be noticed only after LONGEST_WAIT_S.
        signal_handling._SIGCHLD_handler_set = False
        options = {
            "timeout": LONGEST_WAIT_S,
            "multiprocessing_context": children.context(fork=True),
            "worker_init_fn": _start_worker,
        }
    return _Loader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        # Otherwise the loader draws its seed from the global generator, and moves it.
        generator=torch.Generator(),
        **options,
    )


def _start_worker(_number: int) -> None:
    # Torch's worker has just put in its own handlers, with which SIGTERM to the whole group would end it.
    children.leave_signals_to_parent()


@contextmanager
def loading() -> Iterator[None]:
    """Around whatever uses a `loader`: however it is left, no loading process is left behind or waited for."""
    try:
        yield
    finally:
        for iterator in list(_iterators):
            _abandon(iterator)


def _abandon(iterator: Any) -> None:
    """Kill the processes of a loader's iterator. Torch would ask them to end, through locks that die with the process
    that holds them: when one was killed, that takes seconds for each of the others, or for ever."""
    if getattr(iterator, "_shutdown", True):
        return  # it ended by itself, or has no processes
    iterator._shutdown = True
    # First, or torch's handler would take these for workers that die by themselves.
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    for worker in iterator._workers:
        worker.kill()
    for worker in iterator._workers:
        worker.join()
    if hasattr(iterator, "_pin_memory_thread"):
        iterator._pin_memory_thread_done_event.set()
