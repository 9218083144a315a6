"""The released checkpoints, from `models.yaml`: what each is, what it costs, what its papers say of it, and its traps.

Parameters are those of the configuration; PaliGemma's with the 257,216 rows of the Hub's embedding (big_vision has
257,152: 64 fewer). A PaliGemma tower has no pooling head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from vlm import settings
from vlm.errors import ConfigError, nearest

FILE = Path(__file__).parent / "models.yaml"


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """A transformer of images or of text."""

    width: int
    depth: int
    heads: int
    mlp: int


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A Gemma."""

    model_type: str
    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A released checkpoint.

    Attributes:
        id: on the Hub.
        family: `siglip`, `siglip2`, `siglip2_naflex`, `paligemma` or `paligemma2`.
        tower: the shape of the vision tower, a key of `Catalogue.towers`; patch: pixels on a side of a patch.
        image_size: side of the square images; None where they keep their aspect ratio.
        tokens: patches of an image; the default budget where images keep their aspect ratio.
        decoder: a key of `Catalogue.decoders`; None for the two towers of SigLIP.
        vocabulary: rows of the text embedding. context: text positions.
        parameters: by part, and `total`.
        published: figure -> value; `Catalogue.figures` says what each is.
        imagenet_by_patches: budget of patches -> ImageNet-1k zero-shot.
        traps: what goes wrong with it elsewhere, a sentence each.
    """

    id: str
    family: str
    tower: str
    patch: int
    image_size: int | None = None
    tokens: int
    decoder: str | None = None
    vocabulary: int
    context: int
    parameters: dict[str, int]
    licence: str
    published: dict[str, float] = field(default_factory=dict)
    imagenet_by_patches: dict[str, float] = field(default_factory=dict)
    traps: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The id without its owner."""
        return self.id.rpartition("/")[2]

    @property
    def fine_tuned(self) -> bool:
        """Whether it was fine-tuned for one task."""
        return "-ft-" in self.id

    @property
    def image(self) -> str:
        """`224 px`, or `any shape`."""
        return f"{self.image_size} px" if self.image_size else "any shape"


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The file.

    Attributes:
        sources: family -> where its figures stand; NaFlex is SigLIP 2's.
        figures: name -> what it measures.
    """

    sources: dict[str, str]
    figures: dict[str, str]
    towers: dict[str, TowerShape]
    decoders: dict[str, DecoderShape]
    checkpoints: tuple[Checkpoint, ...]

    def source(self, checkpoint: Checkpoint) -> str:
        """Where the figures of a checkpoint stand."""
        return self.sources[checkpoint.family.removesuffix("_naflex")]


@cache
def load() -> Catalogue:
    """Everything that the file holds."""
    return settings.load(Catalogue, FILE)


def find(words: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints whose ids hold all of these words, in the order of the file; one with exactly that id alone.

    Raises:
        ConfigError: there is none; the message names the nearest id.
    """
    every = load().checkpoints
    wanted = [word.lower() for word in words]
    exact = [one for one in every if wanted and one.id.lower() in (wanted[0], f"google/{wanted[0]}")]
    if len(wanted) == 1 and exact:
        return exact
    found = [one for one in every if all(word in one.id.lower() for word in wanted)]
    if not found:
        said = " ".join(words)
        raise ConfigError(
            f"no released checkpoint has {said!r} in its name{nearest(said, [one.name for one in every])};"
            " `vlm models` lists them"
        )
    return found
