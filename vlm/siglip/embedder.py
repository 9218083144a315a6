"""A model of two towers and its processor as what `vlm.eval.evaluate_towers` asks: vectors of pictures and texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.checkpoints.digests import canonical, of_module, of_values
from vlm.checkpoints.directory import READERS, open_model
from vlm.checkpoints.files import read_json
from vlm.checkpoints.opening import Opening
from vlm.checkpoints.places import locate
from vlm.errors import ConfigError
from vlm.images.transforms import ImageTransform, Pixels
from vlm.model.modes import in_mode
from vlm.siglip import space
from vlm.siglip.encode import Encoded, TextVectors, check_finite, encode_images, encode_texts
from vlm.siglip.features import mean_of_patches
from vlm.siglip.loading import load
from vlm.siglip.processor import DualProcessor
from vlm.siglip.reading import on, read_ahead
from vlm.siglip.templates import TEMPLATES, given, named, prompts

MEAN_OF = ("siglip", "siglip2_naflex")
"""Towers whose last hidden states are patches alone."""
ENLARGED = 0.875
"""The paper's pictures are resized to size / 0.875, and the middle is cut out: big_vision `_square875`."""


def opened(
    path: str,
    *,
    pictures_only: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    max_num_patches: int | None = None,
) -> Embedder | TowerEmbedder:
    """A model directory or hub id as what an evaluation asks.

    Args:
        pictures_only: no text is embedded, so the vision tower of a model that writes text will do.
        max_num_patches: another patch budget than the NaFlex model's.

    Raises:
        ConfigError: a model that has no text tower, where texts are embedded; a budget for a tower of squares.
        CheckpointError: as `vlm.siglip.load`.
    """
    folder = None if Path(path).suffix == ".npz" else locate(path)
    if folder is not None and (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("model_type")
        if kind in READERS:
            if not pictures_only:
                raise ConfigError(
                    f"{path} is a model that writes text (model_type {kind!r}): it has no text tower, so nothing tells"
                    " how near a picture and a text are. zeroshot and retrieval need two towers: SigLIP, SigLIP 2 or"
                    " CLIP; knn and linear read the vision tower of any model"
                )
            geometry = {} if max_num_patches is None else {"image": {"max_num_patches": max_num_patches}}
            model, processor = open_model(
                path, Opening(device=device, dtype=None if dtype == "auto" else dtype, geometry=geometry)
            )
            return TowerEmbedder(model.model.vision_tower, processor.image_transform, name=path)
    both, reader = load(path, device=device, dtype=dtype)
    if max_num_patches is not None:
        if not reader.transform.any_aspect:
            raise ConfigError(f"{path} reads squares, it has no patch budget; leave max_num_patches out")
        reader = replace(reader, transform=replace(reader.transform, max_num_patches=max_num_patches))
    return Embedder(both, reader, name=path)


@dataclass(frozen=True)
class Cropped:
    """A transform that resizes to size / 0.875 and cuts the middle out, as SigLIP's zero-shot figures have it.

    A tower that keeps the aspect ratio has no such rule, nor has one whose own transform cuts the middle out already:
    their own transform is theirs.
    """

    transform: ImageTransform

    @property
    def background(self) -> tuple[int, int, int]:
        """As that of the transform."""
        return self.transform.background

    def __call__(self, images: Sequence[Image.Image]) -> Pixels:
        """RGB images to pixels of the tower's own size."""
        side = self.transform.image_size or 0
        edge = int(side / ENLARGED)
        larger = replace(self.transform, image_size=edge)(images)
        start = (edge - side) // 2
        cut = larger.pixel_values[..., start : start + side, start : start + side].contiguous()
        return larger._replace(pixel_values=cut)


class Embedder:
    """Vectors by a model's own rules, for an evaluation.

    Args:
        model: a `vlm.model.dual.DualTower`. processor: its `DualProcessor`.
        name: what results call it; published figures are found by it, as `google/siglip-base-patch16-224`.
        batch_size: of texts.
    """

    def __init__(self, model: Any, processor: DualProcessor, *, name: str = "model", batch_size: int = 64) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self._batch_size = batch_size

    pools = True

    @property
    def tokens(self) -> int | None:
        """The patch budget of a NaFlex tower."""
        return self.processor.transform.max_num_patches if self.processor.transform.any_aspect else None

    @cached_property
    def _space(self) -> space.Space:
        return space.of(self.model, self.processor)

    def identity(self) -> Mapping[str, Any]:
        """What decides its vectors: the space that the model makes."""
        return self._space

    def images(
        self, images: Iterable[tuple[str, Any]], *, batch_size: int, view: str, features: str
    ) -> Iterator[Encoded]:
        """Every picture once, by its key, in `keys` or in `bad`.

        Args:
            view: `plain`, by the processor; `paper`, see `Cropped`.
            features: `pooled`, embeddings of length 1; `mean`, of the last layer's patch features.

        Raises:
            ConfigError: the mean is asked of a model whose image tower is not SigLIP's.
        """
        transform: Any = self.processor.transform
        if view == "paper" and self._cuts:
            transform = Cropped(transform)
        if features == "pooled":
            yield from encode_images(
                self.model, replace(self.processor, transform=transform), images, batch_size=batch_size
            )
            return
        for keys, inputs, bad in read_ahead(transform, images, batch_size=batch_size):
            vectors = torch.zeros(0, 1)
            if keys:
                with torch.no_grad(), in_mode(self.model):
                    vectors = self._mean(on(inputs, self.model.device))
                check_finite(vectors, keys)
            yield Encoded(keys, vectors, bad)

    @property
    def _cuts(self) -> bool:
        return self.processor.transform.squashes

    def _mean(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.model.kind not in MEAN_OF:
            raise ConfigError(
                f"the mean of patch features is read of SigLIP towers, {self.name} is {self.model.kind!r}; leave"
                " --features out"
            )
        values = {**inputs, "pixel_values": inputs["pixel_values"].to(self.model.dtype)}
        features = self.model.model.vision_model(**values).last_hidden_state.float()
        mask = inputs.get("pixel_attention_mask")
        if mask is None:
            mean: Tensor = features.mean(1)
            return mean.cpu()
        weight = mask.to(features.dtype)[..., None]
        whole: Tensor = (features.masked_fill(weight == 0, 0) * weight).sum(1) / weight.sum(1)
        return whole.cpu()

    def texts(self, texts: Sequence[str]) -> TextVectors:
        """Texts by the family's rule, in the order given. Raises ConfigError where there is no tokenizer."""
        return encode_texts(self.model, self.processor, texts, batch_size=self._batch_size)

    def prompts(self, names: Sequence[str], templates: str, *, canonical: bool) -> list[tuple[str, ...]]:
        """The texts that stand for each class.

        Args:
            templates: a name of `vlm.siglip.templates`, or one template with `{}`; "" is `none`.
            canonical: canonicalise names and templates whatever the templates say.

        Raises:
            ConfigError: no such templates, or a template without the place of the class.
        """
        chosen = given([templates]) if "{" in templates and templates not in TEMPLATES else named(templates or "none")
        return prompts(names, replace(chosen, canonical=True) if canonical else chosen)

    def describe(self, view: str) -> Mapping[str, Any]:
        """How pictures and texts are read, for the results."""
        transform, rule = self.processor.transform, self.processor.rule
        cut = ""
        if view == "paper" and self._cuts:
            edge = int((transform.image_size or 0) / ENLARGED)
            cut = f", resized to {edge} px and the middle cut out"
        return {
            "images": f"{_images(transform)}{cut}",
            "text": f"{rule.case} case, punctuation {rule.punctuation}, {self.processor.context} tokens",
        }


class TowerEmbedder:
    """The vision tower of a model that writes text: the mean of its patch features, for k-NN and a linear probe.

    Args:
        encoder: a tower of `vlm.encoders`. transform: how pictures become its input.
    """

    def __init__(self, encoder: Any, transform: ImageTransform, *, name: str = "tower") -> None:
        self.encoder = encoder
        self.transform = transform
        self.name = name

    tokens: int | None = None
    pools = False

    def identity(self) -> Mapping[str, Any]:
        """What decides its vectors."""
        return {
            "weights": of_module(self.encoder),
            "configuration": of_values(canonical(self.encoder.config.to_dict())),
            "preprocessing": canonical(self.transform.to_dict()),
        }

    def images(
        self, images: Iterable[tuple[str, Any]], *, batch_size: int, view: str, features: str
    ) -> Iterator[Encoded]:
        """As `Embedder.images`. Raises ConfigError for pooled embeddings: there are none."""
        if features != "mean":
            raise ConfigError(
                f"{self.name} has no embedding of a whole picture; its features are the mean of the patches"
            )
        place = next(self.encoder.parameters())
        for keys, inputs, bad in read_ahead(self.transform, images, batch_size=batch_size):
            vectors = torch.zeros(0, 1)
            if keys:
                with torch.no_grad(), in_mode(self.encoder):
                    given = on({**inputs, "pixel_values": inputs["pixel_values"].to(place.dtype)}, place.device)
                    vectors = mean_of_patches(self.encoder(**given)).cpu()
                check_finite(vectors, keys)
            yield Encoded(keys, vectors, bad)

    def texts(self, texts: Sequence[str]) -> TextVectors:
        """Raises ConfigError: there is no text tower."""
        raise ConfigError(f"{self.name} has no text tower")

    def prompts(self, names: Sequence[str], templates: str, *, canonical: bool) -> list[tuple[str, ...]]:
        """Raises ConfigError: there is no text tower."""
        raise ConfigError(f"{self.name} has no text tower")

    def describe(self, view: str) -> Mapping[str, Any]:
        """How pictures are read, for the results."""
        return {"images": _images(self.transform), "vectors": "mean of the patch features"}


def _images(transform: ImageTransform) -> str:
    size = f"{transform.max_num_patches} patches" if transform.any_aspect else f"{transform.image_size} px"
    return f"{transform.mode}, {size}, {transform.resample}"
