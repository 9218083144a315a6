"""The directory that an import or export makes: whole under its name, or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vlm.errors import CheckpointError, DiskError
from vlm.files import publishing, rust_disk_errors


def check_out(out: Path) -> None:
    """Raise `CheckpointError` if `out` is anything but a new or empty directory."""
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out}: the directory is not empty; choose another, or delete it first")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; give a directory to make")


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A new directory that becomes `out` when the block ends well, and is removed when it does not.

    Raises:
        CheckpointError: `out` is not empty, is a file, or cannot be written.
    """
    check_out(out)
    try:
        with rust_disk_errors(), publishing(out) as folder:
            yield folder
    except (OSError, SafetensorError, DiskError) as error:
        raise CheckpointError(f"{out}: cannot be written: {error}") from error
