"""Features of a frozen tower, made once and kept on the disk: the same training, and never a stale feature."""

import csv
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train_processes import run_on_two
from traintools import COLORS, align, config, difference, steps_done, stop_after, training, wait

import vlm
import vlm.train
from vlm.data import Example, read_jsonl
from vlm.encoders.siglip import Encoder as SigLIP
from vlm.encoders.siglip2_naflex import Encoder as NaFlex
from vlm.errors import ConfigError, DataError, TrainingError
from vlm.presets import tiny
from vlm.processor import Processor
from vlm.settings import from_dict
from vlm.train import RunConfig, features
from vlm.train.encode import Encoding, ImageBatches
from vlm.train.features import FeatureBatches, FeatureStore, Plan
from vlm.train.plan import Key, Mixture

ENCODERS = {"siglip": SigLIP, "siglip2_naflex": NaFlex}
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
    return align(train=rates, steps=5, batch_size=8, clip_norm=0.5, **{"cache_features": True, **changes})


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


@pytest.mark.parametrize("encoder", list(ENCODERS))
@pytest.mark.parametrize("cutting", [{}, {"accumulate": 2}, {"batch_tokens": 90}, {"precision": "bf16"}], ids=str)
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
