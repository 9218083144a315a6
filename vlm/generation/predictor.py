"""What the harness asks for predictions, and the one that runs our own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from PIL import Image

from vlm import ranks

if TYPE_CHECKING:
    from vlm.model.forward import VLM
    from vlm.model.processor import Processor


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is generated; greedy unless `num_beams` is above 1. Part of what identifies a set of predictions."""

    max_new_tokens: int = 64
    num_beams: int = 1
    beam_search: str = "transformers"
    """Whose rule of beam search; see `vlm.generate`."""
    by: Literal["generate", "likelihood"] = "generate"
    """`generate` writes text; `likelihood` takes the most likely of an item's candidates."""
    normalization: Literal["none", "token", "byte"] = "none"
    """Of `likelihood`; see `vlm.generation.likelihood`."""

    def to_dict(self) -> dict[str, Any]:
        """What counts for this way of answering."""
        values = asdict(self)
        if self.by == "likelihood":
            return {"by": self.by, "normalization": self.normalization}
        del values["by"], values["normalization"]
        if self.num_beams == 1:
            del values["beam_search"]  # greedy has no beams
        return values


Pictures = Image.Image | list[Image.Image]
"""The image of an item, or its images where it has several."""


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


class ModelPredictor:
    """A `vlm` model with its processor, through `vlm.generate`.

    Args:
        model, processor: what `vlm.load` returns.
        name: what reports call it, such as the directory it came from.
    """

    def __init__(self, model: VLM, processor: Processor, *, name: str) -> None:
        self.model = model
        self.processor = processor
        self.name = name

    @property
    def background(self) -> tuple[int, int, int]:
        return self.processor.image_transform.background

    @property
    def device(self) -> str:
        return str(self.model.device)

    def identity(self) -> dict[str, Any]:
        """What `vlm.checkpoints.identity` says of model and processor, and the image transform in words."""
        from vlm.checkpoints import identity

        return {
            **identity.of_model(self.model, self.processor),
            "images": self.processor.image_transform.describe(),
        }

    def lengths(
        self, image_sizes: Sequence[Sequence[tuple[int, int]]], prompts: Sequence[str], *, ids: Sequence[str]
    ) -> list[int]:
        """Image and prompt tokens of each item, from the (width, height) of its images."""
        return self.processor.lengths(image_sizes, prompts, ids=ids)

    def predict(
        self, images: Sequence[Pictures], prompts: Sequence[str], *, ids: Sequence[str], decoding: Decoding
    ) -> Sequence[str]:
        from vlm.generation.engine import generate

        return generate(
            self.model,
            self.processor,
            images,
            prompts,
            ids=ids,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            beam_search=decoding.beam_search,  # type: ignore[arg-type]  # checked there
            batch_size=len(prompts),
        )

    def score(
        self,
        images: Sequence[list[Image.Image]],
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        ids: Sequence[str],
        normalization: Literal["none", "token", "byte"],
    ) -> list[list[float]]:
        """Log-likelihoods of the candidates of each prompt; see `vlm.generation.likelihood`."""
        from vlm.generation.likelihood import score_candidates

        return score_candidates(
            self.model,
            self.processor,
            images,
            prompts,
            candidates,
            normalization=normalization,
            batch_size=len(prompts),
            ids=ids,
        )


def as_predictor(
    model: str | Path | tuple[VLM, Processor] | Predictor,
    *,
    device: str | None,
    dtype: str | None,
    geometry: Mapping[str, Any] | None = None,
) -> tuple[Predictor, str]:
    """A predictor and its name, from a model directory or hub id, a (model, processor) pair, or a predictor.

    A directory is opened on `device`, by default a GPU if there is one (of several processes each takes its own), else
    the CPU. A pair stays where it is unless `device` is given; its dtype is its own. `geometry` is how the model reads
    its images, if not as it is (`vlm.checkpoints.geometry.with_geometry`).

    Raises:
        ConfigError: `dtype` with a pair, `device`, `dtype` or `geometry` with a predictor, or a geometry that the model
            cannot have.
        CheckpointError, GenerationError: as `vlm.load`.
    """
    from vlm.errors import ConfigError

    if isinstance(model, str | Path):
        import torch

        from vlm.checkpoints.directory import load

        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if chosen == "cuda":
            chosen = f"cuda:{ranks.local_rank() % torch.cuda.device_count()}"
        opened = load(model, dtype=dtype, device=chosen)
        return ModelPredictor(*_in_geometry(opened, geometry), name=str(model)), str(model)
    if dtype is not None:
        raise ConfigError(
            f"dtype={dtype!r} can only be chosen when a model directory is opened; convert the model itself"
        )
    if isinstance(model, tuple):
        network, processor = _in_geometry(model, geometry)
        name = type(network).__name__
        if device:
            network.to(device)  # type: ignore[arg-type]  # transformers wraps `to` with a wrong signature
        return ModelPredictor(network, processor, name=name), name
    if geometry:
        raise ConfigError(f"a {type(model).__name__} reads images in its own way; leave {', '.join(geometry)} out")
    if device is not None:
        raise ConfigError(f"device={device!r} cannot be applied to a {type(model).__name__}; place it yourself")
    return model, type(model).__name__


def _in_geometry(opened: tuple[VLM, Processor], geometry: Mapping[str, Any] | None) -> tuple[VLM, Processor]:
    from vlm.checkpoints.geometry import with_geometry

    return with_geometry(*opened, **geometry) if geometry else opened
