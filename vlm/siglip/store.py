"""A folder of vectors: written as they are made, whole after a kill at any moment, read without being loaded.

    VECTORS/
        manifest.json               what they are: images or texts, size, number format, rows of a shard, and their
                                    space (`vlm.siglip.space`)
        rows.jsonl                  one line for each row in order: its id, where it came from, what is known of it; and
                                    what became of rows since (`vlm.siglip.journal`)
        vectors-00000.safetensors   `vectors` float[n, D]: row 0 of the first shard is row 0 of `rows.jsonl`

A row counts once its line is in `rows.jsonl`, which is written when the vector is on the disk. Rows are never moved or
written over: what is embedded anew gets a new row, and the old one is dead. So a reader may read while a writer writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError, DataError
from vlm.files import read_lines
from vlm.siglip.journal import Rows

MANIFEST, ROWS = "manifest.json", "rows.jsonl"
FORMAT = 1
HEAD = 4096
"""Bytes before the vectors of a shard: the header of safetensors, padded with blanks so that it can be written again in
its place."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}
_RUNS = 64
"""So many dead rows apart, a shard is given as pieces of itself; with more, its living rows are copied."""


class VectorStore:
    """Vectors to read: `VectorStore.open(path)`.

    Attributes:
        path: the folder.
        manifest: `kind` (images or texts), `size` (D), `dtype`, `space`, `model` (as it was named).
        rows: the living rows, in order, as `vlm.siglip.journal` keeps them: `id`, `source`, `image`, `text`, `info`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], rows: Rows) -> None:
        self.path, self.manifest = path, manifest
        self._count, self._places = rows.count, rows.places
        self.rows = [rows.records[place] for place in self._places]

    @classmethod
    def open(cls, path: str | Path) -> VectorStore:
        """Open a folder that `vlm embed` has written, or is writing.

        Raises:
            ConfigError: it is none, or of a later version of this library.
            DataError: a line of `rows.jsonl` is damaged or missing, or a shard is shorter than it says.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        store = cls(folder, manifest, Rows.of(read_lines(folder / ROWS), folder / ROWS))
        for number, count in store.counts():
            store.check_shard(number, count)
        return store

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def kind(self) -> str:
        """`images` or `texts`: what the rows are."""
        kind: str = self.manifest["kind"]
        return kind

    @property
    def size(self) -> int:
        """D."""
        size: int = self.manifest["size"]
        return size

    @property
    def space(self) -> dict[str, Any]:
        """As `vlm.siglip.space.of` makes it."""
        space: dict[str, Any] = self.manifest["space"]
        return space

    @cached_property
    def ids(self) -> list[str]:
        """The ids of the living rows, in order."""
        return [row["id"] for row in self.rows]

    @cached_property
    def info(self) -> list[dict[str, Any]]:
        """What is known of each living row beside its id: the other keys of its source."""
        return [row.get("info") or {} for row in self.rows]

    @cached_property
    def shards(self) -> list[Tensor]:
        """The vectors of the living rows in order, float[n_i, D] each, mapped from the disk: read when they are used.

        Dead rows are left out, by giving a shard in pieces; where they are many, its living rows are in memory.
        """
        living = torch.zeros(self._count, dtype=torch.bool)
        living[torch.tensor(self._places, dtype=torch.int64)] = True
        found: list[Tensor] = []
        start = 0
        for number, count in self.counts():
            found += _living(self.mapped(number, count), living[start : start + count])
            start += count
        return found

    def mapped(self, number: int, count: int) -> Tensor:
        """The first rows of a shard, dead ones too, as float[count, D] over the file."""
        dtype = DTYPES[self.manifest["dtype"]]
        nbytes = HEAD + count * self.size * dtype.itemsize
        storage = torch.UntypedStorage.from_file(str(shard_path(self.path, number)), shared=False, nbytes=nbytes)
        whole: Any = torch.empty(0, dtype=dtype)
        found: Tensor = whole.set_(storage, HEAD // dtype.itemsize, (count, self.size))
        return found

    def check_shard(self, number: int, count: int) -> None:
        """Raise DataError where a shard is not there or has fewer rows."""
        path = shard_path(self.path, number)
        needed = HEAD + count * self.size * DTYPES[self.manifest["dtype"]].itemsize
        got = path.stat().st_size if path.is_file() else 0
        if got < needed:
            raise DataError(
                f"{path}: {got:,} bytes, but {ROWS} counts {count:,} rows there ({needed:,} bytes): it was cut or"
                " exchanged; fetch it again, or embed into another folder"
            )

    def counts(self) -> Iterator[tuple[int, int]]:
        """Number and rows of each shard, dead ones too."""
        whole: int = self.manifest["rows_per_shard"]
        for number, start in enumerate(range(0, self._count, whole)):
            yield number, min(whole, self._count - start)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of vectors says of itself. Raises ConfigError where it is none."""
    path = folder / MANIFEST
    advice = "give a folder that `vlm embed --out` has written"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no vectors here, there is no {MANIFEST}; {advice}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error)[:100]}); {advice}") from error
    needed = {"format", "kind", "size", "dtype", "rows_per_shard", "space"}
    if not isinstance(found, dict) or not needed <= set(found):
        raise ConfigError(f"{path}: no manifest of vectors; {advice}")
    if found["format"] != FORMAT:
        raise ConfigError(f"{path}: format {found['format']}, this version reads {FORMAT}; update vlm")
    return found


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"vectors-{number:05d}.safetensors"


def head(rows: int, size: int, dtype: str) -> bytes:
    """The header of a safetensors file with one tensor `vectors` [rows, size], always `HEAD` bytes long."""
    name = {"float32": "F32", "float16": "F16"}[dtype]
    tensor = {"dtype": name, "shape": [rows, size], "data_offsets": [0, rows * size * DTYPES[dtype].itemsize]}
    said = json.dumps({"__metadata__": {"format": "pt"}, "vectors": tensor}).encode()
    return (HEAD - 8).to_bytes(8, "little") + said.ljust(HEAD - 8)


def picture_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the picture of a row lies: `path`, and for a member of a tar shard `offset`, `size`, `member`."""
    found: dict[str, Any] | None = row.get("image")
    return found


def _living(shard: Tensor, living: Tensor) -> list[Tensor]:
    if bool(living.all()):
        return [shard]
    runs = []
    start = 0
    for alive, group in groupby(living.tolist()):
        length = sum(1 for _ in group)
        if alive:
            runs.append(shard[start : start + length])
        start += length
    return runs if len(runs) <= _RUNS else [shard[living]]
