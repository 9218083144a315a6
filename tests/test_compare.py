"""A whole comparison of tiny towers: what it writes, that it goes on where it stopped, that it notices what is not
fixed, that one failing tower takes no other with it."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comparetools
import pytest
import yaml
from traintools import context, steps_done, wait

import vlm
from vlm.cli import main
from vlm.compare import compare, comparison, disagreements, fixed, load_config, page, processes, runs, table, worker
from vlm.compare.measure import costs, decodable, measure, read_task
from vlm.compare.statistics import over_seeds
from vlm.errors import ConfigError, DataError
from vlm.eval import evaluate
from vlm.report.sections import Gallery
from vlm.train import step_log

JOBS = 2
BOTH = "28 images are in both the training and the test set"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices and busy cores: more threads would only wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[processes.Server]:
    """One server for all tests: it takes seconds to start."""
    with processes.serving() as running:
        yield running


@pytest.fixture(scope="module")
def ran(server: processes.Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two towers, two seeds."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, compare(load_config(comparetools.world() / "compare.yaml"), out, jobs=JOBS, server=server)


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder: when it was written and what it holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def test_figures_are_those_of_the_runs(ran: tuple[Path, dict[str, Any]]) -> None:
    out, result = ran
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(result))
    assert [arm["name"] for arm in result["arms"]] == ["a+linear", "b+linear"] and result["failed"] == {}
    for arm in result["arms"]:
        folder = out / "runs" / arm["name"]
        told = [json.loads((folder / f"seed{k}/eval/words/results.json").read_text()) for k in (0, 1)]
        values = [one["metrics"]["exact_match"]["value"] for one in told]
        found = arm["tasks"]["words"]["exact_match"]
        assert list(found["per_seed"].values()) == values
        assert (found["mean"], found["half_width"]) == (over_seeds(values).mean, over_seeds(values).half_width)
        model, processor = vlm.load(folder / "seed0/train/model")
        assert arm["parameters"]["total"] == sum(p.numel() for p in model.parameters())
        assert arm["parameters"]["trained"] == arm["parameters"]["total"]  # the second stage trains everything
        assert arm["image_tokens"]["mean"] == processor.max_image_tokens == 4
        assert arm["flops"]["total"] > 0 and arm["inference"]["images_per_second"] > 0
        assert 1e8 < arm["training"]["peak_memory_bytes"] < 4e9 and 1e8 < arm["inference"]["peak_memory_bytes"] < 4e9
        assert set(arm["probes"]) == {"knn", "linear"} and "text tower" in arm["no_zero_shot"]
        assert not list(folder.rglob("checkpoints"))


def test_everything_else_was_the_same_and_the_towers_were_not(ran: tuple[Path, dict[str, Any]]) -> None:
    out, result = ran
    assert result["all_held"] and all(item["held"] for item in result["held_fixed"])
    facts = {path.parent.parent.name + path.parent.name: json.loads(path.read_text())["fixed"] for path in found(out)}
    for seed in ("seed0", "seed1"):
        one, other = facts[f"a+linear{seed}"], facts[f"b+linear{seed}"]
        assert {key for key in one if one[key] != other[key]} == {"encoder"}
    differing = {key for key in facts["a+linearseed0"] if facts["a+linearseed0"][key] != facts["a+linearseed1"][key]}
    # The seed orders the data and draws new weights; the tower comes from its checkpoint, a new projector is zero.
    assert differing == {"order", "seen", "decoder"}


def found(out: Path) -> list[Path]:
    return sorted(out.rglob("measurements.json"))


def test_pairs_and_verdicts(ran: tuple[Path, dict[str, Any]]) -> None:
    out, result = ran
    (pair,) = result["pairs"]
    assert (pair["num_items"], pair["num_groups"], pair["num_seeds"]) == (24, 12, 2)  # two items to each image
    means = [arm["tasks"]["words"]["exact_match"]["mean"] for arm in result["arms"]]
    assert pair["difference"] == pytest.approx(means[0] - means[1])
    assert pair["p_holm"] == pair["p"]  # one test
    assert result["verdicts"][0]["best"] in ("a+linear", "b+linear")


def test_csv_text_and_page(ran: tuple[Path, dict[str, Any]]) -> None:
    out, result = ran
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        *(("a+linear", "0"), ("b+linear", "0"), ("a+linear", "1"), ("b+linear", "1"))
    ]
    assert float(rows[0]["flops.total"]) == result["arms"][0]["flops"]["total"]
    told = table.text(result)
    for words in ("words exact_match", "GFLOP/image", "Held fixed: training data", "k-NN", "corrected by Holm"):
        assert words in told
    page = (out / "report.html").read_text()
    for words in (
        "Which vision tower?",
        "words against operations",
        "Training loss",
        "Held fixed",
        "Pair by pair",
        BOTH,
    ):
        assert words in page
    assert not re.search(r"(src|href)=.?(https?:|//)", page)


def test_cards_come_from_the_seed_that_most_towers_finished(
    ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = ran
    one, *both = (
        runs.read(out / f"runs/{name}/spec.json") for name in ("a+linear/seed0", "a+linear/seed1", "b+linear/seed1")
    )
    answers = {one.folder: "never read", both[0].folder: 1.0, both[1].folder: 0.0}
    item = {"id": "test16", "prediction": "", "scores": {"exact_match": 0.0}}

    def read(folder: Path, task: str) -> list[dict[str, Any]]:
        return [{**item, "scores": {"exact_match": answers[folder]}}]

    monkeypatch.setattr(disagreements, "read_items", read)
    tasks = {"words": read_task(one.tasks["words"])}
    short = {"a+linear": "a", "b+linear": "b"}
    (gallery,) = page._galleries([one, *both], tasks, result["arms"][0]["tasks"], short)
    assert isinstance(gallery, Gallery) and "one seed: 1" in gallery.note
    assert [card.kind for card in gallery.items] == ["only a right"]


def test_running_again_runs_nothing(ran: tuple[Path, dict[str, Any]]) -> None:
    out, result = ran
    before = state(out / "runs")
    config = load_config(comparetools.world() / "compare.yaml")
    assert compare(config, out, jobs=JOBS) == result  # no server is started
    assert state(out / "runs") == before


def test_items_that_changed_after_they_were_asked_are_refused(ran: tuple[Path, dict[str, Any]]) -> None:
    out, _ = ran
    spec = runs.read(out / "runs/a+linear/seed0/spec.json")
    asked = read_task(spec.tasks["words"])
    comparison._check_items([spec], {"words": asked})
    with pytest.raises(
        DataError, match=r"tasks.words: the items changed after a\+linear seed 0 .* delete .*eval/words"
    ):
        comparison._check_items([spec], {"words": asked[1:]})


def test_an_image_that_cannot_be_decoded_ends_no_run(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """It counts as wrong in the scores; costs are measured on the others."""
    out, _ = ran
    spec = runs.read(out / "runs/a+linear/seed0/spec.json")
    good = read_task(spec.tasks["words"])
    (tmp_path / "whole.png").write_bytes(b"no picture")
    assert isinstance(good[0].image, Path)
    (tmp_path / "half.png").write_bytes(good[0].image.read_bytes()[:-30])  # its header is there
    bad = [replace(good[0], image=tmp_path / name) for name in ("whole.png", "half.png")]
    assert decodable([*bad, *good], 3) == [good[0], good[2], good[4]]  # two items to each image
    with pytest.raises(DataError, match="none of the images can be decoded"):
        decodable(bad, 3)
    model, processor = vlm.load(spec.run.out / "model")
    found = costs(model, processor, spec, {"words": [*bad, *good]})
    assert found["image_tokens"]["mean"] == 4 and found["flops"] == spec.measurements()["flops"]


@pytest.mark.slow
def test_a_run_of_two_processes(ran: tuple[Path, dict[str, Any]], server: processes.Server, tmp_path: Path) -> None:
    """Its second process repeats the command of the first, which was forked from the server; they share the work."""
    words = ["run.devices=2", "run.stages.1.steps=2", "seeds=[0]", "encoders={a: a}", "probes=null"]
    config = load_config(comparetools.world() / "compare.yaml", words)
    result = compare(config, tmp_path / "out", server=server)
    assert result["failed"] == {} and result["arms"][0]["seeds"] == [0]
    alone, shared = (
        step_log.read(out / "runs/a+linear/seed0/train/metrics.csv")[:4] for out in (ran[0], tmp_path / "out")
    )
    assert [row["seen"] for row in shared] == [row["seen"] for row in alone]
    for one, other in zip(alone, shared, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)


def test_another_run_in_the_same_folder_is_refused(ran: tuple[Path, dict[str, Any]]) -> None:
    out, _ = ran
    config = load_config(comparetools.world() / "compare.yaml", ["run.stages.0.steps=5"])
    with pytest.raises(ConfigError, match=r"holds a run with other settings.*\n(.*\n)*\+.*steps: 5"):
        compare(config, out)


def test_another_decoder_seed_is_noticed(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A run whose new weights were drawn with another seed than its name says."""
    from vlm.compare.summary import summarise

    out, result = ran
    spec = runs.read(out / "runs/b+linear/seed0/spec.json")
    folder = tmp_path / "runs/b+linear/seed0"
    wrong = replace(spec, run=replace(spec.run, out=folder / "train", model=replace(spec.run.model, seed=7)))
    runs.claim(wrong)
    vlm.train.run(wrong.run, resume=True)
    measure(wrong, evaluate)
    right = runs.read(out / "runs/a+linear/seed0/spec.json")
    broken = [item for item in fixed.check([right.measurements(), wrong.measurements()]) if not item.held]
    assert [item.what for item in broken] == ["decoder at the start, per seed"]
    assert "a+linear seed 0" in broken[0].detail and "b+linear seed 0" in broken[0].detail
    told = summarise([right, wrong], [], {"words": {}}, {}, {})
    assert not told["all_held"] and told["pairs"] == [] and told["verdicts"] == []
    assert "NOT HELD FIXED" in table.fixed_lines(told)


def test_other_settings_and_other_data_are_noticed(ran: tuple[Path, dict[str, Any]]) -> None:
    out, _ = ran
    one, other = (json.loads(path.read_text()) for path in found(out)[::2])  # seed 0 of both
    other["fixed"]["settings"]["stages"][0]["steps"] = 99
    other["fixed"]["seen"] = "f" * 64
    other["tasks"]["words"]["data_sha256"] = "e" * 64
    broken = {item.what: item.detail for item in fixed.check([one, other]) if not item.held}
    assert set(broken) == {"settings of the run", "examples and text of every step, per seed", "test items of words"}
    assert "steps: 99" in broken["settings of the run"]


def interrupted(config: Path, out: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    compare(load_config(config), out, jobs=1)


@contextmanager
def comparing(config: Path, out: Path) -> Iterator[Any]:
    process = context().Process(target=interrupted, args=(config, out))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_there(server: processes.Server, tmp_path: Path) -> None:
    values = comparetools.settings(seeds=[0], probes=None)
    values["run"]["stages"] = [{**values["run"]["stages"][1], "steps": 60}]
    path = comparetools.world() / "killed.yaml"
    path.write_text(yaml.safe_dump(values))
    first, second = (tmp_path / "out" / "runs" / name / "seed0" for name in ("a+linear", "b+linear"))
    with comparing(path, tmp_path / "out") as process:
        wait(lambda: steps_done(second / "train") >= 10 or not process.is_alive())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    # Its children die with it: nobody goes on writing.
    wait(lambda: not alive(second / "train"))
    assert (first / "measurements.json").exists() and not (second / "measurements.json").exists()
    before = state(first)

    result = compare(load_config(path), tmp_path / "out", jobs=1, server=server)
    assert state(first) == before
    assert re.search(r"resumed at step \d+ of 60", (second / "log.txt").read_text())
    assert steps_done(second / "train") == 60
    assert result["all_held"] and [arm["seeds"] for arm in result["arms"]] == [[0], [0]]
    assert "With one seed" in table.text(result)


def test_a_signal_lets_the_runs_save(server: processes.Server, tmp_path: Path) -> None:
    values = comparetools.settings(seeds=[0], probes=None)
    stages = [{**values["run"]["stages"][1], "steps": 5000}]
    values |= {"encoders": {"a": "a"}, "run": {**values["run"], "stages": stages, "checkpoint_every": 5000}}
    path = comparetools.world() / "stopped.yaml"
    path.write_text(yaml.safe_dump(values))
    folder = tmp_path / "out" / "runs" / "a+linear" / "seed0"

    def stop() -> None:
        wait(lambda: steps_done(folder / "train") >= 3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        compare(load_config(path), tmp_path / "out", jobs=1, server=server)
    thread.join()
    assert stopped.value.code == 143
    assert not (folder / "measurements.json").exists()
    (saved,) = (folder / "train" / "tune" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == steps_done(folder / "train") < 5000


def alive(folder: Path) -> bool:
    """Whether the process that trains in a folder is there."""
    owner = (folder / ".lock").read_text().split()
    return bool(owner) and Path("/proc", owner[0]).exists()


def test_a_tower_that_fails_is_reported_and_the_others_finish(
    server: processes.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = comparetools.world()
    shutil.copytree(home / "a", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ["compare", "--config", str(home / "compare.yaml"), "--out", str(tmp_path / "out"), "--seeds", "0"]
    words += ["--encoders", "a", str(tmp_path / "broken"), "--set", "probes=null", "run.stages.1.steps=1"]

    @contextmanager
    def shared() -> Iterator[processes.Server]:
        yield server

    monkeypatch.setattr(processes, "serving", shared)
    assert main(words) == 3
    captured = capsys.readouterr()
    assert re.search(r"Failed, and left out: broken\+linear seed 0: .*broken", captured.out)
    assert "a+linear" in captured.out and "Traceback" not in captured.err
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [arm["seeds"] for arm in result["arms"]] == [[0], []]
    assert list(result["failed"]) == ["broken+linear seed 0"]
    assert "broken+linear" in (tmp_path / "out" / "report.html").read_text()


def test_a_worker_by_hand_says_what_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.json").write_text("{}")
    assert worker.main("train", tmp_path / "spec.json") == 2
    assert re.match(r"error: .*spec.json: key 'encoder' is missing", capfd.readouterr().err)
