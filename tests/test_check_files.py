"""`vlm.check` on what lies on the disk: the last stage's manifest, the round trips; and the command line."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud, shake
from safetensors.torch import load_file, save_file
from torch import nn
from traintools import align, config, tune, world

import vlm
import vlm.check.runner
import vlm.train
from vlm import check
from vlm.build.presets import tiny
from vlm.check.report import Result
from vlm.cli import main
from vlm.errors import ConfigError
from vlm.exchange import exporting


def one(name: str, path: Path, **options: Any) -> Result:
    """The result of one check for a model directory."""
    model, processor = vlm.load(path)
    return check.run(model, processor, only=[name], path=path, **options)[name]


# --- the last stage


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run of two stages of two steps: projector alone, then projector and decoder."""
    second = tune(train={"projector": 1e-3, "decoder": 1e-3}, steps=2)
    run = config(tmp_path_factory.mktemp("run") / "out", align(steps=2), second)
    vlm.train.run(run)
    return run.out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of a model directory, behind the back of its own manifest."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    (model / "model.safetensors").unlink()  # it may be a hard link to the stage's
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "manifest.json").unlink(missing_ok=True)


def edit(manifest: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads(manifest.read_text())
    change(record)
    manifest.write_text(json.dumps(record))


TOWER = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
PROJECTOR = ("model.multi_modal_projector.linear.weight", "model.multi_modal_projector.linear.bias")


def test_the_manifest_of_a_run_holds(trained: Path) -> None:
    last = one("stage", trained / "model")
    assert last.status == "ok" and last.measured == 0
    assert "stage tune" in last.detail and "against align" in last.detail
    model, _ = vlm.load(trained / "model")
    frozen = len(list(model.model.vision_tower.parameters()))
    assert f"{frozen} of {frozen} frozen tensors bit-equal" in last.detail
    assert one("stage", trained / "tune" / "model").status == "ok"
    first = one("stage", trained / "align" / "model")
    assert first.status == "ok" and "stage align" in first.detail and "against start" in first.detail
    assert "2 of 2 trained ones changed" in first.detail


def test_without_a_run_there_is_nothing_to_hold(trained: Path, tmp_path: Path) -> None:
    for path in (trained / "start", world()[0]):
        result = one("stage", path)
        assert result.status == "n/a" and "no training run beside the model" in result.detail
    shutil.copytree(trained / "model", tmp_path / "moved")
    assert one("stage", tmp_path / "moved").status == "n/a"
    manifest = trained / "tune" / "manifest.json"
    assert one("stage", tmp_path / "moved", stage_manifest=manifest).status == "ok"


def test_a_frozen_weight_that_changed_fails(run: Path) -> None:
    rewrite(run / "model", lambda tensors: tensors[TOWER].view(-1)[3].add_(1e-6))
    result = one("stage", run / "model")
    assert result.status == "FAIL" and result.measured == 1
    assert f"frozen, but changed: {TOWER}" in result.detail


def test_a_trained_part_that_did_not_change_fails(run: Path) -> None:
    before = load_file(run / "align" / "model" / "model.safetensors")
    rewrite(run / "model", lambda tensors: tensors.update({name: before[name] for name in PROJECTOR}))
    result = one("stage", run / "model")
    assert result.status == "FAIL" and "trained, but bit for bit as before: projector" in result.detail


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: record["parameters"].pop(0), "not in the manifest: model."),
        (lambda record: record["parameters"][0]["shape"].append(1), "with another shape or part: model."),
        (lambda record: record["parameters"][0].update(part="decoder"), "with another shape or part: model."),
        (
            lambda record: record["parameters"].append({**record["parameters"][0], "name": "model.extra"}),
            "in the manifest, not in the model: model.extra",
        ),
        (lambda record: record["frozen_after"].update(encoder="0" * 64), "records that a frozen part changed"),
    ],
)
def test_a_manifest_that_does_not_fit_fails(run: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    edit(run / "tune" / "manifest.json", change)
    result = one("stage", run / "model")
    assert result.status == "FAIL" and says in result.detail


def test_without_the_model_before_the_digests_decide(run: Path) -> None:
    shutil.rmtree(run / "align" / "model")
    good = one("stage", run / "model")
    assert good.status == "ok" and "sha256, of 1 (the model before the stage is gone)" in good.detail
    model, processor = vlm.load(run / "model", dtype="bfloat16")
    assert check.run(model, processor, only=["stage"], path=run / "model")["stage"].status == "n/a"
    rewrite(run / "model", lambda tensors: tensors[TOWER].view(-1)[3].add_(1e-6))
    result = one("stage", run / "model")
    assert result.status == "FAIL" and "frozen, but changed: encoder" in result.detail


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"parameters": [{}]}', '{"parameters": []}'])
def test_a_file_that_is_no_manifest_fails(run: Path, text: str) -> None:
    (run / "tune" / "manifest.json").write_text(text)
    result = one("stage", run / "model")
    assert result.status == "FAIL" and str(run / "tune" / "manifest.json") in result.detail


def test_a_run_whose_configuration_is_broken_fails_in_words(run: Path) -> None:
    (run / "config.yaml").write_text("stages: [")
    result = one("stage", run / "model")
    assert result.status == "FAIL" and "cannot be read as the configuration of a run" in result.detail
    (run / "model" / "training.json").write_text("{")
    (run / "model" / "manifest.json").unlink(missing_ok=True)
    assert one("stage", run / "model").status == "FAIL"
    (run / "model" / "training.json").write_text('{"stage": "../tune"}')
    assert one("stage", run / "model").status == "n/a"


# --- round trips


def test_a_save_that_rounds_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loud("siglip", "gemma")
    save = vlm.check.runner.save

    def rounded(net: Any, *args: Any) -> Any:
        return save(copy.deepcopy(net).to(torch.bfloat16).to(torch.float32), *args)

    monkeypatch.setattr(vlm.check.runner, "save", rounded)
    result = check.run(model, processor, only=["round-trip"])["round-trip"]
    assert result.status == "FAIL" and "tensors differ" in result.detail and result.measured


def test_a_load_that_forgets_one_tensor_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loud("siglip", "gemma")
    load = vlm.check.runner.load

    def forgetful(*args: Any, **named: Any) -> Any:
        net, other = load(*args, **named)
        nn.init.ones_(net.model.vision_tower.post_layernorm.weight)
        return net, other

    monkeypatch.setattr(vlm.check.runner, "load", forgetful)
    result = check.run(model, processor, only=["round-trip"])["round-trip"]
    assert result.status == "FAIL"
    assert "1 of 60 tensors differ: model.vision_tower.post_layernorm.weight" in result.detail


def test_a_head_that_was_untied_does_not_come_back() -> None:
    model, processor = copy.deepcopy(loud("siglip", "gemma"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    assert check.run(model, processor, only=["round-trip"])["round-trip"].status == "FAIL"


def test_a_processor_that_comes_back_changed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    model, processor = loud("siglip", "gemma")
    load = vlm.check.runner.load

    def other_filter(*args: Any, **named: Any) -> Any:
        net, other = load(*args, **named)
        other.image_transform = replace(other.image_transform, resample="nearest")
        return net, other

    monkeypatch.setattr(vlm.check.runner, "load", other_filter)
    result = check.run(model, processor, only=["round-trip"])["round-trip"]
    assert result.status == "FAIL" and "the processor came back changed" in result.detail


def test_rounded_rotary_frequencies_are_explained() -> None:
    """model.to(bfloat16) rounds buffers that no checkpoint holds."""
    model, processor = copy.deepcopy(loud("siglip", "gemma"))
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    result = check.run(model, processor, only=["round-trip"])["round-trip"]
    assert result.status == "FAIL" and "60 of 60 tensors bit-equal" in result.detail
    assert "something that is not saved differs" in result.detail


def test_no_room_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loud("siglip", "gemma")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    for name in ("round-trip", "export"):
        result = check.run(model, processor, only=[name])[name]
        assert result.status == "n/a" and "set TMPDIR" in result.detail


def test_an_export_that_is_not_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loud("siglip", "gemma")
    original = exporting.export

    def noisy(net: Any, *args: Any, **named: Any) -> Any:
        changed = copy.deepcopy(net)
        shake(changed, 1e-4)
        return original(changed, *args, **named)

    monkeypatch.setattr(exporting, "export", noisy)
    result = check.run(model, processor, only=["export"])["export"]
    assert result.status == "FAIL" and "tensors differ" in result.detail


def test_an_export_whose_parity_report_is_bad_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.exchange.parity import ParityReport, Row

    model, processor = loud("siglip", "gemma")
    bad = ParityReport("paligemma", "x", "", "float32", rows=[Row("logits", 1.0, 1.0, "0", False)])
    monkeypatch.setattr(exporting, "export", lambda *_, **__: bad)
    result = check.run(model, processor, only=["export"])["export"]
    assert result.status == "FAIL" and "parity report has a mismatch" in result.detail


def test_a_refused_export_is_not_applicable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError("NaFlex")

    monkeypatch.setattr(exporting, "export", refuse)
    model, processor = loud("siglip", "gemma")
    result = check.run(model, processor, only=["export"])["export"]
    assert result.status == "n/a" and result.detail == "NaFlex"


def test_a_window_lost_on_the_way_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published PaliGemma 2 is opened without a sliding window; a model that uses one of 8 tokens keeps it."""
    model, processor = loud("siglip", "gemma2")
    assert check.run(model, processor, only=["export"])["export"].status == "ok"
    monkeypatch.setattr("vlm.exchange.paligemma.WINDOW_IN_USE", "ignored")
    result = check.run(model, processor, only=["export"])["export"]
    assert result.status == "FAIL" and "without a window" in result.detail


# --- the command line


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "model"
    return vlm.save(*loud("siglip2_naflex", "gemma3_text"), folder)


def test_a_sound_model_exits_0(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(model_dir), "--data", str(world()[1]), "--max-text-length", "60"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == len(check.CHECKS) + 2
    assert [line.split()[1] for line in lines[:-2]] == [entry.name for entry in check.CHECKS]
    assert {line.split()[0] for line in lines[:-2]} == {"ok", "n/a"}
    assert lines[-1] == f"{model_dir} (float32, cpu, sdpa attention): 18 ok, 0 FAIL, 2 n/a"
    assert "of 24 examples" in out and "future: no token sees" in err and "future: no token sees" not in out


def test_a_broken_model_exits_1(model_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    values = json.loads((broken / "processor_config.json").read_text())
    values["image_transform"]["mean"] = [0.485, 0.456, 0.406]
    (broken / "processor_config.json").write_text(json.dumps(values))
    (broken / "manifest.json").unlink(missing_ok=True)
    assert main(["check", str(broken), "--only", "image-range,tied-weights"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    tied-weights") and lines[1].startswith("FAIL  image-range")


def test_json(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(model_dir), "--only", " future, labels ", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True and report["model"] == str(model_dir)
    assert [result["name"] for result in report["results"]] == ["future", "labels"]
    first = report["results"][0]
    assert first["status"] == "ok" and first["measured"] <= first["limit"] == 1e-4 and first["relation"] == "<="


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "futur"], "unknown check 'futur' (did you mean 'future'?); known: tower, patch-order"),
        (["--only", ","], "no check is named"),
        (["--stage-manifest", "gone.json"], "gone.json: cannot be read as a stage's manifest"),
        (["--data", "gone.jsonl"], "gone.jsonl: cannot read the annotations"),
        (["--max-text-length", "0"], "expected at least 1, got 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_input_exits_2(words: list[str], says: str, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(model_dir), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err


def test_a_model_that_is_none_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "gone")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "no such directory" in err


def test_a_fresh_model_has_nothing_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vlm.save(*tiny(), tmp_path / "model")
    assert main(["check", str(tmp_path / "model"), "--only", "image,round-trip,export"]) == 0
    assert "n/a  image" in capsys.readouterr().out


def test_help_is_light_and_says_the_exit_codes() -> None:
    code = """
import sys
from vlm.cli import main
assert main(["check", "--help"]) == 0
print([name for name in ("torch", "transformers", "lightning", "numpy", "PIL") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("usage: vlm check") and done.stderr.strip() == "[]"
    assert "Exit code 0: no check failed; 1: one did;" in " ".join(done.stdout.split())
