"""Patch budgets in training: drawn per step from the seed alone, exact on resume, never in what is saved."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from traintools import align, config, difference, pictures, stop_after, tune, world

import vlm
from vlm.build.presets import tiny
from vlm.data.order import Key, Mixture, drawn
from vlm.data.reading import read
from vlm.errors import ConfigError
from vlm.train.batches import MicroBatches
from vlm.train.config import DataConfig

BUDGETS = [4, 9, 20]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("naflex") / "start"
    model, processor = tiny("siglip2_naflex")
    model.get_parameter("model.multi_modal_projector.linear.weight").data.normal_(std=0.1)
    vlm.save(model, processor, folder)
    return folder


def run_config(start: Path, out: Path, budgets: Any = BUDGETS, **changes: Any) -> Any:
    data = {"train": world()[1], "max_num_patches": budgets}
    return config(out, align(steps=3), tune(steps=3), model={"path": start}, data=data, **changes)


def test_a_budget_is_a_function_of_seed_and_step() -> None:
    line = [drawn(1, step, BUDGETS) for step in range(3000)]
    assert line == [drawn(1, step, BUDGETS) for step in range(3000)]
    assert line != [drawn(2, step, BUDGETS) for step in range(3000)]
    assert all(900 < count < 1100 for count in Counter(line).values()) and len(set(line)) == 3


def test_every_micro_batch_of_a_step_has_its_budget(tmp_path: Path) -> None:
    examples, _ = read(pictures(tmp_path / "data"), require=("suffix",))
    _, processor = tiny("siglip2_naflex")
    data = MicroBatches(examples, Mixture((24,), (1.0,), 5), processor, budgets=BUDGETS)
    seen = set()
    for step in range(6):
        budget = drawn(5, step, BUDGETS)
        for micro in range(2):
            batch = data[Key(step, micro, step * 4 + micro * 2, 2)].batch
            assert batch is not None and batch.spatial_shapes is not None
            counts = batch.spatial_shapes.prod(1)
            assert torch.equal((batch.input_ids == processor.image_token_id).sum(1), counts)
            assert counts.max() <= budget and counts.max() > budget * 0.7
        seen.add(budget)
    assert len(seen) > 1 and processor.image_transform.max_num_patches == 16


def test_killed_and_resumed_it_ends_with_the_same_bits(start: Path, tmp_path: Path) -> None:
    vlm.train.run(run_config(start, tmp_path / "whole"))
    killed = run_config(start, tmp_path / "killed")
    for rows in (1, 4):
        assert stop_after(killed, rows, resume=True) == -signal.SIGKILL
    vlm.train.run(killed, resume=True)
    assert difference(tmp_path / "whole" / "model", tmp_path / "killed" / "model") == 0
    fixed = run_config(start, tmp_path / "fixed", 4)
    vlm.train.run(fixed)
    assert difference(tmp_path / "whole" / "model", tmp_path / "fixed" / "model") > 0
    # What is saved keeps the model's own budget.
    assert vlm.Processor.from_pretrained(tmp_path / "whole" / "model").image_transform.max_num_patches == 16


def test_refusals(tmp_path: Path) -> None:
    bad: Any
    for bad in (0, [], [128, 0]):
        with pytest.raises(ConfigError, match=r"expected patches per image(?s:.*)leave it out"):
            DataConfig(train=tmp_path / "a.jsonl", max_num_patches=bad)
    with pytest.raises(ConfigError, match="tower reads squares"):
        vlm.train.run(run_config(world()[0], tmp_path / "out"))
