"""Whoever answers prompts about images, as the engine sees them: protocols, and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

from vlm.generation.decoding import Decoding, Normalization

Finish = Literal["eos", "length"]
Pictures = Image.Image | list[Image.Image]
"""The image of an item, or its images where it has none or several."""


class Answer(str):
    """A generated text that knows how it ended.

    Attributes:
        finish: `eos`, the model had said all; `length`, it was cut at `max_new_tokens`.
    """

    finish: Finish

    def __new__(cls, text: str, finish: Finish) -> Answer:
        self = super().__new__(cls, text)
        self.finish = finish
        return self

    def __getnewargs__(self) -> tuple[str, Finish]:  # type: ignore[override]  # copies and pickles keep `finish`
        return str(self), self.finish


class Predictor(Protocol):
    """Anything that answers prompts about images. The answer to an item must not depend on its batch mates."""

    @property
    def background(self) -> tuple[int, int, int]:
        """RGB shown behind transparent pixels when an image is decoded."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the predictions (weights, preprocessing), as JSON values."""
        ...

    def predict(
        self, images: Sequence[Any], prompts: Sequence[str], *, ids: Sequence[str], decoding: Decoding
    ) -> Sequence[str]:
        """One text per prompt, in order. Images are upright RGB, a list of them where an item has several; `ids` are
        for error messages."""
        ...


# What a predictor may have beside that. One of the user's own need not.


@runtime_checkable
class Scores(Protocol):
    """Can choose by likelihood."""

    def score(
        self,
        images: Sequence[list[Image.Image]],
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        ids: Sequence[str],
        normalization: Normalization,
    ) -> list[list[float]]:
        """Log-likelihoods of the candidates of each prompt; see `vlm.generation.likelihood`."""
        ...


@runtime_checkable
class Measures(Protocol):
    """Knows how long an item is, for batches by a budget of tokens."""

    def lengths(
        self, image_sizes: Sequence[Sequence[tuple[int, int]]], prompts: Sequence[str], *, ids: Sequence[str]
    ) -> list[int]:
        """Image and prompt tokens of each item, from the (width, height) of its images."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """Has so many positions and no more."""

    def misfit(self, id: str, prompt: str, images: Sequence[Any]) -> str | None:
        """Why an item leaves no room for an answer, or None."""
        ...

    def too_long(self, examples: Sequence[Any], answers: Callable[[Any], Sequence[str]]) -> Mapping[int, Any]:
        """Position of an example -> the `vlm.data.problems.Problem` that says why it does not fit."""
        ...


class Network(Protocol):
    """What writing and scoring ask of a model: `vlm.VLM`, or a small one in a test."""

    config: Any

    @property
    def device(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_input_embeddings(self) -> Any: ...

    def modules(self) -> Iterable[Any]: ...
