"""Batches by a budget of tokens: how they are cut, and that training, answers and scores do not depend on it."""

from __future__ import annotations

import copy
import csv
import functools
import json
import logging
import signal
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from coretools import loud, picture
from PIL import Image
from test_train_processes import run_on_two
from traintools import COLORS, config, difference, stop_after, tune

import vlm
import vlm.generation.text
import vlm.train
from vlm.build.presets import tiny
from vlm.data.budget import cut, padding
from vlm.data.order import Key, Mixture, stage_seed
from vlm.data.reading import read
from vlm.errors import ConfigError, GenerationError, ImageError
from vlm.generation import schedule
from vlm.images.load import image_size
from vlm.settings import from_dict
from vlm.train import StageConfig
from vlm.train.batches import MicroBatches
from vlm.train.failures import explain

BUDGET = 70


@functools.cache
def mixed() -> Path:
    """A training file of 24 pictures of 1 to 16 patches, with answers of different lengths."""
    folder = Path(mkdtemp(prefix="vlm-token-budget-"))
    lines = []
    for i in range(24):
        Image.new("RGB", (14 * (1 + i % 4), 14 * (1 + i // 6)), COLORS[i % 4]).save(folder / f"{i}.png")
        suffix = " ".join(["a", COLORS[i % 4], "square"][: 1 + i % 3])
        lines.append({"id": f"s{i}", "image": f"{i}.png", "prefix": "caption en", "suffix": suffix})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# --- cutting


def test_cut_by_hand() -> None:
    assert cut([3, 9, 4, 4], 10) == [[1], [2, 3], [0]]
    assert cut([3, 3, 3, 3], 9) == [[0, 1, 2], [3]]
    assert cut([50, 1], 10) == [[0], [1]]  # too long: alone, never dropped
    assert cut([], 5) == []
    with pytest.raises(ConfigError, match="batch_tokens is 0"):
        cut([1], 0)


def test_padding_by_hand() -> None:
    """9 + 8 + 3 computed for 9 + 4 + 4 + 3 tokens; in the order given 2 x 9 + 2 x 4."""
    assert padding([3, 9, 4, 4], [[1], [2, 3], [0]]) == (20, 20)
    assert padding([3, 9, 4, 4], [[0, 1], [2, 3]]) == (20, 26)
    assert padding([3, 9, 4, 4], [[0, 1], [2, 3]]).share == 1 - 20 / 26


@pytest.mark.parametrize("budget", [1, 17, 64, 1000])
def test_every_sample_is_in_one_batch_that_fits(budget: int) -> None:
    generator = torch.Generator().manual_seed(budget)
    lengths = torch.randint(1, 60, (200,), generator=generator).tolist()
    batches = cut(lengths, budget)
    assert sorted(place for batch in batches for place in batch) == list(range(200))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
    follows = zip(batches, batches[1:], strict=False)
    assert all(min(lengths[p] for p in a) >= max(lengths[p] for p in b) for a, b in follows)


def test_lengths_are_those_of_the_batch() -> None:
    _, processor = loud("siglip2_naflex", "gemma")
    images = [[picture(0)], [picture(1, (300, 20))], [picture(2, (90, 60)), picture(3)], []]
    texts, suffixes = ["caption en", "", "a longer question?", "text"], ["a", "b c d e", "f", "g"]
    sizes = [[image_size(image) for image in group] for group in images]
    for suffix in (None, suffixes):
        batch = processor(images, texts, suffix)
        assert processor.lengths(sizes, texts, suffix) == batch.attention_mask.sum(1).tolist()
    cut_off = processor(images, texts, suffixes, max_text_length=16)
    assert processor.lengths(sizes, texts, suffixes, max_text_length=16) == cut_off.attention_mask.sum(1).tolist()


# --- training


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NaFlex model without dropout: only then may batches be cut without changing the numbers."""
    model, processor = tiny("siglip2_naflex")
    processor.image_transform = replace(processor.image_transform, naflex="native")
    model.get_parameter("model.multi_modal_projector.linear.weight").data.normal_(std=0.1)
    return vlm.save(model, processor, tmp_path_factory.mktemp("naflex") / "start")


def stage(**changes: Any) -> dict[str, Any]:
    return tune(steps=3, batch_size=8, clip_norm=0.5, **changes)


@pytest.fixture(scope="module")
def whole(naflex: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs on whole batches, by reduction."""
    runs = {}
    for reduction in ("token", "example"):
        out = tmp_path_factory.mktemp("whole") / reduction
        data = {"train": mixed(), "val": mixed()}
        runs[reduction] = config(out, stage(loss_reduction=reduction), model={"path": naflex}, data=data)
        vlm.train.run(runs[reduction])
    return runs


def test_a_step_is_cut_by_length_and_holds_the_same_examples(naflex: Path) -> None:
    processor = vlm.Processor.from_pretrained(naflex)
    examples, _ = read(mixed())
    mixture = Mixture((24,), (1.0,), 5)
    plain = MicroBatches(examples, mixture, processor)
    budgeted = MicroBatches(examples, mixture, processor, batch_tokens=BUDGET)
    counts = set()
    for step in range(3):
        key = Key(step, 0, step * 8, 8)
        batches = budgeted[key].batches
        assert plain[key].batch is not None
        assert sorted(name for batch in batches for name in batch.ids) == sorted(plain[key].batches[0].ids)
        over = budgeted[key].over_budget
        for batch in batches:
            assert batch.input_ids.numel() <= BUDGET or batch.ids == [name for name in over if name in batch.ids]
        counts.add(len(batches))
    assert min(counts) > 1 and len(counts) > 1  # the number of micro-batches differs from step to step


@pytest.mark.parametrize(("module", "reduction"), [("full", "token"), ("full", "example"), ("frozen_encoder", "token")])
def test_the_cut_changes_nothing(
    module: str, reduction: str, naflex: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Answers have 1, 2 and 3 words, so a mean of the micro-batches' means would be another number."""
    before = whole[reduction]
    if module == "frozen_encoder":
        frozen = {"module": module, "train": {"projector": 1e-3, "decoder": 1e-3}, "loss_reduction": reduction}
        before = config(tmp_path / "one", stage(**frozen), model={"path": naflex}, data={"train": mixed()})
        vlm.train.run(before)
    else:
        frozen = {"loss_reduction": reduction}
    after = config(
        tmp_path / "out",
        stage(**frozen, batch_tokens=BUDGET),
        model={"path": naflex},
        data={"train": mixed(), "val": mixed()} if module == "full" else {"train": mixed()},
    )
    vlm.train.run(after)
    for one, two in zip(rows(before.out), rows(after.out), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-6)
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=2e-6)
        assert (one["tokens"], one["seen"]) == (two["tokens"], two["seen"])
    if module == "full":
        assert float(rows(before.out)[-1]["val_loss"]) == pytest.approx(
            float(rows(after.out)[-1]["val_loss"]), rel=1e-5
        )
    # Adam divides by the root of tiny second moments, which magnifies the last bits of small gradients.
    assert difference(before.out / "model", after.out / "model") < 2e-5


def test_two_processes_with_different_numbers_of_micro_batches(
    naflex: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    start: dict[str, Any] = {"model": {"path": naflex}, "data": {"train": mixed()}}
    run = config(tmp_path / "two", stage(batch_tokens=BUDGET), devices=2, strategy="ddp", **start)
    processor = vlm.Processor.from_pretrained(naflex)
    mixture = Mixture((24,), (1.0,), stage_seed(0, 0))  # the run's own
    data = MicroBatches(read(mixed())[0], mixture, processor, batch_tokens=BUDGET)
    counts = [[len(data[Key(step, 0, step * 8 + rank * 4, 4)].batches) for rank in (0, 1)] for step in range(3)]
    assert any(one != two for one, two in counts), counts
    assert run_on_two(run) == [0, 0]
    for one, two in zip(rows(whole["token"].out), rows(run.out), strict=True):
        assert (one["tokens"], one["seen"]) == (two["tokens"], two["seen"])
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-6)
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=2e-6)
    assert difference(whole["token"].out / "model", run.out / "model") < 2e-5


def test_mixed_precision_is_that_of_accumulation(naflex: Path, tmp_path: Path) -> None:
    """A backward pass inside the step must not see another cast of the weights; the sums differ by rounding only."""
    start: dict[str, Any] = {"model": {"path": naflex}, "data": {"train": mixed()}}
    runs = [
        config(tmp_path / str(i), stage(precision="bf16", **cutting), **start)
        for i, cutting in enumerate([{"accumulate": 8}, {"batch_tokens": 1}])
    ]
    for run in runs:
        vlm.train.run(run)
    for one, two in zip(rows(runs[0].out), rows(runs[1].out), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-3)
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=5e-3)


def test_killed_and_resumed_it_ends_with_the_same_bits(naflex: Path, tmp_path: Path) -> None:
    data = {"train": mixed(), "max_num_patches": [4, 9, 16]}
    runs = [
        config(tmp_path / name, stage(batch_tokens=BUDGET), model={"path": naflex}, data=data, checkpoint_every=1)
        for name in ("whole", "killed")
    ]
    vlm.train.run(runs[0])
    assert stop_after(runs[1], 1, resume=True) == -signal.SIGKILL
    vlm.train.run(runs[1], resume=True)
    assert difference(runs[0].out / "model", runs[1].out / "model") == 0


def test_long_examples_are_counted(naflex: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vlm"):
        vlm.train.run(config(tmp_path / "out", stage(batch_tokens=1), model={"path": naflex}, data={"train": mixed()}))
    text = (tmp_path / "out" / "train.log").read_text()
    assert text.count("is longer than batch_tokens 1 and makes a micro-batch of its own") == 1
    assert "24 examples were longer than batch_tokens" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch_tokens": 0}, "batch_tokens must be above 0"), ({"batch_tokens": 9, "accumulate": 2}, "one of the two")],
)
def test_refused_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(StageConfig, stage(**changes))


# --- answers


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the batches that are generated for."""
    shapes: list[tuple[int, ...]] = []
    original = vlm.generation.text.generate_ids

    def generate_ids(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(batch.input_ids.shape))
        return original(model, batch, *args, **kwargs)

    monkeypatch.setattr(vlm.generation.text, "generate_ids", generate_ids)
    return shapes


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_do_not_depend_on_the_budget(beams: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, processor = loud("siglip2_naflex", "gemma")
    sizes = [(14 * (1 + i % 4), 14 * (1 + i // 3)) for i in range(9)]
    images: list[Any] = [picture(i, size) for i, size in enumerate(sizes)]
    images[3] = tmp_path / "3.png"
    picture(3, sizes[3]).save(images[3])
    images[4] = [images[4], images[0]]
    prompts = ["caption en" if i % 2 else "a" for i in range(9)]
    alone = [
        vlm.generate(model, processor, [image], [prompt], max_new_tokens=4, num_beams=beams)[0]
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert len(set(alone)) > 4
    shapes = watched(monkeypatch)
    budget = 100
    assert (
        vlm.generate(model, processor, images, prompts, max_new_tokens=4, num_beams=beams, batch_tokens=budget) == alone
    )
    assert sum(rows for rows, _ in shapes) == 9 and 1 < len(shapes) < 9
    assert all(rows * longest * beams <= budget or rows == 1 for rows, longest in shapes)
    assert [longest for _, longest in shapes] == sorted((longest for _, longest in shapes), reverse=True)


def test_images_of_one_size_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is padded although the sizes alternate."""
    model, processor = loud("siglip2_naflex", "gemma")
    processor = copy.copy(processor)
    processor.image_transform = replace(processor.image_transform, naflex="native")
    images = [picture(i, (56, 56) if i % 2 else (14, 28)) for i in range(8)]
    lengths = processor.lengths([[image.size] for image in images], [""] * 8)
    assert len(set(lengths)) == 2
    shapes = watched(monkeypatch)
    vlm.generate(model, processor, images, [""] * 8, max_new_tokens=1, batch_tokens=4 * max(lengths))
    assert shapes[0] == (4, max(lengths)) and padding(lengths, cut(lengths, 4 * max(lengths))).share == 0


def test_an_image_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    model, processor = loud("siglip2_naflex", "gemma")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="sample 'x'.*a.png"):
        vlm.generate(model, processor, [tmp_path / "a.png"], ["a"], ids=["x"], batch_tokens=100)
    with pytest.raises(GenerationError, match="batch_tokens is 0"):
        vlm.generate(model, processor, [picture(0)], ["a"], batch_tokens=0)


# --- evaluation


def test_the_plan_of_an_evaluation_goes_by_length() -> None:
    _, processor = loud("siglip2_naflex", "gemma")
    examples, _ = read(mixed())
    sizes = [schedule.image_sizes(example.images) for example in examples]
    assert sizes == [[Image.open(example.image).size] for example in examples]  # type: ignore[arg-type]
    prompts = [example.prefix for example in examples]
    lengths = processor.lengths(sizes, prompts)
    assert schedule.plan(prompts, 4, lengths=lengths, batch_tokens=90) == cut(lengths, 90)
    assert schedule.plan(prompts, 4) == schedule.plan(prompts, 4, lengths=lengths)
    broken = replace(examples[0], image=Path(__file__))
    assert schedule.image_sizes(broken.images) == []


def test_what_to_do_when_memory_runs_out() -> None:
    for changes, advice in ({}, "raise `accumulate` (now 1)"), ({"batch_tokens": 9}, "lower batch_tokens (now 9)"):
        error = explain(RuntimeError("CUDA out of memory"), from_dict(StageConfig, stage(**changes)))
        assert error is not None and advice in str(error)
