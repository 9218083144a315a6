"""What `save` writes: opened bit for bit here, and with equal embeddings by transformers' Auto classes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture
from dualtools import FAMILIES, checkpoint, pieces, tokenizer
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from vlm.errors import CheckpointError, ConfigError
from vlm.siglip import DualProcessor, load, save

TEXTS = ["A photo of a Red CAT.", "two big dogs, one small bird!", "the quick brown fox " * 30, "Café ÉTÉ"]


def source(folder: Path, family: str, context: int = 12) -> Path:
    kind = "siglip" if family == "siglip" else "siglip2"
    checkpoint(folder, family, context=context)
    tokenizer(pieces(folder / "pieces", kind), kind).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_round_trip_is_bit_for_bit(family: str, dtype: str | None, tmp_path: Path) -> None:
    model, processor = load(source(tmp_path / "in", family), dtype=dtype)
    save(model, processor, tmp_path / "out")
    again, read = load(tmp_path / "out")
    one, other = model.state_dict(), again.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert (again.family, again.kind, again.dtype) == (model.family, model.kind, model.dtype)
    assert (read.transform, read.rule, read.context) == (processor.transform, processor.rule, processor.context)
    assert torch.equal(read.texts(TEXTS).input_ids, processor.texts(TEXTS).input_ids)
    assert read.texts(TEXTS).cut == processor.texts(TEXTS).cut
    save(again, read, tmp_path / "twice")
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "twice").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_transformers_opens_it_with_equal_embeddings(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts through its own processor; images as its own processor has them, whose resize is not ours."""
    model, processor = load(source(tmp_path / "in", family, context=64))
    with caplog.at_level(logging.WARNING):
        save(model, processor, tmp_path / "out")
        assert "in another way" not in caplog.text
        caplog.clear()
        load(tmp_path / "out")
    assert "contradict" not in caplog.text
    theirs = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.architectures == ["Siglip2Model" if family == "naflex" else "SiglipModel"]
    their_processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = their_processor(text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert set(inputs) == {"input_ids"}
    assert torch.equal(inputs["input_ids"], processor.texts(TEXTS).input_ids)
    wanted = normalize(theirs.get_text_features(**inputs).pooler_output, dim=-1)
    ours = model.encode_text(processor.texts(TEXTS).input_ids)
    assert torch.equal(ours, wanted) or (ours - wanted).abs().max() < 1e-6

    images = [picture(seed, size) for seed, size in enumerate([(56, 56), (60, 40), (90, 70)])]
    given = processor.images(images)
    wanted = normalize(theirs.get_image_features(**given).pooler_output, dim=-1)
    vectors = model.encode_image(**given)
    assert (vectors - wanted).abs().max() < 1e-5
    scores = theirs(**given, input_ids=processor.texts(TEXTS).input_ids).logits_per_image
    logits = model.logits(vectors, ours)
    assert (logits - scores).abs().max() < 1e-4 and scores.std() > 1e-3
    assert (model.probabilities(logits) - scores.sigmoid()).abs().max() < 1e-5
    pixels: dict[str, Any] = their_processor.image_processor(images=images, return_tensors="pt")
    close = normalize(theirs.get_image_features(**pixels).pooler_output, dim=-1)
    assert ((vectors * close).sum(-1) > 0.99).all()


def test_siglip2_as_transformers_reads_it_lower_cases(tmp_path: Path) -> None:
    """A FixRes directory of the Hub does not; what is written here does."""
    folder = source(tmp_path / "in", "siglip2")
    plain = AutoTokenizer.from_pretrained(folder)
    assert plain("RED")["input_ids"] != plain("red")["input_ids"]
    save(*load(folder), tmp_path / "out")
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written("RED")["input_ids"] == written("red")["input_ids"]
    assert (written.padding_side, written.model_max_length) == ("right", 12)


def test_scale_and_bias_are_never_rounded(tmp_path: Path) -> None:
    """In bfloat16 a scale of log 118.2 would be 117.9, a bias of -12.7 -12.69."""
    theirs = checkpoint(tmp_path, "siglip")
    with torch.no_grad():
        theirs.logit_scale.fill_(4.7724)
        theirs.logit_bias.fill_(-12.71)
    theirs.save_pretrained(tmp_path)
    model, _ = load(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.scale, theirs.logit_scale.detach().exp().reshape(()))
    assert torch.equal(model.bias, theirs.logit_bias.detach().reshape(()))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.9999), ("bfloat16", 0.99)])
@torch.no_grad()
def test_half_precision_on_the_cpu(family: str, dtype: str, least: float, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", family)
    (exact, processor), (half, _) = load(folder), load(folder, dtype=dtype)
    images = processor.images([picture(1, (56, 56)), picture(2, (50, 80))])
    ids = processor.texts(TEXTS).input_ids
    for one, other in (
        (exact.encode_image(**images), half.encode_image(**images)),
        (exact.encode_text(ids), half.encode_text(ids)),
    ):
        assert other.dtype == torch.float32 and (other.norm(dim=-1) - 1).abs().max() < 1e-6
        assert ((one * other).sum(-1) > least).all()


def test_what_is_changed_later_is_found(tmp_path: Path) -> None:
    save(*load(source(tmp_path / "in", "siglip2")), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="another sha256"):
        load(tmp_path / "out")


def test_other_files_stay_and_wrong_arguments_are_refused(tmp_path: Path) -> None:
    model, processor = load(source(tmp_path / "in", "siglip"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"old")
    save(model, processor, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
    with pytest.raises(ConfigError, match="save takes the DualTower and the DualProcessor"):
        save(model.model, processor, tmp_path / "out")


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "siglip")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "vlm_family": "siglip3"}))
    with pytest.raises(CheckpointError, match="vlm_family is 'siglip3', known: siglip, siglip2"):
        load(tmp_path)


def test_images_alone_are_saved_too(tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", "siglip")
    model, processor = load(tmp_path / "in")
    save(model, processor, tmp_path / "out")
    assert isinstance(load(tmp_path / "out")[1], DualProcessor)
