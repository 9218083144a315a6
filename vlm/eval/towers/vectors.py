"""Vectors on disk, appended as they are made: a killed run goes on where it stopped.

`NAME.jsonl` holds one vector a line, by the content of what it was made from; `NAME.settings.json` beside it says which
model made them. So a picture that several tasks show is embedded once, and one that was changed is embedded again.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from vlm.data.content import of_files, of_picture
from vlm.errors import ConfigError, DataError, ImageError
from vlm.eval.towers.contract import Embedder, Features, Picture, View
from vlm.files import Journal, write_json
from vlm.generation.engine import MAX_BAD_IN_A_ROW
from vlm.generation.progress import Progress
from vlm.words import differences

FOLDER = "vectors"
UNREADABLE = "unreadable"
"""What `vlm.data.content` calls a file that cannot be read."""
TEXTS_AT_ONCE = 256
_DIGESTS = {
    "model.weights": "weights of the model",
    "model.configuration": "configuration of the model",
    "model.texts.tokenizer": "tokenizer",
}
"""Settings that are digests -> what they are of."""


class Kept:
    """The vectors of one file, open for appending; a context manager.

    Args:
        path: without its suffix. settings: everything that decides the vectors, as JSON values.

    Raises:
        ConfigError: the file holds vectors of other settings, or another run is writing there.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(path.with_suffix(".jsonl"), self._busy)
        try:
            self.vectors = {record["key"]: _decoded(record["vector"]) for record in self._journal.records}
            self.cut = {record["key"] for record in self._journal.records if record.get("cut")}
            self._journal.records.clear()
            self._check(json.loads(json.dumps(settings)))
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()

    def add(self, keys: Sequence[str], vectors: Tensor, cut: Collection[str] = ()) -> None:
        """Write float32[n, D] and wait until they are on the disk. Raises DataError for NaN or infinity.

        Args:
            cut: keys of texts that were longer than the model reads.
        """
        rows = np.ascontiguousarray(vectors.float().numpy(), dtype="<f4")
        if not np.isfinite(rows).all():
            odd = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
            raise DataError(f"the model gives NaN or infinity for item {odd + 1} of a batch of {len(rows)}")
        told = {key: {"cut": True} for key in cut}
        self._journal.append(
            {"key": key, "vector": _encoded(row), **told.get(key, {})} for key, row in zip(keys, rows, strict=True)
        )
        self.vectors.update(zip(keys, rows, strict=True))
        self.cut.update(cut)

    def rows(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(float32[N, D], bool[N]): the vectors by key, zeros where there is none."""
        width = len(next(iter(self.vectors.values()))) if self.vectors else 1
        there = np.array([key in self.vectors for key in keys], bool)
        rows = np.zeros((len(keys), width), np.float32)
        for place, key in enumerate(keys):
            if there[place]:
                rows[place] = self.vectors[key]
        return rows, there

    def _busy(self) -> ConfigError:
        return ConfigError(f"{self.path.parent}: another evaluation is writing here; give another output folder")

    def _check(self, wanted: Mapping[str, Any]) -> None:
        path = self.path.with_suffix(".settings.json")
        if not self.vectors:
            write_json(path, wanted)  # before the first vector, so that none is ever without its settings
            return
        if not path.is_file():
            raise ConfigError(f"{self.path}.jsonl has vectors but {path.name} is missing; give another output folder")
        found = json.loads(path.read_text(encoding="utf-8"))
        told = differences(found, wanted, _DIGESTS)
        if told:
            raise ConfigError(
                f"{self.path.parent} holds {len(self.vectors)} vectors made with other settings"
                f" ({'; '.join(told)}); give another output folder, or delete this one to embed again"
            )


def _encoded(row: np.ndarray) -> str:
    return base64.b64encode(row.tobytes()).decode("ascii")


def _decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)


# --- pictures ---------------------------------------------------------------------------------------------------------


def keys_of(images: Sequence[Picture]) -> list[str]:
    """A key for each picture, from what is in its file: the same picture has the same key wherever it lies."""
    digests = of_files(dict.fromkeys(image for image in images if isinstance(image, Path)))
    found = [digests[image] if isinstance(image, Path) else of_picture(image) for image in images]
    return [f"{key} {image}" if key == UNREADABLE else key for key, image in zip(found, images, strict=True)]


def embed_images(
    embedder: Embedder,
    kept: Kept,
    images: Mapping[str, Picture],
    *,
    batch_size: int,
    view: View,
    features: Features,
    progress: bool,
) -> dict[str, ImageError]:
    """Embed what is not there yet; returns the pictures that could not be read, by key.

    Raises:
        DataError: no picture at all, or too many in a row, can be read.
    """
    missing = {key: image for key, image in images.items() if key not in kept.vectors}
    bad: dict[str, ImageError] = {}
    in_a_row = 0
    with Progress(len(images), done=len(images) - len(missing), label="images", visible=progress) as bar:
        for batch in embedder.images(missing.items(), batch_size=batch_size, view=view, features=features):
            kept.add(batch.keys, batch.vectors)
            bad.update(batch.bad)
            in_a_row = 0 if len(batch.keys) else in_a_row + len(batch.bad)
            if in_a_row >= MAX_BAD_IN_A_ROW:
                raise DataError(f"{in_a_row} images in a row could not be decoded; the last: {batch.bad[-1][1]}")
            bar.advance(len(batch.keys) + len(batch.bad))
    if images and len(bad) == len(images):
        raise DataError(f"none of the {len(images)} images could be decoded; the first: {next(iter(bad.values()))}")
    return bad


# --- texts ------------------------------------------------------------------------------------------------------------


def text_key(texts: Iterable[str]) -> str:
    """The key of a text, or of the texts of a class."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def embed_texts(embedder: Embedder, kept: Kept, groups: Sequence[tuple[str, ...]], *, progress: bool) -> None:
    """Embed what is not there yet: each group of texts is one vector, the mean of its texts, of length 1."""
    missing = {text_key(group): place for place, group in enumerate(groups)}
    waiting = [(key, place) for key, place in missing.items() if key not in kept.vectors]
    with Progress(len(waiting), label="texts", visible=progress and bool(waiting)) as bar:
        for chunk in _chunks(waiting, lambda one: len(groups[one[1]]), TEXTS_AT_ONCE):
            sizes = [len(groups[place]) for _, place in chunk]
            found = embedder.texts([text for _, place in chunk for text in groups[place]])
            parts = found.vectors.split(sizes)
            rows = [part.double().mean(0) for part in parts]
            owners = np.repeat([key for key, _ in chunk], sizes)
            kept.add([key for key, _ in chunk], _stacked(rows), {str(owners[index]) for index in found.cut})
            bar.advance(len(chunk))


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    import torch
    from torch.nn.functional import normalize

    return normalize(torch.stack(list(rows)), dim=-1).float()


def _chunks(items: Sequence[Any], size: Callable[[Any], int], most: int) -> Iterable[list[Any]]:
    """Runs of items whose sizes add up to at most `most`, at least one item each."""
    chunk: list[Any] = []
    total = 0
    for item in items:
        if chunk and total + size(item) > most:
            yield chunk
            chunk, total = [], 0
        chunk.append(item)
        total += size(item)
    if chunk:
        yield chunk
