"""Augmentation: which view of a picture is shown when, and where the boxes in its text go."""

import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from traintools import align, config

import vlm.train
from vlm.build.presets import tiny
from vlm.data.augment import AUGMENTATIONS, apply, check, pipeline
from vlm.data.examples import Example
from vlm.data.order import Mixture, StepSampler
from vlm.errors import DataError
from vlm.model.processor import Processor
from vlm.text.locations import box_to_loc, text_to_objects
from vlm.train.batches import MicroBatches
from vlm.train.loader import loader

MASK = "".join(f"<seg{code:03d}>" for code in range(16))


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


# --- Boxes


SIDE = 28
"""Of the tiny model's images, in pixels."""


def painted(corners: tuple[int, int, int, int], size: tuple[int, int], text: str = "{} cat") -> Example:
    """A black picture with a white rectangle x0, y0, x1, y1 (pixels), and a text that says where it is."""
    image = Image.new("RGB", size)
    image.paste("white", corners)
    return example("a", image, suffix=text.format(box_to_loc(corners, *size)))


def picture(example: Example) -> Image.Image:
    assert isinstance(example.image, Image.Image)
    return example.image


def white_box(image: Image.Image) -> tuple[float, ...]:
    """Where the white pixels are, in shares of the image."""
    across, down = (np.flatnonzero(np.asarray(image)[..., 0].max(axis=axis) > 127) for axis in (0, 1))
    return (
        across[0] / image.width, down[0] / image.height, (across[-1] + 1) / image.width, (down[-1] + 1) / image.height
    )  # fmt: skip


@pytest.mark.parametrize("names", [["hflip"], ["vflip"], ["rotate90"], ["crop"], ["brightness"], [*AUGMENTATIONS]])
@pytest.mark.parametrize("corners", [(20, 30, 60, 90), (0, 0, 200, 150), (150, 5, 200, 20), (0, 100, 199, 150)])
def test_boxes_go_where_the_pixels_go(names: list[str], corners: tuple[int, int, int, int]) -> None:
    shown = painted(corners, (200, 150))
    texts = set()
    for draw in range(24):
        (image,), (prefix, suffix) = apply(
            pipeline(names), [picture(shown)], ["caption en", str(shown.suffix)], np.random.default_rng(draw)
        )
        (found,) = text_to_objects(suffix)
        # Half a bin for the token that was there, half for the new one, both larger after a crop.
        assert found.box == pytest.approx(white_box(image), abs=1.3 / 1023), (names, draw)
        assert found.label == "cat" and prefix == "caption en"
        texts.add(suffix)
    assert len(texts) > 1 or names == ["brightness"] or corners == (0, 0, 200, 150)


def test_a_batch_of_training_holds_the_moved_box() -> None:
    examples = [painted((20, 30, 60, 90), (200, 150), "{} cat ; <loc0000><loc1023> corner")]
    data = dataset(examples, ["rotate90", "hflip"], repeat=8)
    seen = set()
    for item in loader(data, StepSampler(0, 8, 1)):
        batch, tokenizer = item.batch, processor().tokenizer
        text = tokenizer.decode(batch.input_ids[0][batch.labels[0] != -100], skip_special_tokens=True)
        cat, corner = text_to_objects(text)
        row = (batch.pixel_values[0, 0] > 0).float()
        down, across = row.amax(1).nonzero()[:, 0], row.amax(0).nonzero()[:, 0]
        where = (across[0] / SIDE, down[0] / SIDE, (across[-1] + 1) / SIDE, (down[-1] + 1) / SIDE)
        assert cat.box == pytest.approx([float(share) for share in where], abs=0.75 / SIDE)
        assert corner.label == "corner" and corner.point in {(0, 0), (0, 1), (1, 0), (1, 1)}
        seen.add(text)
    assert len(seen) > 3


def test_a_crop_cuts_no_object_off() -> None:
    """Less than half of the small box would be left of many windows, and any part of a mask is too much."""
    small, masked = painted((0, 0, 12, 12), (200, 150)), painted((0, 20, 100, 60), (200, 150), "{}" + MASK + " cat")
    changed = 0
    for draw in range(40):
        for shown, least in ((small, 0.5), (masked, 1.0)):
            (image,), (text,) = apply(
                pipeline(["crop"]), [picture(shown)], [str(shown.suffix)], np.random.default_rng(draw)
            )
            changed += image.size != (200, 150)
            before, after = ((np.asarray(i)[..., 0] > 127).sum() for i in (picture(shown), image))
            assert after >= least * before * 0.99
            (found,) = text_to_objects(text)
            assert found.box == pytest.approx(white_box(image), abs=1.3 / 1023)
            assert found.codes == (tuple(range(16)) if shown is masked else ())
    assert 10 < changed < 80


def test_several_images_are_seen_in_one_view() -> None:
    left, right = (picture(painted((10, 10, 50, 50), (100, 80))) for _ in range(2))
    for draw in range(8):
        (one, other), _ = apply(pipeline([*AUGMENTATIONS]), [left, right], [""], np.random.default_rng(draw))
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("names", [["hflip"], ["brightness", "vflip"], ["rotate90", "crop"]])
def test_masks_that_would_have_to_turn_are_refused_with_file_and_line(names: list[str]) -> None:
    examples = [noise("a"), painted((20, 30, 60, 90), (200, 150), "{}" + MASK + " cat")]
    turning = names[-1] if names[-1] != "crop" else names[0]
    with pytest.raises(
        DataError, match=rf"^train.jsonl:1: augment: {turning} would turn the picture, but not the mask"
    ):
        check(pipeline(names), examples)
    check(pipeline(["crop", "brightness"]), examples)
    check(pipeline(names), examples[:1])


def test_a_run_on_masks_with_a_flip_is_refused_before_it_starts(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "prefix": "segment cat", "suffix": f"<loc0001><loc0002><loc0003><loc0004>{MASK} cat"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = config(tmp_path / "out", align(augment=["hflip"]), data={"train": tmp_path / "train.jsonl"})
    with pytest.raises(DataError, match=r"train.jsonl:1: augment: hflip would turn the picture"):
        vlm.train.run(run)
