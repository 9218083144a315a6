"""A folder of vectors as a command holds it: what is in it, the model that asks it, pictures and texts of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.cli import console
from vlm.cli.options import chosen_device
from vlm.errors import ConfigError, VLMError
from vlm.images.load import FilePart
from vlm.siglip import space
from vlm.siglip.encode import encode_images, encode_texts
from vlm.siglip.search import index
from vlm.siglip.search.asking import Searcher
from vlm.siglip.search.exact import Exact
from vlm.siglip.store import VectorStore, picture_of


class Opened:
    """A folder of vectors as it is now, and the model that asks it.

    Args:
        path: of the folder. load: opens a model, as `vlm.siglip.load` does.
        model: instead of the one that the folder names. device: `auto`, `cpu` or `cuda`.
        index: kind and engine of the index to search through; None searches the vectors themselves.

    Raises:
        ConfigError: no vectors; or (once the model is needed) a model of another space.
    """

    def __init__(
        self,
        path: Path,
        load: Callable[..., tuple[Any, Any]],
        model: str | None = None,
        device: str = "auto",
        index: tuple[str, str] | None = None,
    ) -> None:
        self.path, self.store = path, VectorStore.open(path)
        self._load, self._device, self._index = load, device, index
        self._named = model is not None
        self.model_name: str = model or self.store.manifest["model"]

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """(model, processor), of the vectors' own space."""
        console.quiet_transformers()
        wanted = self.store.space
        try:
            opened = self._load(self.model_name, device=chosen_device(self._device), dtype=wanted.get("dtype"))
        except VLMError as error:
            if self._named:
                raise
            said = str(error).rstrip(".")
            raise ConfigError(
                f"the model that made {self.path}: {said}; if it has moved, name it with --model"
            ) from error
        space.check(wanted, space.of(*opened), str(self.path), writing=False)
        return opened

    @cached_property
    def searcher(self) -> Searcher:
        """Answers queries; the model is opened when one needs it."""
        exact, store = self.exact, self.store
        top = exact.top
        if self._index and len(store):
            top = index.open_index(self.path, *self._index, exact, store.ids).top
        return Searcher(store.ids, store.info, self._vector, top, self._texts, self._images)

    @cached_property
    def exact(self) -> Exact:
        """The vectors, checked. Raises DataError."""
        return Exact(self.store.shards)

    def image(self, row: int) -> Path | FilePart | None:
        """The picture of a row, None where it has none."""
        place = picture_of(self.store.rows[row])
        if place is None:
            return None
        path = Path(place["path"])
        return FilePart(path, place["offset"], place["size"], place["member"]) if "member" in place else path

    def text(self, row: int) -> str:
        """The text of a row, "" where it has none."""
        return self.store.rows[row].get("text") or ""

    def _vector(self, row: int) -> Tensor:
        return self.exact.vectors(torch.tensor([row]))[0]

    def _texts(self, texts: Sequence[str]) -> tuple[Tensor, tuple[int, ...]]:
        return encode_texts(*self.model, texts)

    def _images(self, images: Sequence[Any]) -> Tensor:
        parts = []
        for encoded in encode_images(*self.model, enumerate(images)):
            for _, error in encoded.bad:
                raise error
            parts.append(encoded.vectors)
        return torch.cat(parts)
