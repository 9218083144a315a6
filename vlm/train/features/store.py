"""Features of a frozen tower on the disk, and batches that carry them in place of pixels.

    STAGE/features/
        shard-00000.safetensors   `features` float[T, E]: the images of the shard one after the other;
                                  `lengths` int64[n], `grids` int64[n, 2]: of each image, 0 where it did not decode.
                                  In its metadata: what it was made of (`Plan.identity`), failures, whether masked

Which image is in which shard depends on the data alone. A shard is written under another name, synced and renamed: it
is complete or not there, and a run that was killed goes on with the ones that are missing. One that was made of another
tower, image transform, precision or of other image files is made again.

A sample is read with one read of the file at its place, which the system's page cache serves; nothing stays in memory
but lengths, offsets and grids. Run directories are on a disk that all ranks share, so each rank reads all shards.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.checkpoints.digests import of_values
from vlm.data import content
from vlm.data.examples import Example
from vlm.errors import ConfigError, ImageError
from vlm.files import publishing_file

log = logging.getLogger(__name__)

SHARD_BYTES = 128 * 2**20
"""About the size of a shard, and so of what a rank holds in memory and a kill costs while features are made."""


class Plan:
    """Which image's features are in which shard.

    Args:
        folder: of the shards. examples: of the stage; an image that several of them name is encoded once.
        image_bytes: the most that the features of one image take.
        identity: what the features depend on beside the images: name -> anything that JSON can hold.

    Raises `ConfigError` for an image that is no file.
    """

    def __init__(
        self, folder: Path, examples: Sequence[Example], *, image_bytes: int, identity: Mapping[str, Any]
    ) -> None:
        numbers: dict[Path, int] = {}
        images_of: list[tuple[int, ...]] = []
        for example in examples:
            for image in example.images:
                if not isinstance(image, Path):
                    raise ConfigError(f"example {example.id}: cache_features needs image files, got an image in memory")
                numbers.setdefault(image, len(numbers))
            images_of.append(tuple(numbers[image] for image in example.images if isinstance(image, Path)))
        self.folder = folder
        self.images = list(numbers)
        self.images_of = images_of
        """Numbers of the images of each example."""
        self.per_shard = max(1, SHARD_BYTES // image_bytes)
        self._identity = {name: of_values(value) for name, value in identity.items()}

    @property
    def shards(self) -> int:
        return -(-len(self.images) // self.per_shard)

    def members(self, shard: int) -> range:
        """Numbers of the images in a shard."""
        return range(len(self.images))[shard * self.per_shard : (shard + 1) * self.per_shard]

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def identity(self, shard: int) -> dict[str, str]:
        """What the features of a shard depend on: digests, that of the images' content too."""
        images = [self.images[i] for i in self.members(shard)]
        contents = content.of_files(images)
        return {**self._identity, "images": of_values([contents[image] for image in images])}

    def outdated(self, shard: int) -> list[str] | None:
        """What a shard on the disk was made of that is another now (`["missing"]` without one), or None."""
        path = self.path(shard)
        if not path.exists():
            return ["missing"]
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
        except (OSError, SafetensorError):
            return ["damaged"]
        return [name for name, value in self.identity(shard).items() if found.get(name) != value] or None

    def write(
        self,
        shard: int,
        outputs: Mapping[int, tuple[Tensor, tuple[int, int]]],
        failures: Mapping[int, Any],
        **extra: Any,
    ) -> None:
        """Write a shard.

        Args:
            outputs: image number -> (float[P, E], grid). failures: image number -> (code, message).
            extra: more metadata: `identity`, as it was before the images were read, and `masked`.
        """
        members = self.members(shard)
        lengths = torch.tensor([len(outputs[i][0]) if i in outputs else 0 for i in members])
        grids = torch.tensor([outputs[i][1] if i in outputs else (0, 0) for i in members])
        features = [outputs[i][0] for i in members if i in outputs]
        tensors = {"features": torch.cat(features) if features else torch.zeros(0, 1), "lengths": lengths}
        metadata = {**extra["identity"], "masked": json.dumps(extra["masked"]), "failures": json.dumps(dict(failures))}
        with publishing_file(self.path(shard)) as partial:
            save_file({**tensors, "grids": grids}, partial, metadata)


def remove(folder: Path, stage: str) -> None:
    """Delete the features of a stage that is finished."""
    if folder.exists():
        size = sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
        log.info("stage %s: deleted its cached features, %.1f MB", stage, size / 1e6)


class FeatureStore:
    """The features of a plan whose shards are complete."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._failures: dict[int, tuple[str, str]] = {}
        self.masked = False
        lengths, grids, offsets = [], [], []
        for shard in range(plan.shards):
            with safe_open(plan.path(shard), framework="pt") as file:
                metadata = file.metadata()
                lengths.append(file.get_tensor("lengths").numpy())
                grids.append(file.get_tensor("grids").numpy())
            offsets.append(np.cumsum(lengths[-1]) - lengths[-1])
            self.masked |= json.loads(metadata["masked"])
            self._failures.update({int(i): tuple(said) for i, said in json.loads(metadata["failures"]).items()})
        # No shard at all where every example is about text alone.
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
        self._lengths, self._offsets, self._grids = (
            np.concatenate([none, *parts]) for none, parts in zip(empty, (lengths, offsets, grids), strict=True)
        )

    @property
    def failed(self) -> int:
        """Images that did not decode."""
        return len(self._failures)

    def grid(self, example: int, number: int = 0) -> tuple[int, int]:
        """(rows, columns) of one of an example's images. Raises the `ImageError` with which it did not decode."""
        image = self._plan.images_of[example][number]
        if image in self._failures:
            raise ImageError(*self._failures[image])
        rows, columns = self._grids[image]
        return int(rows), int(columns)

    def read(self, example: int, number: int = 0) -> Tensor:
        """float[P, E]: the features of one of an example's images, in the dtype that the tower gave."""
        image = self._plan.images_of[example][number]
        start = int(self._offsets[image])
        with safe_open(self._plan.path(image // self._plan.per_shard), framework="pt") as file:
            features: Tensor = file.get_slice("features")[start : start + int(self._lengths[image])]
        return features
