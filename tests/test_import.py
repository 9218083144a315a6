"""`vlm import`: published checkpoints become directories of ours, and the proof fails when they are not the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coretools import loud, picture
from test_big_vision import bfloat16, golden, part, sentencepiece_file, unstacked
from test_loading import write_paligemma
from transformers import SiglipModel, SiglipVisionModel

import vlm
from vlm import siglip
from vlm.build.presets import tiny_decoder
from vlm.checkpoints import saving
from vlm.cli import main
from vlm.encoders.siglip import Encoder
from vlm.errors import CheckpointError
from vlm.exchange import importing
from vlm.exchange.importing import convert
from vlm.text.tokenizer import build

__all__ = ["sentencepiece_file"]  # a fixture


@pytest.mark.parametrize("decoder", ["gemma", "gemma2"])
def test_paligemma_directories(decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 2 here has a window of 8 tokens, shorter than the prompts: transformers is compared without it."""
    write_paligemma(tmp_path / "source", decoder)
    assert main(["import", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and "greedy tokens" in shown
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["ok"] and {row["name"] for row in report["rows"]} >= {"logits", "loss", "pixels", "prompt ids"}
    model, _ = vlm.load(tmp_path / "out", verify="full")
    wanted, _ = vlm.load(tmp_path / "source")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in wanted.state_dict().items())


def test_the_window_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With transformers' window left on, the comparison above fails: it does compare."""
    write_paligemma(tmp_path / "source", "gemma2")
    monkeypatch.setattr(importing, "_without_window", lambda model, report: None)
    with pytest.raises(CheckpointError, match="logits"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_an_export_that_uses_its_window_keeps_it(tmp_path: Path) -> None:
    """Export -> import -> bit-equal, with the attention of the model that was exported."""
    model, processor = loud("siglip", "gemma2")
    vlm.export(model, processor, tmp_path / "exported")
    assert convert(tmp_path / "exported", tmp_path / "back").ok
    again, processor2 = vlm.load(tmp_path / "back")
    assert again.config.text_config.layer_types == model.config.text_config.layer_types
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    batch = processor([picture(1)], ["caption en"], ["a red square left of a blue one"])
    again_batch = processor2([picture(1)], ["caption en"], ["a red square left of a blue one"])
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, again(**again_batch).loss)


@pytest.mark.parametrize("parity", ["full", "weights"])
def test_a_changed_weight_fails_and_leaves_nothing(
    parity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_paligemma(tmp_path / "source", "gemma")

    def spoiled(model: vlm.VLM, *args: Any, **options: Any) -> Path:
        with torch.no_grad():
            weight = model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight
            weight.copy_(weight.T.clone())
        return saving.save(model, *args, **options)

    monkeypatch.setattr(importing, "save", spoiled)
    with pytest.raises(CheckpointError, match="59 tensors on disk differ by 1"):
        convert(tmp_path / "source", tmp_path / "out", parity=parity)
    assert not (tmp_path / "out").exists()


def test_another_dtype(tmp_path: Path) -> None:
    write_paligemma(tmp_path / "source", "gemma")
    report = convert(tmp_path / "source", tmp_path / "out", dtype="bfloat16")
    assert report.ok and report.dtype == "bfloat16" and any("not run" in note for note in report.notes)
    assert vlm.load(tmp_path / "out")[0].dtype == torch.bfloat16


def test_big_vision_paligemma(tmp_path: Path, sentencepiece_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = unstacked(part(golden("paligemma"), "params/"))
    np.savez(tmp_path / "model.npz", **bfloat16(arrays))  # type: ignore[arg-type]
    options = ["import", str(tmp_path / "model.npz"), "--out", str(tmp_path / "out")]
    assert main(options) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert main([*options, "--tokenizer", str(sentencepiece_file)]) == 0
    assert f"{len(arrays)} arrays of big_vision" in capsys.readouterr().out
    model, processor = vlm.load(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and processor.image_transform.rounding == "down"


def test_big_vision_comparison_sees_a_wrong_axis(
    tmp_path: Path, sentencepiece_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "model.npz", **part(golden("paligemma"), "params/"))  # type: ignore[arg-type]
    rebuild = importing.big_vision.rebuild

    def wrong(tensors: Any, shapes: Any, two_towers: bool) -> Any:
        for name, tensor in rebuild(tensors, shapes, two_towers=two_towers):
            yield name, tensor.flip(0) if name.endswith("kv_einsum/w") else tensor

    monkeypatch.setattr(importing.big_vision, "rebuild", wrong)
    with pytest.raises(CheckpointError, match="arrays of big_vision differ by 1"):
        convert(tmp_path / "model.npz", tmp_path / "out", tokenizer=sentencepiece_file)


@pytest.mark.parametrize("name", ["siglip", "naflex"])
def test_big_vision_towers_become_transformers_directories(name: str, tmp_path: Path) -> None:
    """Which transformers opens whole, and `vlm.new` builds a model on."""
    arrays = part(golden(name), "params/")
    np.savez(tmp_path / "towers.npz", **{"params/" + k: v for k, v in arrays.items()})  # type: ignore[arg-type]
    assert convert(tmp_path / "towers.npz", tmp_path / "out").ok
    towers, _ = siglip.load(tmp_path / "out")
    direct, _ = siglip.load(tmp_path / "towers.npz")
    assert all(torch.equal(v, direct.state_dict()[k]) for k, v in towers.state_dict().items())
    if name == "siglip":
        opened: Any = SiglipModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        info = opened[1]
        assert not info["missing_keys"] and not info["unexpected_keys"]
    decoder, tokenizer = tiny_decoder("gemma"), build(["caption en"] * 20, vocab_size=300)
    model, processor = vlm.new(tmp_path / "out", "linear", decoder, tokenizer)
    assert processor.image_transform.resample == "bilinear"
    own = model.model.vision_tower.state_dict()
    wanted = direct.model.vision_model.state_dict()
    assert own and all(torch.equal(value, wanted[key]) for key, value in own.items())
    if name == "siglip":
        pixels = torch.from_numpy(golden(name)["in/image"]).permute(0, 3, 1, 2)
        assert isinstance(model.model.vision_tower, Encoder)
        with torch.no_grad():
            theirs = SiglipVisionModel.from_pretrained(tmp_path / "out")(pixels).last_hidden_state
            assert (model.model.vision_tower(pixels).features - theirs).abs().max() < 1e-5
