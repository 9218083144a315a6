"""Batches of an evaluation: sizes that fit, memory that runs out, several images per item."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_eval_harness import COLOURS, ColourPredictor, examples_of, lines_of
from test_eval_model import lively

import vlm
from vlm.data.examples import Example
from vlm.errors import ConfigError
from vlm.eval import evaluate, items
from vlm.generation import schedule
from vlm.generation.decoding import Decoding


class SmallMemory(ColourPredictor):
    """Runs out of memory, as torch says it, above so many items at a time."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits = fits

    def predict(
        self, images: Sequence[Any], prompts: Sequence[str], *, ids: Sequence[str], decoding: Decoding
    ) -> list[str]:
        if len(ids) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().predict(images, prompts, ids=ids, decoding=decoding)


@pytest.fixture
def examples() -> list[Example]:
    return examples_of([list(COLOURS)[i % 4] for i in range(23)])


def test_auto_halves_until_it_fits_and_nothing_is_lost(
    examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = SmallMemory(fits=3)
    with caplog.at_level(logging.INFO, "vlm"):
        outcome = evaluate(predictor, examples, "exact_match", tmp_path, batch_size="auto", progress=False)
    assert outcome["metrics"]["exact_match"]["value"] == 1.0 and outcome["num_items"] == 23
    assert outcome["run"]["batch_size"] == 2
    # 8 on a CPU, halved to 4 and 2; every batch of the plan (8, 8, 7) is then cut into twos.
    assert [len(batch) for batch in predictor.batches] == [2] * 4 + [2] * 4 + [2, 2, 2, 1]
    assert "batch size 8 (auto, on cpu)" in caplog.text
    assert "out of memory with 8 items at a time; going on with 4" in caplog.text
    assert "out of memory with 4 items at a time; going on with 2" in caplog.text


def test_a_size_that_was_asked_for_is_refused_when_it_does_not_fit(examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out of memory with 5 items at a time \(from item 'e0'\)"):
        evaluate(SmallMemory(fits=3), examples, "exact_match", tmp_path, batch_size=5, progress=False)
    with pytest.raises(ConfigError, match="out of memory with item 'e0' alone"):
        evaluate(SmallMemory(fits=0), examples, "exact_match", tmp_path / "o", batch_size="auto", progress=False)


def test_other_errors_of_a_predictor_are_not_taken_for_a_lack_of_memory(
    examples: list[Example], tmp_path: Path
) -> None:
    class Broken(ColourPredictor):
        def predict(self, images: Any, prompts: Any, *, ids: Any, decoding: Any) -> list[str]:
            raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        evaluate(Broken(), examples, "exact_match", tmp_path, batch_size="auto", progress=False)


@pytest.mark.parametrize(("fits", "chosen"), [(0.3, 1), (1, 1), (7.9, 4), (8, 8), (100, 64), (10**9, 256)])
def test_power_of_two(fits: float, chosen: int) -> None:
    assert schedule.power_of_two(fits) == chosen


def test_a_size_is_a_number_or_auto(tmp_path: Path) -> None:
    for wrong in (0, "many", 2.5):
        with pytest.raises(ConfigError, match="batch_size is"):
            evaluate("m", "d", "exact_match", tmp_path, batch_size=wrong)


def test_a_guess_on_a_gpu_from_the_memory_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of 4 items needs 2 GiB above the 10 GiB of the weights, 70 GiB are free: 0.8 * 70 / 0.5 = 112, so 64."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * gib, 80 * gib))
    assert schedule.guess("cuda:0", lambda: None, 4) == 64

    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    assert schedule.guess("cuda:0", too_much, 4) == 2


def test_batches_by_tokens_give_the_same_answers(tmp_path: Path) -> None:
    """Prompts of different lengths; the most tokens of a batch decide, and the results are those of fixed batches."""
    pair = lively("siglip", "gemma")
    examples = [
        Example(f"t{i}", Image.effect_noise((30 + i, 40), 80).convert("RGB"), "what " * i, "x", (), (), "", 0)
        for i in range(1, 9)
    ]
    fixed = evaluate(pair, examples, "exact_match", tmp_path / "a", max_new_tokens=4, progress=False)
    budget = evaluate(pair, examples, "exact_match", tmp_path / "b", batch_tokens=60, max_new_tokens=4, progress=False)
    said = [[item["prediction"] for item in lines_of(tmp_path / name / "items.jsonl")] for name in ("a", "b")]
    assert said[0] == said[1] and len(set(said[0])) > 3
    assert fixed["run"]["batch_size"] == 16 and 1 < budget["run"]["batch_size"] < 8
    with pytest.raises(ConfigError, match="this predictor has no `lengths`"):
        evaluate(ColourPredictor(), examples, "exact_match", tmp_path / "c", batch_tokens=60, progress=False)


# --- several images per item


class Telling(ColourPredictor):
    """Names the colours of all images of an item."""

    def predict(self, images: Any, prompts: Any, *, ids: Any, decoding: Any) -> list[str]:
        names = {colour: name for name, colour in COLOURS.items()}
        groups = [image if isinstance(image, list) else [image] for image in images]
        return [" ".join(names[picture.getpixel((0, 0))] for picture in group) for group in groups]


def two_images(folder: Path) -> list[Example]:
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    return [
        Example(
            f"p{i}", folder / f"{one}.png", "same?", f"{one} {other}", (), (), str(folder / "d.json"), 0,
            more_images=(folder / f"{other}.png",),
        )
        for i, (one, other) in enumerate([("red", "blue"), ("red", "green"), ("white", "blue"), ("green", "red")])
    ]  # fmt: skip


def test_all_images_of_an_item_are_shown_and_count_for_its_identity(tmp_path: Path) -> None:
    pairs = two_images(tmp_path)
    outcome = evaluate(Telling(), pairs, "exact_match", tmp_path / "o", progress=False)
    assert outcome["metrics"]["exact_match"]["value"] == 1.0
    assert lines_of(tmp_path / "o" / "items.jsonl")[0]["images"] == [
        str(tmp_path / "red.png"),
        str(tmp_path / "blue.png"),
    ]
    moved = items.shuffle_images(pairs, seed=0)
    assert {(one.image, one.more_images) for one in moved} == {(one.image, one.more_images) for one in pairs}
    (tmp_path / "blue.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="data_sha256"):
        evaluate(Telling(), pairs, "exact_match", tmp_path / "o", progress=False)
    worse = evaluate(Telling(), pairs, "exact_match", tmp_path / "p", progress=False)
    assert [one["id"] for one in worse["failures"]] == ["p0", "p2"]  # their second image is the broken one
    assert worse["metrics"]["exact_match"]["value"] == 0.5 and worse["num_items"] == 4


def test_our_models_read_several_images(tmp_path: Path) -> None:
    """The answer with two images is that of `vlm.generate` with both, not with the first alone."""
    model, processor = lively("siglip", "gemma")
    pairs = two_images(tmp_path)
    evaluate((model, processor), pairs, "exact_match", tmp_path / "o", max_new_tokens=6, progress=False)
    groups: list[Any] = [[pair.image, *pair.more_images] for pair in pairs]
    both = vlm.generate(model, processor, groups, ["same?"] * 4, max_new_tokens=6)
    first = vlm.generate(model, processor, [pair.images[0] for pair in pairs], ["same?"] * 4, max_new_tokens=6)
    said = [json.loads(line)["prediction"] for line in (tmp_path / "o" / "items.jsonl").read_text().splitlines()]
    assert said == both != first
