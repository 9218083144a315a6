"""What the evaluation of embeddings needs of a model: anything that has these methods can be evaluated.

`vlm.siglip.embedder.Embedder` is one for a dual tower and its processor; another model may bring its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image
from torch import Tensor

from vlm.errors import ImageError

Picture = Path | Image.Image
View = Literal["plain", "paper"]
"""How a picture is brought to the tower's size: as the model's own processor does, or as SigLIP's published zero-shot
figures were made."""
Features = Literal["pooled", "mean"]
"""What stands for a picture: the embedding beside texts, or the mean of the patch features."""


class Encoded(Protocol):
    """A batch of pictures."""

    @property
    def keys(self) -> Sequence[Any]:
        """Of those that could be read."""

    @property
    def vectors(self) -> Tensor:
        """float32[n, D], on the CPU."""

    @property
    def bad(self) -> Sequence[tuple[Any, ImageError]]:
        """Key and reason of those that could not."""


class TextVectors(Protocol):
    """Embeddings of texts."""

    @property
    def vectors(self) -> Tensor:
        """float32[N, D] on the CPU, of length 1."""

    @property
    def cut(self) -> Sequence[int]:
        """Indexes of the texts that were longer than the model reads."""


class Embedder(Protocol):
    """A model that makes vectors of pictures and texts, by its own rules for both."""

    @property
    def name(self) -> str:
        """What the results call it; published figures are found by it."""

    @property
    def tokens(self) -> int | None:
        """The patch budget of a NaFlex tower, for which figures are published; None elsewhere."""

    @property
    def pools(self) -> bool:
        """Whether it has an embedding of a whole picture; else only the mean of its patch features."""

    def identity(self) -> Mapping[str, Any]:
        """What decides its vectors, as JSON values: digests of weights and settings."""

    def images(
        self, images: Iterable[tuple[str, Picture]], *, batch_size: int, view: View, features: Features
    ) -> Iterator[Encoded]:
        """Every picture once, by its key, in `keys` or in `bad`. Pooled embeddings have length 1.

        Raises:
            ConfigError: the model cannot give these features.
        """

    def texts(self, texts: Sequence[str]) -> TextVectors:
        """Texts as they are, in the order given. Raises ConfigError where the model reads none."""

    def prompts(self, names: Sequence[str], templates: str, *, canonical: bool) -> list[tuple[str, ...]]:
        """The texts that stand for each class; the mean of their embeddings is the class.

        Args:
            templates: a name (`imagenet`, `none`), one template with `{}`, or "" for the model's own.
            canonical: lower case and no punctuation in names and templates, as in big_vision's evaluation.

        Raises:
            ConfigError, DataError: no such templates, or a template without the place of the class.
        """

    def describe(self, view: View) -> Mapping[str, Any]:
        """How it reads pictures and texts, for the results."""
