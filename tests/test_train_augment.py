"""Augmentation: which view of a picture is shown when."""

from collections import defaultdict
from functools import cache

import pytest
import torch
from PIL import Image

from vlm.data import Example
from vlm.presets import tiny
from vlm.processor import Processor
from vlm.train.augment import pipeline
from vlm.train.data import MicroBatches, loader
from vlm.train.plan import Mixture, StepSampler


@cache
def processor() -> Processor:
    return tiny()[1]


def example(name: str, image: Image.Image, prefix: str = "caption en", suffix: str = "a cat") -> Example:
    return Example(name, image, prefix, suffix, (), (), "train.jsonl", 1)


def noise(name: str) -> Example:
    return example(name, Image.effect_noise((97, 83), 90).convert("RGB"))


def dataset(examples: list[Example], names: list[str], repeat: float = 1, seed: int = 7) -> MicroBatches:
    mixture = Mixture((len(examples),), (repeat,), seed)
    return MicroBatches(examples, mixture, processor(), augmentations=pipeline(names))


def views(data: MicroBatches, sampler: StepSampler, workers: int = 0) -> dict[int, torch.Tensor]:
    """Position -> float[3, H, W]."""
    seen: dict[int, torch.Tensor] = {}
    for item in loader(data, sampler, workers=workers):
        assert item.error is None
        seen |= dict(zip(item.key.positions, item.batch.pixel_values, strict=True))
    return seen


@pytest.mark.parametrize("names", [["crop"], ["brightness"], ["hflip", "rotate90", "crop", "brightness"]])
def test_four_epochs_of_four_repeats_are_sixteen_views(names: list[str]) -> None:
    data = dataset([noise(name) for name in "abc"], names, repeat=4)
    seen = views(data, StepSampler(0, 16, 3))
    assert sorted(seen) == list(range(4 * 12))
    of_image = defaultdict(set)
    for position, pixels in seen.items():
        of_image[data.mixture.example(position)].add(pixels.numpy().tobytes())
    assert {index: len(different) for index, different in of_image.items()} == {0: 16, 1: 16, 2: 16}


def test_a_view_is_the_same_after_a_resume_and_however_the_step_is_shared() -> None:
    data = dataset([noise(name) for name in "abcde"], ["hflip", "crop", "brightness"], repeat=1.5)
    whole = views(data, StepSampler(0, 6, 4))
    shared: dict[int, torch.Tensor] = {}
    for rank in (1, 0):
        shared |= views(data, StepSampler(2, 6, 4, accumulate=2, rank=rank, world=2), workers=rank)
    assert sorted(shared) == list(range(8, 24))
    assert all(torch.equal(whole[position], pixels) for position, pixels in shared.items())


def test_another_seed_shows_other_views() -> None:
    examples = [noise("a")]
    one, other = (views(dataset(examples, ["crop"], seed=seed), StepSampler(0, 4, 1)) for seed in (1, 2))
    assert not any(torch.equal(one[position], other[position]) for position in one)
