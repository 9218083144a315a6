"""Class vectors kept on the disk: a thousand classes in 81 templates are 81,000 texts, and the same ones every time.

A file for each chunk of classes, named by a digest of everything that decides its numbers: weights, text rule,
tokenizer, versions of the libraries, and the texts themselves. So nothing in it can be out of date, a changed label set
embeds only the chunks that changed, and a run that was killed goes on where it was. Files appear whole, by rename; two
processes that write the same one write the same bytes. A file that is damaged is made anew, a disk that takes none is
told once, and the run goes on without.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.checkpoints.digests import of_tensors, of_values
from vlm.errors import DiskError
from vlm.files import disk_errors, publishing_file, rust_disk_errors

log = logging.getLogger(__name__)
MOST_FILES = 256
"""The files that were used last stay; the largest has some 20 MB."""
WORTH = {"cpu": 32, "cuda": 8192}
"""From so many texts on it is worth reading all weights for their digest: about 1.5 GB/s, as long as it takes to embed
so many texts of the same model."""


def worth_keeping(num_texts: int, device: torch.device) -> bool:
    """Whether looking for so many texts costs less than embedding them."""
    return num_texts >= WORTH.get(device.type, WORTH["cuda"])


def default_folder() -> Path | None:
    """`$XDG_CACHE_HOME/vlm/classes`, by default in `~/.cache`; None where there is no home."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    home = given if given.is_absolute() else Path(os.path.expanduser("~/.cache"))
    return home / "vlm" / "classes" if home.is_absolute() else None


class ClassCache:
    """Rows of `class_embeddings` by their texts.

    Args:
        folder: made when something is first put there.
        space: gives what decides the numbers beside the texts, as JSON values; asked once, when it is needed.
    """

    def __init__(self, folder: Path, space: Callable[[], Mapping[str, Any]]) -> None:
        self.folder = folder
        self._space = space
        self._writable = True

    @cached_property
    def _model(self) -> str:
        return of_values(self._space())

    def path(self, chunk: Sequence[tuple[str, ...]]) -> Path:
        """Where the rows of these classes are kept."""
        return self.folder / f"{of_values([self._model, chunk])}.safetensors"

    def get(self, chunk: Sequence[tuple[str, ...]], size: int) -> tuple[Tensor, list[int]] | None:
        """The rows float32[C, size] and which texts were cut, as they were put there; None where there are none."""
        path = self.path(chunk)
        try:
            with safe_open(path, framework="pt") as file:
                rows, about = file.get_tensor("rows"), file.metadata()
            if tuple(rows.shape) != (len(chunk), size) or about["sha256"] != of_tensors([("rows", rows)]):
                raise ValueError("damaged")
            os.utime(path)  # the ones used last stay
            return rows, [int(number) for number in about["cut"].split()]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def put(self, chunk: Sequence[tuple[str, ...]], rows: Tensor, cut: Sequence[int]) -> None:
        """Keep rows. A disk that takes none is told once."""
        if not self._writable:
            return
        about = {"sha256": of_tensors([("rows", rows)]), "cut": " ".join(map(str, cut))}
        try:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with publishing_file(self.path(chunk), several=True) as partial, rust_disk_errors():
                save_file({"rows": rows.contiguous()}, partial, about)
            self._make_room()
        except DiskError as error:
            self._writable = False
            log.warning("label embeddings are not kept for the next time: %s", error)

    def _make_room(self) -> None:
        with disk_errors(self.folder):
            files = sorted(self.folder.glob("*.safetensors"), key=_age)
            for path in files[:-MOST_FILES]:
                path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has just removed it
        return 0.0
