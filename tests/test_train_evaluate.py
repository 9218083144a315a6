"""Evaluation while a stage trains: training is not changed by it, and it survives a kill."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train_processes import run_on_two
from traintools import align, config, difference, stop_after, tune, world

import vlm
import vlm.train
from vlm.errors import ConfigError, DataError
from vlm.eval import evaluate
from vlm.train import load_config
from vlm.train.evaluate import undisturbed

EVERY = 2


def asked(limit: int | None = 10, **changes: Any) -> dict[str, Any]:
    """Settings of a run: a fixed part of the training file, with dropout in the model so that random numbers matter."""
    data = {"data": world()[1], "metrics": ["exact_match", "bleu_1"], "limit": limit, "max_new_tokens": 4}
    return {"evaluate": {**data, **changes}, "evaluate_every": EVERY}


def learns(steps: int) -> dict[str, Any]:
    """A stage after which the tiny model says something right."""
    rates = {"encoder": 1e-2, "projector": 1e-2, "decoder": 1e-2}
    return tune(steps=steps, batch_size=12, train=rates, schedule="constant", warmup=0)


def evaluations(out: Path) -> list[dict[str, str]]:
    with (out / "evaluations.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_trained_weights_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    stages = align(steps=5), tune(steps=5)
    with_it = config(tmp_path / "with", *stages, **asked(batch_size=4))
    without = config(tmp_path / "without", *stages)
    vlm.train.run(with_it)
    vlm.train.run(without)
    for stage in ("align", "tune"):
        assert difference(with_it.out / stage / "model", without.out / stage / "model") == 0.0
    rows = evaluations(with_it.out)
    assert [(row["stage"], int(row["step"]), row["metric"]) for row in rows] == [
        (stage, step, metric)
        for stage in ("align", "tune")
        for step in (2, 4, 5)
        for metric in ("exact_match", "bleu_1")
    ]
    assert {(row["task"], row["num_items"]) for row in rows} == {("train", "10")}
    assert not (without.out / "evaluations.csv").exists()
    assert (with_it.out / "loss.html").stat().st_size > (without.out / "loss.html").stat().st_size


def test_the_numbers_are_those_of_vlm_eval(tmp_path: Path) -> None:
    """The last row of a stage against the evaluation of the model that the stage has saved, on all items."""
    run = config(tmp_path / "run", learns(20), **asked(limit=None))
    model = vlm.train.run(run)
    outcome = evaluate(
        *(model, world()[1], "exact_match,bleu_1", tmp_path / "eval"), max_new_tokens=4, device="cpu", progress=False
    )
    last = {row["metric"]: float(row["value"]) for row in evaluations(run.out) if row["step"] == "20"}
    assert last == {name: result["value"] for name, result in outcome["metrics"].items()}
    assert last["bleu_1"] > 0.01, "a model that says nothing right proves nothing"


def test_a_killed_run_resumes_with_the_same_weights_and_numbers(tmp_path: Path) -> None:
    stages = (learns(9),)
    killed = config(tmp_path / "killed", *stages, **asked())
    assert stop_after(killed, rows=5) == -9
    vlm.train.run(killed, resume=True)
    whole = config(tmp_path / "whole", *stages, **asked())
    vlm.train.run(whole)
    assert difference(killed.out / "model", whole.out / "model") == 0.0
    assert evaluations(killed.out) == evaluations(whole.out)


def test_two_processes_share_the_items(tmp_path: Path) -> None:
    """The scores are those of the saved model on all items, each counted once."""
    two = config(tmp_path / "two", learns(20), **asked(limit=None), devices=2, strategy="ddp")
    assert run_on_two(two) == [0, 0]
    rows = [row for row in evaluations(two.out) if row["step"] == "20"]
    assert [row["num_items"] for row in rows] == ["24", "24"]
    outcome = evaluate(
        *(two.out / "model", world()[1], "exact_match,bleu_1", tmp_path / "e"),
        max_new_tokens=4,
        device="cpu",
        progress=False,
    )
    assert float(rows[1]["value"]) > 0.01
    assert [float(row["value"]) for row in rows] == [result["value"] for result in outcome["metrics"].values()]


def test_modes_and_random_states_are_restored() -> None:
    model, _ = vlm.build.presets.tiny()
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(3).tolist(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with pytest.raises(KeyError), undisturbed(model):
        assert not any(module.training for module in model.modules())
        torch.rand(5), np.random.rand(5), random.random()
        raise KeyError
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == expected


def test_a_broken_image_is_told_and_a_broken_file_stops_the_run_before_it_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = world()[1].parent / "images" / "0.png"
    lines = [{"id": "good", "image": "good.png", "prefix": "caption en", "suffix": "a"}]
    (tmp_path / "good.png").write_bytes(image.read_bytes())
    (tmp_path / "bad.png").write_bytes(image.read_bytes()[:40])
    lines.append({**lines[0], "id": "bad", "image": "bad.png"})
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = config(tmp_path / "run", align(steps=1), **asked(data=path))
    vlm.train.run(run)
    assert "asked: items that count as wrong, because an image could not be decoded: 1" in caplog.text
    assert {row["num_items"] for row in evaluations(run.out)} == {"2"}
    assert "evaluate asked: 2 of 2 items" in (run.out / "train.log").read_text()  # how far it is
    path.write_text('{"image": "good.png"}\n')
    broken = config(tmp_path / "broken", align(steps=1), **asked(data=path))
    with pytest.raises(DataError, match="asked.jsonl"):
        vlm.train.run(broken)
    assert not (broken.out / "align").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluate_every: 5", "nothing says what to evaluate"),
        ("evaluate: {data: a.jsonl}", "give either `metrics`"),
        ("evaluate: {data: a.jsonl, metrics: [cider], tasks: vqav2}", "give either `metrics`"),
        ("evaluate: {data: a.jsonl, metrics: [cider], limit: 0}", "limit must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text: str, message: str, tmp_path: Path) -> None:
    stage = "{name: a, module: full, train: {projector: 1.0e-3}, steps: 1, batch_size: 1}"
    path = tmp_path / "run.yaml"
    path.write_text(f"out: o\nmodel: {{path: m}}\ndata: {{train: t.jsonl}}\nstages: [{stage}]\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path)
