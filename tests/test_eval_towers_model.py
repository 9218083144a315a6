"""`vlm eval` of real towers: the pictures and texts that they read are those of transformers and of the paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coretools import picture
from PIL import Image
from test_eval_towers import classes, lines, pairs
from test_zero_shot import write

from vlm.build import presets
from vlm.checkpoints.saving import save
from vlm.cli import main
from vlm.errors import ConfigError
from vlm.siglip import load
from vlm.siglip.embedder import Embedder, opened


def one_batch(embedder: Any, image: Image.Image, **how: str) -> torch.Tensor:
    (batch,) = embedder.images([("a", image)], batch_size=4, **{"view": "plain", "features": "pooled", **how})
    vectors: torch.Tensor = batch.vectors
    return vectors


def test_the_papers_view_is_resized_to_size_by_0875_and_cut_in_the_middle(tmp_path: Path) -> None:
    theirs = write(tmp_path, "siglip")
    model, processor = load(tmp_path)
    usual = replace(processor.transform, resample="bicubic", antialias=True, rounding="nearest")
    processor = replace(processor, transform=usual)
    assert usual.image_size == 28
    image = picture(3, (90, 50))
    large = image.resize((32, 32), Image.Resampling.BICUBIC).crop((2, 2, 30, 30))  # 28 / 0.875
    pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        wanted = theirs.get_image_features(pixel_values=pixels).pooler_output
    wanted = torch.nn.functional.normalize(wanted, dim=-1)
    embedder = Embedder(model, processor)
    assert (one_batch(embedder, image, view="paper") - wanted).abs().max() < 1e-5
    assert (one_batch(embedder, image) - wanted).abs().max() > 1e-4
    assert "resized to 32 px and the middle cut out" in embedder.describe("paper")["images"]


@pytest.mark.parametrize("kind", ["siglip", "siglip2_naflex"])
def test_the_mean_is_that_of_the_real_patches(kind: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, kind)
    embedder = Embedder(*load(tmp_path))
    found = list(
        embedder.images(
            [("a", picture(1, (60, 20))), ("b", picture(2, (28, 28)))], batch_size=2, view="plain", features="mean"
        )
    )
    for row, image in zip(found[0].vectors, (picture(1, (60, 20)), picture(2, (28, 28))), strict=True):
        inputs = embedder.processor.images([image])
        with torch.no_grad():
            features = theirs.vision_model(**inputs).last_hidden_state[0]
        mask = inputs.get("pixel_attention_mask", torch.ones(1, len(features)))[0].bool()
        assert (row - features[mask].mean(0)).abs().max() < 1e-4
    if kind == "siglip2_naflex":  # no rule of the paper cuts a tower that keeps the shape of its pictures
        paper, plain = (one_batch(embedder, picture(1, (60, 20)), view=view) for view in ("paper", "plain"))
        assert torch.equal(paper, plain)
        assert embedder.tokens == 256 and opened(str(tmp_path), max_num_patches=9).tokens == 9


def test_prompts_by_name_by_text_and_canonical(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    embedder = Embedder(*load(tmp_path))
    assert embedder.prompts(["Big_Cat."], "", canonical=False) == [("Big_Cat.",)]
    assert embedder.prompts(["Big_Cat."], "a photo of a {}.", canonical=False) == [("a photo of a Big_Cat..",)]
    (paper,) = embedder.prompts(["Big_Cat."], "imagenet", canonical=True)
    assert len(paper) == 81 and paper[0] == "a bad photo of a big cat" and paper[-1] == "big cat"
    with pytest.raises(ConfigError, match="unknown templates 'imagenets'"):
        embedder.prompts(["cat"], "imagenets", canonical=False)


def test_the_command_line_agrees_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = write(tmp_path / "m", "siglip")
    model, processor = load(tmp_path / "m")
    folder = classes(tmp_path / "c")
    words = ["eval", "--model", str(tmp_path / "m"), "--data", str(folder), "--device", "cpu", "--json"]
    assert main([*words, "--tasks", "zeroshot", "--template", "a photo of a {}.", "--out", str(tmp_path / "o")]) == 0
    outcome = json.loads(capsys.readouterr().out)["tasks"]["zeroshot"]
    files = sorted(folder.rglob("*.png"))
    pixels = processor.images([Image.open(one) for one in files])
    with torch.no_grad():
        texts = processor.texts(["a photo of a green.", "a photo of a red."]).input_ids
        chosen = theirs(**pixels, input_ids=texts).logits_per_image.argmax(1).tolist()
    right = [("green", "red")[place] == one.parent.name for place, one in zip(chosen, files, strict=True)]
    assert outcome["metrics"]["accuracy"]["value"] == pytest.approx(sum(right) / len(right))
    assert outcome["protocol"]["name"] == "plain" and outcome["model"]["family"] == model.family
    (tmp_path / "c" / "red" / "bad.png").write_bytes(b"no picture")
    words[-1:] = ["--train", str(folder)]
    assert main([*words, "--tasks", "zeroshot,knn,linear", "--out", str(tmp_path / "all")]) == 3
    shown = capsys.readouterr()
    assert "red/bad.png: not-an-image" in shown.out and "zeroshot" in shown.out and "linear" in shown.out
    assert f"written to {tmp_path / 'all'}" in shown.err


def test_models_and_options_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "two", "siglip")
    save(*presets.tiny(), tmp_path / "writes")
    folder, path = classes(tmp_path / "c"), pairs(tmp_path)
    captions = lines(tmp_path / "caps.jsonl", [{"image": "red.png", "prefix": "caption en", "references": ["red"]}])

    def said(model: str, data: Path, *words: str) -> tuple[int, str]:
        given = ["eval", "--model", str(tmp_path / model), "--data", str(data), "--out", str(tmp_path / "o")]
        code = main([*given, "--device", "cpu", *words])
        return code, capsys.readouterr().err

    code, text = said("writes", path, "--tasks", "retrieval")
    assert code == 2 and "is a model that writes text" in text and "SigLIP, SigLIP 2 or CLIP" in text
    code, text = said("two", captions, "--metrics", "cider")
    assert code == 2 and "these are two towers, which write no text: vlm classify" in text
    code, text = said("two", path, "--tasks", "retrieval", "--num-beams", "2")
    assert code == 2 and "--num-beams: not read by a model of two towers" in text
    code, text = said("two", captions, "--metrics", "cider", "--class-names", "x")
    assert code == 2 and "--class-names: not read but with the tasks of a model of two towers" in text
    code, text = said("two", folder, "--tasks", "zeroshot", "--template", "a photo")
    assert code == 2 and "has no place for the class" in text
    code, text = said("writes", folder, "--tasks", "knn", "--train", str(folder), "--neighbours", "1")
    assert code == 0  # k-NN reads the vision tower of any model
