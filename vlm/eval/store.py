"""Predictions on disk: appended as they are made, complete after a kill at any moment.

`predictions.jsonl` holds one record a line; `predictions.settings.json` beside it says what they belong to. A run that
is started again with the same settings goes on where the last one stopped; with others it is refused.

Of several processes each writes a file of its own, `predictions.rank0.jsonl` and so on, which the first one adds to
`predictions.jsonl` when all are done. What a killed run has left is added when the next one starts, whatever the number
of processes then.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from vlm.errors import ConfigError, DataError, VLMError

from .processes import ALONE, Processes

PREDICTIONS = "predictions.jsonl"
SETTINGS = "predictions.settings.json"
_SHARES = "predictions.rank*.jsonl"
_HASHES = {
    "data_sha256": "items, prompts, images or number of items",
    "shuffled_sha256": "images given to the items",
    "candidates_sha256": "candidates to choose from",
    "model.weights_sha256": "weights of the model",
    "model.config_sha256": "configuration of the model",
    "model.processor_sha256": "tokenizer, image settings or number of image tokens",
}
"""Settings that are hashes -> what they are of; the hashes themselves tell a reader nothing."""

Records = dict[str, dict[str, Any]]


class PredictionStore:
    """The predictions of one run, open for appending; a context manager.

    Args:
        folder: made if it does not exist. Several processes must all see it.
        settings: everything that decides the predictions, as JSON values.
        group: the processes that write together. Each must construct the store, and call `finish` when it is done.

    Raises:
        ConfigError: the folder holds predictions of other settings, or another run is writing there.
        DataError: a line of the file is damaged, or an id occurs twice.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], group: Processes = ALONE) -> None:
        self.folder = Path(folder)
        self.path = self.folder / PREDICTIONS
        self.records: Records = {}
        self._group = group
        self._main: BinaryIO | None = None
        self._share: BinaryIO | None = None
        refusal = self._open(settings) if group.main else None
        told = [text for text in group.gather(str(refusal) if refusal else "") if text]
        if told:  # by the first process; the others would wait for it for ever
            raise refusal or ConfigError(told[0])
        if group.world > 1:
            if not group.main:
                self.records = _records(self.path.read_bytes(), self.path)
            self._share = open(self.folder / f"predictions.rank{group.rank}.jsonl", "wb")  # noqa: SIM115
        group.barrier()  # nobody predicts before everybody has read what is there

    def __enter__(self) -> PredictionStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._share, self._main):
            if file is not None:
                file.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records, each with a new `id`, in one call, and wait until they are on the disk."""
        new = list(records)
        for record in new:
            assert record["id"] not in self.records, f"{record['id']!r} was predicted twice"
        file = self._share or self._main
        assert file is not None, "the store is closed"
        _write(file, new)
        self.records.update((record["id"], record) for record in new)

    def finish(self) -> None:
        """Called by every process when its share is predicted; then `records` of the first one holds all of them."""
        if self._share is not None:
            self._share.close()
            self._share = None
            self._group.barrier()
            if self._group.main:
                self._add_shares()
        self._group.barrier()

    def _open(self, settings: Mapping[str, Any]) -> VLMError | None:
        """Read and check what is there; returns why it cannot be continued."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            return ConfigError(f"{self.folder} is a file; results are written into a folder")
        self._main = open(self.path, "ab+")  # noqa: SIM115 - closed by __exit__
        try:
            self._lock()
            self._read()
            self._add_shares()
            self._check_settings(settings)
        except VLMError as error:
            self._main.close()
            return error
        except BaseException:
            self._main.close()
            raise
        return None

    def _lock(self) -> None:
        assert self._main is not None
        try:
            fcntl.flock(self._main, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.folder}: another evaluation is writing here; give another output folder"
            ) from None

    def _read(self) -> None:
        assert self._main is not None
        self._main.seek(0)
        data = self._main.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # the writer was killed in the middle of a line; that item is predicted again
            self._main.truncate(whole)
        self.records = _records(data, self.path)

    def _add_shares(self) -> None:
        """Move what the processes of this run, or of one that was killed, have written into the one file.

        A kill between the writing and the deleting leaves records in both places: those are not added again.
        """
        assert self._main is not None
        self._main.seek(0)
        stored = _records(self._main.read(), self.path)
        for path in sorted(self.folder.glob(_SHARES)):
            found = _records(path.read_bytes(), path)
            new = [record for key, record in found.items() if key not in stored]
            stored.update((record["id"], record) for record in new)
            _write(self._main, new)
            self.records.update((record["id"], record) for record in new)
            path.unlink()

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / SETTINGS
        wanted = json.loads(json.dumps(settings))
        if not self.records:
            write_json(path, wanted)  # before the first prediction, so that none is ever without its settings
            return
        if not path.is_file():
            raise ConfigError(f"{self.path} has predictions but {SETTINGS} is missing; give another output folder")
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [_difference(key, found.get(key), wanted.get(key)) for key in sorted({*found, *wanted})]
        told = [line for line in differing if line]
        if told:
            raise ConfigError(
                f"{self.folder} holds {len(self.records)} predictions made with other settings ({'; '.join(told)});"
                " give another output folder, or delete this one to predict again"
            )


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8. A lone surrogate becomes its JSON escape, so every text comes back as it was."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step: a reader, or a run after a kill, sees the old or the new one, never half."""
    _replace(path, json.dumps(value, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file in one step."""
    _replace(path, b"".join(encode(record) for record in records))


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _write(file: BinaryIO, records: Iterable[Mapping[str, Any]]) -> None:
    file.write(b"".join(encode(record) for record in records))
    file.flush()
    os.fsync(file.fileno())


def _records(data: bytes, path: Path) -> Records:
    """The records of a predictions file by id; a torn last line is left out."""
    records: Records = {}
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        record = _parse(line, f"{path}:{number}")
        if record["id"] in records:
            raise DataError(f"{path}:{number}: id {record['id']!r} occurs twice; delete {path.parent}")
        records[record["id"]] = record
    return records


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: damaged line ({error}); delete the file to predict again") from None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("id", "prediction")):
        raise DataError(f"{where}: expected an object with the texts id and prediction, got {line[:80]!r}")
    return record


def _difference(key: str, found: Any, wanted: Any) -> str:
    if found == wanted:
        return ""
    if isinstance(found, dict) and isinstance(wanted, dict):
        inner = (_difference(f"{key}.{name}", found.get(name), wanted.get(name)) for name in sorted({*found, *wanted}))
        return "; ".join(line for line in inner if line)
    about = _HASHES.get(key)
    return f"other {about} ({key})" if about else f"{key}: there {_short(found)}, now {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
