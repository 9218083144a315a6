"""Predictions on disk: appended as they are made, complete after a kill at any moment.

`predictions.jsonl` holds one record a line; `predictions.settings.json` beside it says what they belong to. A run that
is started again with the same settings goes on where the last one stopped; with others it is refused.

Of several processes each writes a file of its own, `predictions.rank0.jsonl` and so on, which the first one adds to
`predictions.jsonl` when all are done. What a killed run has left is added when the next one starts, whatever the number
of processes then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vlm import words
from vlm.errors import ConfigError, DataError, VLMError
from vlm.files import Journal, read_lines, write_json
from vlm.ranks import ALONE, Processes

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

Record = dict[str, Any]
"""What is kept of one answer: `id`, `prefix`, `prediction`, and more."""
Records = dict[str, Record]


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
        self._main: Journal | None = None
        self._share: Journal | None = None
        refusal = self._open(settings) if group.main else None
        told = [text for text in group.gather(str(refusal) if refusal else "") if text]
        if told:  # by the first process; the others would wait for it for ever
            raise refusal or ConfigError(told[0])
        if group.world > 1:
            if not group.main:
                self.records = _by_id(read_lines(self.path), self.path)
            self._share = Journal(self.folder / f"predictions.rank{group.rank}.jsonl")
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
        file.append(new)
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
        try:
            self._main = Journal(self.path, self._busy)
        except VLMError as error:
            return error
        try:
            self.records = _by_id(self._main.records, self.path)
            self._add_shares()
            self._check_settings(settings)
        except VLMError as error:
            self._main.close()
            return error
        except BaseException:
            self._main.close()
            raise
        return None

    def _busy(self) -> ConfigError:
        return ConfigError(f"{self.folder}: another evaluation is writing here; give another output folder")

    def _add_shares(self) -> None:
        """Move what the processes of this run, or of one that was killed, have written into the one file.

        A kill between the writing and the deleting leaves records in both places: those are not added again.
        """
        assert self._main is not None
        stored = set(_by_id(read_lines(self.path), self.path))
        for path in sorted(self.folder.glob(_SHARES)):
            found = _by_id(read_lines(path), path)
            new = [record for key, record in found.items() if key not in stored]
            stored.update(record["id"] for record in new)
            self._main.append(new)
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
        told = words.differences(found, wanted, _HASHES)
        if told:
            raise ConfigError(
                f"{self.folder} holds {len(self.records)} predictions made with other settings ({'; '.join(told)});"
                " give another output folder, or delete this one to predict again"
            )


def _by_id(found: Iterable[dict[str, Any]], path: Path) -> Records:
    """The records of a predictions file by id."""
    records: Records = {}
    for number, record in enumerate(found, 1):
        if not all(isinstance(record.get(key), str) for key in ("id", "prediction")):
            got = json.dumps(record)[:80]
            raise DataError(f"{path}:{number}: expected an object with the texts id and prediction, got {got}")
        if record["id"] in records:
            raise DataError(f"{path}:{number}: id {record['id']!r} occurs twice; delete {path.parent}")
        records[record["id"]] = record
    return records
