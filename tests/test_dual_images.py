"""Images of a dual tower: the recorded transform, against transformers' own image processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coretools import picture
from dualtools import checkpoint
from test_big_vision import golden, part
from transformers import Siglip2ImageProcessor, SiglipImageProcessor

from vlm.errors import CheckpointError
from vlm.siglip import load, save
from vlm.siglip.loading import from_big_vision


@pytest.mark.parametrize(("family", "code", "name"), [("siglip", 3, "bicubic"), ("siglip2", 2, "bilinear")])
def test_the_recorded_filter_is_used(family: str, code: int, name: str, tmp_path: Path) -> None:
    """v1 records bicubic, the FixRes checkpoints of v2 bilinear; the pixels are transformers' to a step of 8 bit."""
    checkpoint(tmp_path, family)
    theirs = SiglipImageProcessor(size={"height": 28, "width": 28}, resample=code)
    theirs.save_pretrained(tmp_path)
    _, processor = load(tmp_path)
    assert (processor.transform.resample, processor.transform.mode) == (name, "squash")
    images = [picture(1, (100, 80)), picture(2, (300, 40))]
    wanted: Any = theirs(images=images, return_tensors="pt")["pixel_values"]
    got = processor.images(images)["pixel_values"]
    assert (got - wanted).abs().max() <= 2 / 127.5 + 1e-6
    other = SiglipImageProcessor(size={"height": 28, "width": 28}, resample=5 - code)
    assert (got - other(images=images, return_tensors="pt")["pixel_values"]).abs().max() > 4 / 127.5


def test_settings_of_another_tower_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "siglip")
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="resized to 56x56 px, the tower reads 28"):
        load(tmp_path)


def test_naflex_has_the_recorded_budget(tmp_path: Path) -> None:
    checkpoint(tmp_path, "naflex")
    theirs = Siglip2ImageProcessor(patch_size=14, max_num_patches=20)
    theirs.save_pretrained(tmp_path)
    _, processor = load(tmp_path)
    assert (processor.transform.mode, processor.transform.max_num_patches) == ("naflex", 20)
    images = [picture(1, (100, 80)), picture(2, (300, 40))]
    wanted: Any = theirs(images=images, return_tensors="pt")
    got = processor.images(images)
    assert torch.equal(got["spatial_shapes"], wanted["spatial_shapes"])
    length = got["pixel_values"].shape[1]
    assert (got["pixel_values"] - wanted["pixel_values"][:, :length]).abs().max() < 2 / 127.5


def test_big_visions_files_mean_big_visions_resize(tmp_path: Path) -> None:
    arrays = {"params/" + name: value for name, value in part(golden("siglip"), "params/").items()}
    np.savez(tmp_path / "towers.npz", **arrays)  # type: ignore[arg-type]
    model, processor = load(tmp_path / "towers.npz")
    assert (processor.transform.resample, processor.transform.rounding) == ("bilinear", "down")
    save(model, processor, tmp_path / "out")
    assert load(tmp_path / "out")[1].transform == processor.transform
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["resample"] == 2


@torch.no_grad()
def test_the_i18n_checkpoint_has_no_text_head(tmp_path: Path) -> None:
    """Its last position is the embedding; a directory made of it says so with the identity."""
    arrays = part(golden("siglip"), "params/")
    whole = from_big_vision(arrays)
    bare = {name: value for name, value in arrays.items() if not name.startswith("txt/head/")}
    np.savez(tmp_path / "i18n.npz", **{"params/" + name: value for name, value in bare.items()})  # type: ignore[arg-type]
    model, processor = load(tmp_path / "i18n.npz")
    ids = torch.from_numpy(golden("siglip")["in/text"].astype(np.int64))
    wanted = whole.model.text_model(input_ids=ids).last_hidden_state[:, -1]
    assert (model.encode_text(ids, normalize=False) - wanted).abs().max() < 1e-5
    save(model, processor, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    assert torch.equal(again.encode_text(ids), model.encode_text(ids))


def test_what_is_no_dual_tower_is_said(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "both", "siglip")
    theirs.vision_model.save_pretrained(tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"model_type is 'siglip_vision_model', expected .*both towers"):
        load(tmp_path / "alone")
    (tmp_path / "both" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="both"):
        load(tmp_path / "both")
