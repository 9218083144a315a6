"""`manifest.json`: size and sha256 of every file of a model directory, written last, compared when it is opened.

A flipped bit, a transposed square matrix, swapped token ids or a changed head count give a model that loads and is
wrong; only a hash of the bytes sees them. Directories without a manifest (published ones) are opened without this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from vlm.checkpoints.files import check_regular, is_plain, read_json
from vlm.errors import CheckpointError, ConfigError, nearest
from vlm.files import sha256, write_json

NAME = "manifest.json"
QUICK_BYTES = 32 * 2**20
"""`quick` hashes files up to this size (configurations and tokenizers) and compares only the length of larger ones."""
NEEDED = ("config.json", "processor_config.json", "model*.safetensors*")
"""What a model is read from: a manifest that leaves one of these out proves nothing."""
Verify = Literal["quick", "full", "none"]


def write(folder: Path) -> None:
    """Write the manifest of all files in a model directory (subdirectories belong to others)."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != NAME)
    listed = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}
    write_json(folder / NAME, {"format": 1, "files": listed})


def check(folder: Path, verify: Verify = "quick") -> None:
    """Compare a directory with its manifest, if it has one. Files that the manifest does not list are not looked at.

    Args:
        verify: `quick` compares sizes, and hashes of small files; `full` hashes everything; `none` compares nothing.

    Raises:
        CheckpointError: a file is missing or differs.
        ConfigError: an unknown level.
    """
    if verify not in get_args(Verify):
        raise ConfigError(
            f"unknown verify {verify!r}{nearest(str(verify), get_args(Verify))}; known: quick, full, none"
        )
    if verify == "none" or not (folder / NAME).exists():
        return
    listed = read_json(folder / NAME).get("files")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{folder / NAME}: no list of files; it was not written by vlm.save")
    unlisted = sorted(name for name in _needed(folder) if name not in listed)
    if unlisted:
        raise CheckpointError(
            f"{folder / NAME}: does not list {', '.join(unlisted[:5])}, so it says nothing about them; copy the whole"
            f" directory again, or, if you changed it on purpose, delete {NAME} or open with verify='none'"
        )
    for name, expected in listed.items():
        if not is_plain(name) or not isinstance(expected, dict):
            raise CheckpointError(f"{folder / NAME}: {name[:300]!r} is not the entry of a plain file; refused")
        problem = _difference(folder / name, expected, verify)
        if problem:
            raise CheckpointError(
                f"{folder / name}: {problem} than {NAME} says; copy it again, or, if you changed it on purpose, delete"
                f" {NAME} or open with verify='none'"
            )


def _needed(folder: Path) -> list[str]:
    """Names of the files that a model is read from."""
    return [file.name for pattern in NEEDED for file in folder.glob(pattern)]


def _difference(file: Path, expected: dict[str, object], verify: Verify) -> str | None:
    check_regular(file)
    size = file.stat().st_size
    if size != expected.get("size"):
        return f"has another size ({size:,} bytes, not {expected.get('size')})"
    if (verify == "full" or size <= QUICK_BYTES) and sha256(file) != expected.get("sha256"):
        return "has another sha256"
    return None
