"""`vlm import --from-pickle`: weights out of a pickle, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import shake
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import vlm
from vlm.build.presets import tiny, tiny_decoder
from vlm.cli import main
from vlm.errors import CheckpointError
from vlm.exchange import pickled, unpickle

VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickled_clip(folder: Path) -> CLIPVisionModel:
    """As OpenAI's CLIP is published: `pytorch_model.bin` beside `config.json`."""
    model = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
    shake(model)
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = {f"vision_model.{name}": value for name, value in model.state_dict().items()}
    torch.save({**state, "vision_model.embeddings.position_ids": torch.arange(5)[None]}, folder / "pytorch_model.bin")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return model


def test_a_pickled_tower_becomes_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = pickled_clip(tmp_path / "source")
    with pytest.raises(CheckpointError, match="vlm import SOURCE --from-pickle --out DIR"):
        vlm.new(tmp_path / "source", "linear", tiny_decoder("gemma"), tiny()[1].tokenizer)
    words = ["import", str(tmp_path / "source"), "--from-pickle", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "pytorch_model.bin: 40 tensors" in captured.out and "weights-only reader" in captured.out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("config.json", "converted.json", "manifest.json", "model.safetensors")
    ]
    stored = torch.load(tmp_path / "source" / "pytorch_model.bin", weights_only=True)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == stored.keys() and all(torch.equal(got[name], stored[name]) for name in got)
    model, _ = vlm.new(tmp_path / "out", "linear", tiny_decoder("gemma"), tiny()[1].tokenizer)
    tower = model.model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], value) for name, value in theirs.state_dict().items())
    assert main(words) == 2 and "not empty" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "two"), "--dtype", "bfloat16"]) == 2
    assert main(["import", str(tmp_path / "out"), "--from-pickle", "--out", str(tmp_path / "three")]) == 2
    assert "model.safetensors already" in capsys.readouterr().err


@pytest.mark.slow
def test_shards_views_and_wrappers(tmp_path: Path) -> None:
    """An index; tensors that share memory; weights under `state_dict` beside an optimizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    table = torch.arange(12.0).view(3, 4)
    shards = {"pytorch_model-00001-of-00002.bin": {"a": table, "b": table[:2]}, "pytorch_model-00002-of-00002.bin": {}}
    shards["pytorch_model-00002-of-00002.bin"] = {"c": table.T, "d": torch.ones(2, dtype=torch.bfloat16)}
    for name, tensors in shards.items():
        torch.save(tensors, folder / name)
    where = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    pickled.convert_pickle(folder, tmp_path / "out")
    from vlm.checkpoints.weights import Weights

    weights = Weights(tmp_path / "out")
    wanted = {key: value for tensors in shards.values() for key, value in tensors.items()}
    assert weights.tensors.keys() == wanted.keys()
    assert all(torch.equal(weights.read(name), value) for name, value in wanted.items())
    tensors, facts = unpickle.weights_of({"state_dict": {"x": table}, "epoch": 3})
    assert (facts["inside"], facts["left_out"]) == ("state_dict", ["epoch"]) and torch.equal(tensors["x"], table)


@pytest.mark.slow
def test_what_is_no_weight_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code does not run; nothing is left behind; one line says why."""
    mark = tmp_path / "mark"
    torch.save({"a": torch.ones(2), "b": Evil(mark)}, tmp_path / "evil.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Evil(mark)))
    for name in ("evil.bin", "plain.bin"):
        assert main(["import", str(tmp_path / name), "--from-pickle", "--out", str(tmp_path / "out")]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "weights-only reader" in error
        assert not mark.exists() and not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    for value in ([torch.ones(2)], {"a": torch.ones(2), "b": 3}, {}, {1: torch.ones(2)}, {"state_dict": {"a": 1}}):
        with pytest.raises(ValueError, match="no map from names to tensors"):
            unpickle.weights_of(value)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match=r"no pickled weights \(pytorch_model.bin"):
        pickled.convert_pickle(tmp_path / "nothing", tmp_path / "out")


def test_a_reader_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    monkeypatch.setattr(pickled, "SECONDS", 0.01)
    with pytest.raises(CheckpointError, match="not converted within"):
        pickled.convert_pickle(tmp_path / "a.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A small file that asks for a large tensor: a stride of 0 over one number, which writing would unfold."""
    torch.save({"a": torch.ones(1).expand(1 << 34)}, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="refused by torch's weights-only reader"):
        pickled.convert_pickle(tmp_path / "a.bin", tmp_path / "out")
