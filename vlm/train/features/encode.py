"""Run a frozen tower once over the images of a stage, and put what it gives on the disk (`vlm.train.features`).

The ranks share the shards, each writing its own, and agree after every one of them: an error or a signal in one process
ends all of them at the same place. Which images are encoded together depends on the data alone.
"""

import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset

from vlm.checkpoints import identity
from vlm.encoders.contract import EncoderOutput
from vlm.errors import CheckpointError, ImageError, TrainingError, VLMError
from vlm.images.load import image_size, load_image
from vlm.images.transforms import ImageTransform, Pixels
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor
from vlm.train.batches import with_budget
from vlm.train.features.store import FeatureStore, Plan
from vlm.train.loader import loader
from vlm.train.plan import Stage
from vlm.train.signals import Stopped, StopSignal
from vlm.train.step import FrozenEncoderModule, StageModule

log = logging.getLogger(__name__)

BATCH_PATCHES = 8192
"""Patches that go through the tower at a time."""
TELL_EVERY_S = 30
Failures = dict[int, tuple[str, str]]


@dataclass
class Decoded:
    """Images that go through the tower together."""

    numbers: list[int] = field(default_factory=list)
    pixels: Pixels | None = None
    failures: Failures = field(default_factory=dict)


class ImageBatches(Dataset[Decoded]):
    """`dataset[range]` decodes the images of a plan with these numbers."""

    def __init__(self, plan: Plan, transform: ImageTransform) -> None:
        self._plan, self._transform = plan, transform

    def __getitem__(self, numbers: range) -> Decoded:
        item, images = Decoded(), []
        for number in numbers:
            try:
                images.append(load_image(self._plan.images[number], background=self._transform.background))
            except ImageError as error:
                item.failures[number] = (error.code, str(error))
                continue
            item.numbers.append(number)
        item.pixels = self._transform(images) if images else None
        return item


@dataclass
class Encoding:
    """The making of a stage's features.

    Attributes:
        stage: its name. tower: pixels to features, on `device`, without a graph. rank, world: of this process.
        workers: processes that decode images. should_stop: asked before every batch.
    """

    stage: str
    plan: Plan
    transform: ImageTransform
    tower: Callable[[Pixels], EncoderOutput]
    device: torch.device
    rank: int = 0
    world: int = 1
    workers: int = 0
    should_stop: Callable[[], bool] = lambda: False

    def run(self) -> FeatureStore | None:
        """Make what is missing or outdated; None when a signal stopped it.

        Raises `VLMError` on every rank when one has no room or cannot write.
        """
        missing = self._missing()
        self._agree(lambda: self._check_room(missing))
        own = [shard for shard in missing if shard % self.world == self.rank]
        items = iter(self._loader(own))
        began = told = time.monotonic()
        for first in range(0, self.plan.shards, self.world):
            shard = first + self.rank
            if not self._agree(lambda: self._encode(shard, items) if shard in own else None):  # noqa: B023
                return None
            if self.rank == 0 and time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                done = min((first + self.world) * self.plan.per_shard, len(self.plan.images))
                log.info("stage %s: %d of %d images encoded", self.stage, done, len(self.plan.images))
        stores: list[FeatureStore] = []
        self._agree(lambda: stores.append(self._open()))
        if missing and self.rank == 0:
            self._tell(stores[0], time.monotonic() - began)
        return stores[0]

    def _open(self) -> FeatureStore:
        try:
            return FeatureStore(self.plan)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"stage {self.stage}: process {self.rank} cannot read the features that were just made ({error}); the"
                f" run directory must be on a disk that all processes share"
            ) from error

    def _missing(self) -> list[int]:
        """Shards to be made; says why where that is not plain."""
        reasons = {shard: self.plan.outdated(shard) for shard in range(self.plan.shards)}
        found = {shard: why for shard, why in reasons.items() if why is not None}
        changed = sorted({reason for why in found.values() for reason in why} - {"missing"})
        if changed and self.rank == 0:
            count = sum(why != ["missing"] for why in found.values())
            log.warning(
                "stage %s: %d of %d files of cached features are not of what is there now (%s); their images are"
                " encoded again",
                *(self.stage, count, self.plan.shards, ", ".join(changed)),
            )
        return list(found)

    def _check_room(self, missing: list[int]) -> None:
        """Rank 0, before anything is encoded. Raises `TrainingError`."""
        if not missing or self.rank:
            return
        plan = self.plan
        with self._writing(plan.folder):
            plan.folder.mkdir(parents=True, exist_ok=True)
            for path in set(plan.folder.iterdir()) - {plan.path(shard) for shard in range(plan.shards)}:
                path.unlink()
        # The tower says what it gives: mixed precision decides about the dtype.
        sample = self.tower(self.transform([Image.new("RGB", (8, 8))])).features
        images = [number for shard in missing for number in plan.members(shard)]
        tokens = sum(self._patches(number) for number in images)
        needed = tokens * sample.shape[-1] * sample.element_size()
        free = shutil.disk_usage(plan.folder).free + sum(
            plan.path(s).stat().st_size for s in missing if plan.path(s).exists()
        )
        log.info(
            "stage %s: the tower encodes %d of %d images, once: %d features of %d x %d bytes, %.1f MB in %s",
            *(self.stage, len(images), len(plan.images), tokens, sample.shape[-1], sample.element_size()),
            *(needed / 1e6, plan.folder),
        )
        if needed > free:
            raise TrainingError(
                f"stage {self.stage}: cache_features needs {needed / 1e6:,.0f} MB in {plan.folder} and"
                f" {free / 1e6:,.0f} MB are free; make room, or leave cache_features out"
            )

    def _patches(self, number: int) -> int:
        if not self.transform.any_aspect:
            return self.transform.max_patches
        try:
            width, height = image_size(self.plan.images[number])
        except ImageError:
            return 0
        return math.prod(self.transform.grid(height, width))

    def _loader(self, shards: list[int]) -> Iterator[Decoded]:
        batches = [batch for shard in shards for batch in self._batches(shard)]
        if not batches:
            return iter(())
        return iter(loader(ImageBatches(self.plan, self.transform), batches, workers=min(self.workers, len(batches))))

    def _batches(self, shard: int) -> list[range]:
        size = max(1, BATCH_PATCHES // self.transform.max_patches)
        members = self.plan.members(shard)
        return [members[start : start + size] for start in range(0, len(members), size)]

    def _encode(self, shard: int, items: Iterator[Decoded]) -> None:
        """Make one shard, unless a signal comes in between."""
        outputs: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        failures: Failures = {}
        masked = False
        # Taken before the images are read: one that changes meanwhile is then seen to have changed.
        identity = self.plan.identity(shard)
        for _ in self._batches(shard):
            if self.should_stop():
                return
            item = next(items)
            failures.update(item.failures)
            if item.pixels is not None:
                encoded = self.tower(item.pixels)
                masked |= encoded.mask is not None
                outputs.update(zip(item.numbers, per_image(encoded), strict=True))
        with self._writing(self.plan.path(shard)):
            self.plan.write(shard, outputs, failures, identity=identity, masked=masked)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turn a disk's refusal into one `CheckpointError`."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"stage {self.stage}: cannot write {path}: {error}; make room or fix the disk, then run again with"
                f" --resume"
            ) from error

    def _agree(self, work: Callable[[], None]) -> bool:
        """Do this process's part, then wait for the others. False when one was told to stop.

        Raises what `work` raised, and on the other ranks that another one failed.
        """
        error: VLMError | None = None
        try:
            work()
        except VLMError as caught:
            error = caught
        flags = torch.tensor([float(error is not None), float(self.should_stop())], device=self.device)
        if self.world > 1:
            dist.all_reduce(flags)
        failed, stopped = flags.tolist()
        if failed:
            raise error or TrainingError("another process could not make its features; its message says why")
        return not stopped

    def _tell(self, store: FeatureStore, seconds: float) -> None:
        size = sum(self.plan.path(shard).stat().st_size for shard in range(self.plan.shards))
        log.info(
            "stage %s: features of %d images on the disk, %.1f MB, in %.0f s; %d images did not decode",
            *(self.stage, len(self.plan.images), size / 1e6, seconds, store.failed),
        )


def per_image(encoded: EncoderOutput) -> list[tuple[Tensor, tuple[int, int]]]:
    """(float[P, E] on the CPU, without padding; grid) of each image."""
    features, grids = encoded.features.cpu(), encoded.grid.tolist()
    masks = None if encoded.mask is None else encoded.mask.cpu()
    rows = [one if masks is None else one[masks[i]] for i, one in enumerate(features)]
    return [(row, (grid[0], grid[1])) for row, grid in zip(rows, grids, strict=True)]


def encoded(
    stage: Stage, module: StageModule, processor: Processor, frozen: dict[str, str], stop: StopSignal
) -> FeatureStore:
    """The features of all images of the stage, made now where they are not on the disk. Called on every rank."""
    assert isinstance(module, FrozenEncoderModule)
    model: Any = module.model
    budgets = stage.run.data.budgets()
    transform = (with_budget(processor, budgets[0]) if budgets else processor).image_transform
    plan = Plan(
        stage.features,
        stage.examples,
        image_bytes=transform.max_patches * encoder_spec(model.config.encoder).width(model.config.vision_config) * 4,
        identity={
            "tower": [frozen["encoder"], *identity.tower_settings(model)],
            "transform": transform.to_dict(),
            "precision": stage.precision,
        },
    )
    if stage.steps * stage.config.batch_size < len(plan.images):
        log.warning(
            "stage %s: cache_features encodes %d images, but only %d are seen; without it the stage is faster",
            *(stage.config.name, len(plan.images), stage.steps * stage.config.batch_size),
        )
    making = Encoding(
        stage.config.name,
        plan,
        transform,
        module.encode,
        module.device,
        rank=module.global_rank,
        world=module.trainer.world_size,
        workers=stage.run.workers,
        should_stop=lambda: stop.signum != 0,
    )
    store = making.run()
    if store is None:
        raise Stopped(stop.signum or signal.SIGTERM)
    return store
