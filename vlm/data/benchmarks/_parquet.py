"""Parquet files of Hugging Face data sets, through the optional `datasets` library; images stay bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError, DataError
from vlm.files import write_bytes


def rows(
    folder: Path, pattern: str, image_columns: Sequence[str], *, missing: str, task: str
) -> Iterable[Mapping[str, Any]]:
    """The rows of the files of a folder with names like `pattern`; images as `{"bytes": ...}` or None.

    Args:
        missing: what to do where there is none, for the error.
        task: who reads them, for the error.

    Raises:
        DataError: no such file. ConfigError: the library is not installed.
    """
    files = sorted(str(path) for path in folder.glob(pattern))
    if not files:
        raise DataError(f"{missing} (no {pattern} in it)")
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"task {task!r} reads parquet files with the datasets library: pip install 'vlm-backbone[datasets]'"
        ) from error
    table: Any = datasets.load_dataset("parquet", data_files={"rows": files}, split="rows")
    for name in image_columns:
        if name not in table.column_names:
            raise DataError(f"{folder}: no column {name!r}; there are {', '.join(table.column_names)}")
        table = table.cast_column(name, datasets.Image(decode=False))
    found: Iterable[Mapping[str, Any]] = table
    return found


def written(data: bytes, path: Path) -> Path:
    """The file with these bytes, made if it is not there. Images are told apart by content, so a name needs no ending.

    Decoded, all images of a data set together take gigabytes; as files they are read when they are shown.
    """
    from vlm.images.load import DEFAULT_LIMITS

    if len(data) > DEFAULT_LIMITS.max_bytes:
        raise DataError(f"{path}: an image of {len(data):,} bytes; at most {DEFAULT_LIMITS.max_bytes:,} are read")
    # The length, because versions before wrote in place, and a kill left the beginning of a file.
    if not path.exists() or path.stat().st_size != len(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    return path
