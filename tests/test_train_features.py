"""Features of a frozen tower, made once and kept on the disk: the same training, and never a stale feature."""

import csv
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train_processes import two_processes
from traintools import COLORS, align, config, difference, steps_done, training, wait

import vlm
import vlm.train
from vlm.build.presets import tiny
from vlm.data.examples import Example
from vlm.data.order import Key, Mixture
from vlm.data.reading import read
from vlm.encoders.siglip import Encoder as SigLIP
from vlm.encoders.siglip2_naflex import Encoder as NaFlex
from vlm.errors import ConfigError, DataError, TrainingError
from vlm.model.processor import Processor
from vlm.settings import from_dict
from vlm.train import RunConfig
from vlm.train.features import store as features
from vlm.train.features.batches import FeatureBatches
from vlm.train.features.encode import Encoding, ImageBatches
from vlm.train.features.store import FeatureStore, Plan

ENCODERS: dict[str, Any] = {"siglip": SigLIP, "siglip2_naflex": NaFlex}
QUESTIONS = 3
"""Examples of each image."""


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by encoder, with dropout in the decoder: a tower that is not run must not move the draws."""
    found = {}
    for name in ENCODERS:
        model, processor = tiny(name)
        model.config.text_config.attention_dropout = 0.1
        model.get_parameter("model.multi_modal_projector.linear.weight").data.normal_(std=0.1)
        if name == "siglip2_naflex":
            processor.image_transform = replace(processor.image_transform, naflex="native")
        found[name] = vlm.save(model, processor, tmp_path_factory.mktemp(name) / "start")
    return found


def mixed(folder: Path) -> Path:
    """Noise of 1 to 16 patches, 12 images of three questions each; copied so that its times can be told apart."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for i in range(12):
        size = (14 * (1 + i // 4), 14 * (1 + i % 4), 3)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        for question in range(QUESTIONS):
            suffix = " ".join(["a", COLORS[i % 4], "square"][: 1 + (i + question) % 3])
            lines.append({"id": f"s{i}-{question}", "image": f"{i}.png", "prefix": f"q {question}", "suffix": suffix})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed(tmp_path_factory.mktemp("features") / "data")


def cached(**changes: Any) -> dict[str, Any]:
    rates = {"projector": 1e-3, "decoder": 1e-3}
    return align(train=rates, **{"steps": 4, "batch_size": 8, "clip_norm": 0.5, "cache_features": True, **changes})


def a_run(out: Path, start: Path, data: Path, *, stages: Any = (), **changes: Any) -> RunConfig:
    values = {"model": {"path": start}, "data": {"train": data}, "checkpoint_every": 1, **changes}
    return config(out, *(stages or (cached(),)), **values)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def log_of(out: Path) -> str:
    return (out / "train.log").read_text()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """For each call of a tower, how many images it got and whether a graph was wanted."""
    seen: list[tuple[int, bool]] = []
    for encoder in ENCODERS.values():
        forward = encoder.forward

        def counted(self: Any, pixel_values: Any, *rest: Any, _forward: Any = forward, **named: Any) -> Any:
            seen.append((len(pixel_values), torch.is_grad_enabled()))
            return _forward(self, pixel_values, *rest, **named)

        monkeypatch.setattr(encoder, "forward", counted)
    return seen


def small_shards(images: int = 2) -> None:
    """Shards of so many 16-patch images; also called in child processes."""
    features.SHARD_BYTES = images * 16 * 32 * 4


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(features, "SHARD_BYTES", features.SHARD_BYTES)
    small_shards()
    yield


# --- the same training


@pytest.mark.parametrize(
    ("encoder", "cutting"),
    [
        ("siglip", {"accumulate": 2}),
        ("siglip2_naflex", {"batch_tokens": 90}),
        ("siglip2_naflex", {"precision": "bf16"}),
    ],
    ids=str,
)
def test_training_is_that_without_the_cache_and_the_tower_runs_once_per_image(
    encoder: str,
    cutting: dict[str, Any],
    starts: dict[str, Path],
    data: Path,
    calls: list[tuple[int, bool]],
    tmp_path: Path,
    small: None,
) -> None:
    """Equal but for rounding: the tower's matrix products add in another order where other images share the batch."""
    plain = a_run(tmp_path / "plain", starts[encoder], data, stages=[cached(cache_features=False, **cutting)])
    vlm.train.run(plain)
    calls.clear()
    run = a_run(tmp_path / "cached", starts[encoder], data, stages=[cached(**cutting)])
    vlm.train.run(run)
    assert sum(images for images, _ in calls) == 12 + 1  # and one to learn the width
    assert not any(graph for _, graph in calls)
    assert "deleted its cached features" in log_of(run.out) and not (run.out / "align" / "features").exists()
    exact = 1e-2 if "precision" in cutting else 1e-6
    for one, two in zip(rows(plain.out), rows(run.out), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=exact)
        assert two["tokens"] == one["tokens"]
    if "precision" not in cutting:  # Adam magnifies the last bits of small gradients
        assert difference(plain.out / "model", run.out / "model") < 2e-5


@pytest.mark.slow
def test_where_the_batches_are_the_same_the_bits_are(
    starts: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image at a time, when features are made and when the tower runs in training: then rounding is the same."""
    monkeypatch.setattr("vlm.train.features.encode.BATCH_PATCHES", 1)
    for encoder, start in starts.items():
        runs = []
        for cache in (False, True):
            stage = cached(accumulate=8, cache_features=cache)
            files = {"train": data, "val": data}  # validation runs the tower in any case
            out = tmp_path / f"{encoder}{cache}"
            runs.append(config(out, stage, model={"path": start}, data=files, workers=int(cache)))
            vlm.train.run(runs[-1])
        assert rows(runs[1].out)[-1]["val_loss"] == rows(runs[0].out)[-1]["val_loss"] != ""
        assert [row["loss"] for row in rows(runs[0].out)] == [row["loss"] for row in rows(runs[1].out)]
        assert difference(runs[0].out / "model", runs[1].out / "model") == 0


@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_a_batch_of_features_is_the_batch_of_pixels(
    encoder: str, starts: dict[str, Path], data: Path, tmp_path: Path, small: None
) -> None:
    """Text, labels and placeholders are the same tensors, and the features those of the tower."""
    model, processor = vlm.load(starts[encoder])
    examples, _ = read(data)
    store = encoding(tmp_path, model, processor, examples).run()
    assert store is not None
    mixture = Mixture((len(examples),), (1.0,), 5)
    for budget in (None, 90):
        key = Key(0, 0, 0, 12)
        plain = vlm.train.batches.MicroBatches(examples, mixture, processor, batch_tokens=budget)[key]
        ours = FeatureBatches(examples, mixture, processor, batch_tokens=budget, store=store)[key]
        assert (len(plain.batches) > 1) == (budget is not None)
        assert (ours.images_read, ours.over_budget) == (plain.images_read, plain.over_budget)
        for one, two in zip(plain.batches, ours.batches, strict=True):
            text, encoded = two.split()  # type: ignore[attr-defined]
            pixels = {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
            assert set(text) == set(one.keys()) - pixels and two.ids == one.ids
            assert all(torch.equal(text[name], one[name]) for name in text)
            with torch.no_grad():
                wanted = model.encode(**{name: one[name] for name in pixels & set(one.keys())})
            assert torch.equal(encoded.grid, wanted.grid)
            assert (encoded.mask is None) == (wanted.mask is None)
            assert wanted.mask is None or torch.equal(encoded.mask, wanted.mask)
            torch.testing.assert_close(encoded.features, wanted.features, rtol=1e-5, atol=1e-6)


def encoding(folder: Path, model: Any, processor: Processor, examples: list[Example], **changes: Any) -> Encoding:
    """The making of features by hand, without a run."""
    transform = processor.image_transform
    identity = {"tower": "a", "transform": transform.to_dict(), "precision": "fp32", **changes}
    plan = Plan(folder / "features", examples, image_bytes=transform.max_patches * 32 * 4, identity=identity)

    @torch.no_grad()
    def tower(pixels: Any) -> Any:
        return model.encode(*pixels[:3])

    return Encoding("align", plan, transform, tower, torch.device("cpu"))


def rank_one_cannot_write() -> None:
    """A list of who wrote which shard; the second of rank 1 meets a full disk."""
    small_shards()
    write, rank = Plan.write, os.environ["RANK"]

    def refused(self: Plan, shard: int, *arguments: Any, **named: Any) -> None:
        if rank == "1" and shard > 1:
            raise OSError(28, "No space left on device")
        write(self, shard, *arguments, **named)

    Plan.write = refused  # type: ignore[method-assign]


def test_two_processes_share_the_images_and_their_errors(starts: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Dropout is drawn by each process for itself, so this decoder has none."""
    model, processor = vlm.load(starts["siglip2_naflex"])
    model.config.text_config.attention_dropout = 0.0
    start = vlm.save(model, processor, tmp_path / "start")
    one = a_run(tmp_path / "one", start, data)
    two = a_run(tmp_path / "two", start, data, devices=2, strategy="ddp")
    vlm.train.run(one)
    for prepare, codes in (rank_one_cannot_write, [2, 2]), (small_shards, [0, 0]):
        with two_processes(two, resume=True, prepare=prepare) as processes:
            for process in processes:
                process.join(120)
            assert [process.exitcode for process in processes] == codes
        if codes == [2, 2]:  # rank 0 has written 0 and 2, rank 1 only 1
            assert sorted(shards(two.out)) == [f"shard-0000{i}.safetensors" for i in (0, 1, 2)]
    assert "features of 12 images on the disk" in log_of(two.out)
    for a, b in zip(rows(one.out), rows(two.out), strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-6)
    assert difference(one.out / "model", two.out / "model") < 2e-5


# --- killed


def pause_after(first: int, seconds: float) -> None:
    """Small shards, and a pause after the one with this number and those that follow."""
    small_shards()
    write = Plan.write

    def slow(self: Plan, shard: int, *arguments: Any, **named: Any) -> None:
        write(self, shard, *arguments, **named)
        time.sleep(seconds if shard >= first else 0)

    Plan.write = slow  # type: ignore[method-assign]


hang = functools.partial(pause_after, 2, 60)
linger = functools.partial(pause_after, 3, 1)


def shards(out: Path) -> dict[str, int]:
    """Name and time of each file of features."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "align" / "features").glob("*.safetensors")}


@pytest.mark.slow
def test_killed_while_encoding_and_while_training_it_ends_with_the_same_bits(
    starts: dict[str, Path], data: Path, tmp_path: Path, small: None, calls: list[tuple[int, bool]]
) -> None:
    start = starts["siglip2_naflex"]
    whole = a_run(tmp_path / "whole", start, data, stages=[cached(steps=16)])
    vlm.train.run(whole)
    run = a_run(tmp_path / "killed", start, data, stages=[cached(steps=16)])
    with training(run, prepare=hang) as process:
        wait(lambda: len(shards(run.out)) == 3)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    before = shards(run.out)
    assert len(before) == 3 and steps_done(run.out) == 0
    (run.out / "align" / "features" / "shard-00005.part").write_bytes(b"torn by a kill")
    # Each kind of stop keeps what is there: a signal while encoding, then a kill in training.
    with training(run, resume=True, prepare=linger) as process:
        wait(lambda: len(shards(run.out)) > len(before))
        process.terminate()
        process.join(60)
        assert process.exitcode == 143
    assert before.items() <= shards(run.out).items() and steps_done(run.out) == 0
    with training(run, resume=True, prepare=small_shards) as process:
        wait(lambda: steps_done(run.out) >= 2)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert before.items() <= shards(run.out).items() and len(shards(run.out)) == 6
    calls.clear()
    vlm.train.run(run, resume=True)
    assert calls == []
    assert difference(whole.out / "model", run.out / "model") == 0
    assert [row["loss"] for row in rows(whole.out)] == [row["loss"] for row in rows(run.out)]


# --- never stale


def test_what_changed_is_encoded_again_and_nothing_else(
    starts: dict[str, Path], tmp_path: Path, small: None, caplog: pytest.LogCaptureFixture
) -> None:
    data = mixed(tmp_path / "data")
    model, processor = vlm.load(starts["siglip"])
    examples, _ = read(data)

    def times() -> list[int]:
        encoding(tmp_path, model, processor, examples, **changes).run()
        return [path.stat().st_mtime_ns for path in sorted((tmp_path / "features").iterdir())]

    changes: dict[str, Any] = {}
    small_shards(1)  # 4 patches of 4 fit an image of 16: a shard has 4 images
    first = times()
    assert len(first) == 3 and times() == first
    assert "encoded again" not in caplog.text
    picture = data.parent / "5.png"
    Image.new("RGB", (28, 28), "red").save(picture)
    second = times()
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    assert "1 of 3 files of cached features are not of what is there now (images)" in caplog.text
    plan = encoding(tmp_path, model, processor, examples).plan
    with torch.no_grad():
        fresh = model.encode(processor([picture], ["x"])["pixel_values"]).features[0]
    torch.testing.assert_close(FeatureStore(plan).read(5 * QUESTIONS), fresh, rtol=1e-5, atol=1e-6)
    for name, value in {"transform": {"mode": "squash"}, "tower": "b", "precision": "bf16"}.items():
        changes = {name: value}
        third = times()
        assert all(a != b for a, b in zip(second, third, strict=True))
        assert f"3 of 3 files of cached features are not of what is there now ({name}" in caplog.text
        changes = {}
        second = times()
    (tmp_path / "features" / "shard-00001.safetensors").write_bytes(b"torn")
    assert [a == b for a, b in zip(second, times(), strict=True)] == [True, False, True]
    assert "(damaged)" in caplog.text


def test_a_run_notices_another_image_file(starts: dict[str, Path], tmp_path: Path, small: None) -> None:
    data = mixed(tmp_path / "data")
    run = a_run(tmp_path / "out", starts["siglip2_naflex"], data, checkpoint_every=100)
    with training(run, prepare=hang) as process:
        wait(lambda: len(shards(run.out)) == 3)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    Image.new("RGB", (28, 28), "red").save(data.parent / "0.png")
    vlm.train.run(run, resume=True)
    assert "files of cached features are not of what is there now (images)" in log_of(run.out)
    fresh = a_run(tmp_path / "fresh", starts["siglip2_naflex"], data)
    vlm.train.run(fresh)
    assert difference(run.out / "model", fresh.out / "model") == 0


# --- refused, damaged, too large


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ({"module": "full"}, {}, "cache_features needs a tower that does not change: use module frozen_encoder"),
        ({"augment": ["hflip"]}, {}, r"encodes each image once, but augment \(hflip\) changes it"),
        ({}, {"max_num_patches": [4, 9]}, "at one size, but data.max_num_patches has 2; give one number"),
    ],
)
def test_refused_settings(stage: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {"out": tmp_path, "model": {"path": "m"}, "data": {"train": "t", **changes}, "stages": [cached(**stage)]}
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, values)


def test_one_patch_budget_is_that_of_the_features(starts: dict[str, Path], data: Path, tmp_path: Path) -> None:
    losses = []
    for cache, budgets in (False, None), (False, [4]), (True, [4]):
        out, stage = tmp_path / f"{cache}{budgets}", cached(steps=2, cache_features=cache)
        files = {"train": data, "max_num_patches": budgets}
        vlm.train.run(config(out, stage, model={"path": starts["siglip2_naflex"]}, data=files))
        losses.append([float(row["loss"]) for row in rows(out)])
    assert losses[2] == pytest.approx(losses[1], rel=1e-6) != pytest.approx(losses[0], rel=1e-6)


def test_a_bad_image_is_reported_and_replaced_as_without_the_cache(starts: dict[str, Path], tmp_path: Path) -> None:
    data = mixed(tmp_path / "data")
    for name in ("3.png", "7.png"):
        path = data.parent / name
        path.write_bytes(path.read_bytes()[:60])
    records = []
    for cache in (False, True):
        run = a_run(tmp_path / str(cache), starts["siglip2_naflex"], data, stages=[cached(cache_features=cache)])
        vlm.train.run(run)
        records.append((run.out / "failures.jsonl").read_text())
        assert all(row["tokens"] for row in rows(run.out))
    assert records[0] == records[1] and "3.png" in records[0] and "7.png" in records[0]
    assert [r["tokens"] for r in rows(tmp_path / "False")] == [r["tokens"] for r in rows(tmp_path / "True")]
    assert "2 images did not decode" in log_of(tmp_path / "True")


def test_too_many_bad_images_end_the_run(starts: dict[str, Path], tmp_path: Path) -> None:
    data = mixed(tmp_path / "data")
    for i in range(12):
        (data.parent / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="100 images in a row could not be decoded|images read could not be decoded"):
        vlm.train.run(a_run(tmp_path / "out", starts["siglip"], data))


def test_no_room_is_told_before_anything_is_encoded(
    starts: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    """12 images x 4 patches x 32 channels x 4 bytes = 6 144 bytes."""
    model, processor = vlm.load(starts["siglip"])
    making = encoding(tmp_path, model, processor, read(data)[0])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6143))
    with pytest.raises(TrainingError, match=r"cache_features needs 0 MB in .*features and 0 MB are free; make room"):
        making.run()
    assert len(calls) == 1 and not list((tmp_path / "features").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6144))
    assert making.run() is not None


def test_memory_holds_no_features(starts: dict[str, Path], data: Path, tmp_path: Path, small: None) -> None:
    """What the store keeps is a few numbers per image, and a sample reads its own rows only."""
    model, processor = vlm.load(starts["siglip2_naflex"])
    examples, _ = read(data)
    making = encoding(tmp_path, model, processor, examples)
    store = making.run()
    assert store is not None
    arrays = [value for value in vars(store).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 12 * (8 + 8 + 16)
    assert not [value for value in vars(store).values() if isinstance(value, torch.Tensor)]
    whole = load_file(making.plan.path(5))
    row = store.read(11 * QUESTIONS)
    assert torch.equal(row, whole["features"][-len(row) :]) and len(row) == 12 < len(whole["features"])


def test_images_of_a_batch_do_not_depend_on_the_process(data: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    model, processor = vlm.load(starts["siglip2_naflex"])
    examples, _ = read(data)
    stores = []
    for workers in (0, 2):
        making = replace(encoding(tmp_path / str(workers), model, processor, examples), workers=workers)
        stores.append(making.run())
    assert all(torch.equal(stores[0].read(i), stores[1].read(i)) for i in range(len(examples)))  # type: ignore[union-attr]
    assert len(ImageBatches(making.plan, processor.image_transform)[range(3)].numbers) == 3
