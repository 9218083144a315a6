"""A stage with everything that is decided before its first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data import augment
from vlm.data.examples import Example
from vlm.data.order import Mixture, stage_seed, steps_of
from vlm.train.config import RunConfig
from vlm.train.objectives.contract import Objective
from vlm.train.stage_config import StageConfig


@dataclass(frozen=True)
class Sources:
    """What a run trains on and is measured on."""

    examples: list[Example]
    counts: tuple[int, ...]
    """Of the examples of each file, in their order."""
    val: list[Example]
    digest: str
    """Of the training examples; a checkpoint of other data is refused."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    run: RunConfig
    config: StageConfig
    seed: int
    sources: Sources
    mixture: Mixture
    objective: Objective

    @property
    def examples(self) -> list[Example]:
        return self.sources.examples

    @property
    def val(self) -> list[Example]:
        return self.sources.val

    @property
    def steps(self) -> int:
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.epochs is not None
        return steps_of(self.config.epochs, self.mixture.epoch_length, self.config.batch_size)

    @property
    def folder(self) -> Path:
        return self.run.out / self.config.name

    @property
    def model(self) -> Path:
        """Where the stage's model is published."""
        return self.folder / "model"

    @property
    def features(self) -> Path:
        """Folder of the cached features, while the stage trains."""
        return self.folder / "features"

    @property
    def start(self) -> str:
        """The model that the stage begins with, relative to the run's directory."""
        index = self.run.stages.index(self.config)
        return f"{self.run.stages[index - 1].name}/model" if index else "start"

    @property
    def precision(self) -> str:
        return self.config.precision or self.run.precision

    def dataset(self, processor: Any, **store: Any) -> Any:
        """What trains; with `store` it reads the features of the images from there."""
        return self.objective.batches(
            self.examples,
            self.mixture,
            processor,
            max_text_length=self.config.max_text_length,
            augmentations=augment.pipeline(self.config.augment),
            cache_images_mb=self.run.data.cache_images_mb,
            budgets=self.run.data.budgets(),
            batch_tokens=self.config.batch_tokens,
            **store,
        )

    def held_out(self, processor: Any) -> Any:
        """What is validated on. Nothing is drawn, and an example whose image fails has no substitute."""
        return self.objective.batches(
            self.val,
            Mixture((len(self.val),), (1.0,), seed=0),
            processor,
            max_text_length=self.config.max_text_length,
            batch_tokens=self.config.batch_tokens,
            substitute=False,
        )


def make_stage(run: RunConfig, index: int, sources: Sources, objective: Objective) -> Stage:
    """The stage at `index`. Raises `VLMError` for examples that its objective cannot use."""
    seed = stage_seed(run.seed, index)
    mixture = Mixture(sources.counts, tuple(source.repeat for source in run.data.sources()), seed)
    objective.check(sources.examples)
    return Stage(run, run.stages[index], seed, sources, mixture, objective)


def make_stages(run: RunConfig, sources: Sources, objectives: Sequence[Objective]) -> list[Stage]:
    """All stages, each with its objective."""
    return [make_stage(run, index, sources, objective) for index, objective in enumerate(objectives)]
