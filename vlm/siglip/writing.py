"""Adding to a folder of vectors (`vlm.siglip.store`): one writer, whole batches, each on the disk before it counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.files import Journal, disk_errors, sync, write_json
from vlm.siglip import space as spaces
from vlm.siglip.journal import Record, Rows
from vlm.siglip.store import DTYPES, FORMAT, HEAD, MANIFEST, ROWS, VectorStore, head, read_manifest, shard_path

Kind = Literal["images", "texts"]
Dtype = Literal["float32", "float16"]
ROWS_PER_SHARD = 65_536


class VectorWriter:
    """A folder of vectors, open for adding; a context manager. What is not committed when it is left is not there.

    Args:
        folder: made if it does not exist; what is in it already stays and is added to.
        space: of the model that makes the vectors (`vlm.siglip.space.of`).
        kind: what rows are.
        dtype: of the vectors; None: what the folder has, float32 where it is new.
        model: how the model was named, for whoever asks later.
        other_versions: add to vectors that other libraries have made.

    Attributes:
        rows: what is there, as `vlm.siglip.journal.Rows`; what was added counts at once.
        told: what differs from the libraries that made the vectors.

    Raises:
        ConfigError: the folder holds other things, or vectors of another space, kind or dtype; or somebody is writing.
        DataError: a line of `rows.jsonl` or a shard is damaged.
        DiskError: the disk refuses.
    """

    def __init__(
        self,
        folder: str | Path,
        space: Mapping[str, Any],
        kind: Kind,
        *,
        dtype: Dtype | None = None,
        model: str = "",
        other_versions: bool = False,
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> None:
        self.folder = Path(folder)
        self.told: list[str] = []
        self._waiting: list[Tensor] = []
        self._lines: list[Record] = []
        self._make_folder()
        self._journal = Journal(self.folder / ROWS, self._busy)
        try:
            if (self.folder / MANIFEST).exists():
                self.manifest = read_manifest(self.folder)
                self._check(space, kind, dtype, other_versions)
            else:
                self.manifest = {
                    "format": FORMAT,
                    "kind": kind,
                    "size": space["size"],
                    "dtype": dtype or "float32",
                    "rows_per_shard": rows_per_shard,
                    "model": model,
                    "space": dict(space),
                }
                write_json(self.folder / MANIFEST, self.manifest)
            self.rows = Rows.of(self._journal.records, self.folder / ROWS)
            self._journal.records = []
            self._committed = self.rows.count
            self._mend()
        except BaseException:
            self._journal.close()
            raise

    def add(self, records: Sequence[Mapping[str, Any]], vectors: Tensor) -> None:
        """Rows to come: `id`, `stamp` and what is known of each, and float[n, D]. A row of the same id is dead then."""
        assert vectors.shape == (len(records), self.manifest["size"]), vectors.shape
        self._waiting.append(vectors.to(DTYPES[self.manifest["dtype"]]).contiguous())
        for record in records:
            self._line({"row": self.rows.count, **record})

    def know(self, name: str, known: Mapping[str, Any]) -> None:
        """Other things are known of a row whose vector stays (keys of `vlm.siglip.journal.KNOWN`)."""
        self._line({"about": name, **known})

    def refuse(self, name: str, stamp: str, code: str, message: str) -> None:
        """Something was looked at in its turn, and cannot be read."""
        self._line({"bad": name, "stamp": stamp, "code": code, "message": message})

    def drop(self, names: Iterable[str]) -> None:
        """These are no longer part of the collection: their rows are dead."""
        self._line({"drop": list(names)})

    def commit(self) -> None:
        """Put what was added on the disk: vectors first, then the lines that make them count.

        Raises:
            DiskError: the disk is full. What was committed before is whole, and this can be tried again.
        """
        if not self._lines:
            return
        if self._waiting:
            self._write(torch.cat(self._waiting))
        self._journal.append(self._lines)
        self._committed = self.rows.count
        self._waiting, self._lines = [], []

    def __enter__(self) -> VectorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()

    def _line(self, line: Record) -> None:
        taken = self.rows.take(json.loads(json.dumps(line)))
        assert taken, line
        self._lines.append(line)

    def _make_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is a file; vectors are written into a folder")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            others = [path.name for path in self.folder.iterdir() if path.name not in (ROWS, f"{MANIFEST}.tmp")]
        if others and not (self.folder / MANIFEST).exists():
            raise ConfigError(
                f"{self.folder} holds other things ({others[0]}) and no vectors; give a new folder, or one that"
                " `vlm embed` has written"
            )

    def _busy(self) -> ConfigError:
        return ConfigError(f"{self.folder}: another process is adding to these vectors; wait for it to end")

    def _check(self, space: Mapping[str, Any], kind: str, dtype: str | None, other_versions: bool) -> None:
        found = self.manifest
        if found["kind"] != kind:
            raise ConfigError(
                f"{self.folder} holds vectors of {found['kind']}, these are of {kind}; give another --out"
            )
        if dtype is not None and found["dtype"] != dtype:
            raise ConfigError(f"{self.folder} holds {found['dtype']} vectors, asked for {dtype}; give another --out")
        self.told = spaces.check(found["space"], space, str(self.folder), writing=not other_versions)

    def _mend(self) -> None:
        """Bring the last shard to what `rows.jsonl` counts; remove what a killed writer had not finished behind it."""
        store = VectorStore(self.folder, self.manifest, self.rows)
        shards = list(store.counts())
        for number, count in shards:
            store.check_shard(number, count)
        with disk_errors(self.folder):
            for path in self.folder.glob("vectors-*.safetensors"):
                if path not in {shard_path(self.folder, number) for number, _ in shards}:
                    path.unlink()
        for number, count in shards[-1:]:
            with _open(shard_path(self.folder, number)) as file:
                self._finish(file.fileno(), count)

    def _write(self, vectors: Tensor) -> None:
        """Vectors behind those that are committed, shard after shard."""
        whole: int = self.manifest["rows_per_shard"]
        done = 0
        while done < len(vectors):
            number, inside = divmod(self._committed + done, whole)
            part = vectors[done : done + whole - inside]
            path = shard_path(self.folder, number)
            with disk_errors(path), _open(path) as file:
                file.seek(HEAD + inside * vectors.shape[1] * vectors.element_size())
                file.write(part.numpy().data)
                file.flush()
                self._finish(file.fileno(), inside + len(part))
            if not inside:
                sync(self.folder)
            done += len(part)

    def _finish(self, descriptor: int, rows: int) -> None:
        """The header that says how many rows there are, no byte behind them, and all of it on the disk."""
        size, dtype = self.manifest["size"], self.manifest["dtype"]
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, head(rows, size, dtype))
        os.ftruncate(descriptor, HEAD + rows * size * DTYPES[dtype].itemsize)
        os.fsync(descriptor)


def _open(path: Path) -> Any:
    """A file to write anywhere in, made where it is not there; nothing is cut."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return open(os.open(path, flags, 0o666), "rb+")
