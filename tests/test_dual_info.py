"""`vlm info` on a model with two towers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dualtools import FAMILIES, checkpoint, pieces, tokenizer
from test_big_vision import golden, part

from vlm.checkpoints import has_two_towers
from vlm.cli import main
from vlm.measure.info import describe


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_transformers_model(family: str, tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path, family)
    facts = describe(tmp_path)
    assert facts["parameters"] == sum(p.numel() for p in theirs.parameters())
    head = sum(p.numel() for p in theirs.vision_model.head.parameters())
    head += sum(p.numel() for p in theirs.text_model.head.parameters())
    assert facts["parameters_without_heads"] == facts["parameters"] - head
    assert set(facts["parts"]) == {"image tower", "image head", "text tower", "text head", "scale and bias"}
    assert facts["parts"]["scale and bias"]["parameters"] == 2
    assert facts["text"]["notes"] == ["no tokenizer: images only"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = checkpoint(tmp_path, "siglip2", context=16)
    with torch.no_grad():
        theirs.logit_scale.fill_(math.log(118.2))
        theirs.logit_bias.fill_(-12.7)
    theirs.save_pretrained(tmp_path)
    own = tokenizer(pieces(tmp_path / "pieces", "siglip2"), "siglip2", padding_side="left")
    own.init_kwargs["padding_side"] = "left"
    own.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "SigLIP 2, FixRes and NaFlex: lower case, punctuation kept" in shown
    assert "16 positions, mask never" in shown
    assert "'A Photo of a Cat.' is read as 'a photo of a cat.'" in shown
    assert "does not lower-case by itself: done before" in shown
    assert "contradiction: padding_side is left: padded on the right" in shown
    # The figures of a released SigLIP (L/16 at 384 px): cosine 0.1 is 0.29; with the bias forgotten 0.99999.
    assert "118.2 x cosine -12.7, sigmoid: cosine 0.1 is 0.293 (with the bias forgotten 0.99999)" in shown
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["text"]["context"], facts["logits"]["objective"]) == ("siglip2", 16, "sigmoid")
    assert abs(facts["logits"]["probability"] - 1 / (1 + math.exp(12.7 - 11.82))) < 1e-4


def test_what_has_two_towers(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "both", "siglip")
    theirs.vision_model.save_pretrained(tmp_path / "alone")
    (tmp_path / "empty").mkdir()
    arrays = {"params/" + name: value for name, value in part(golden("siglip"), "params/").items()}
    np.savez(tmp_path / "both.npz", **arrays)  # type: ignore[arg-type]
    found = {name: has_two_towers(tmp_path / name) for name in ("both", "alone", "empty", "both.npz")}
    assert found == {"both": True, "alone": False, "empty": False, "both.npz": True}
