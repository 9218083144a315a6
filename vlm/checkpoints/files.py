"""The plain files of a checkpoint: what they are called, and JSON out of them, bounded and checked."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from vlm.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = SINGLE + ".index.json"
MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON file that is read: Gemma's tokenizer takes about 35 MB, an index or a configuration far less."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, not a regular file, too large, not JSON, or not an object.
    """
    check_regular(file)
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes, at most {MAX_JSON_BYTES:,} are read as JSON")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:  # not UTF-8, not JSON, brackets without end
        raise CheckpointError(f"{file}: not valid JSON ({str(error)[:100]}); copy the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds a {type(values).__name__}, expected a JSON object")
    return values


def is_plain(name: str) -> bool:
    """The name of a file in the same directory, that a file can have."""
    return Path(name).name == name and len(name.encode("utf-8", "surrogatepass")) < 256 and "\0" not in name


def check_regular(file: Path) -> None:
    """Refuse what is missing or is no plain file (a pipe would block, a directory cannot be read).

    Raises:
        CheckpointError: says which.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{file}: no such file ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{file}: not a regular file; refused")
