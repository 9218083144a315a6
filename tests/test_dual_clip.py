"""CLIP behind the methods of a `DualTower`, against transformers' `CLIPModel`, its tokenizer and image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture, shake
from familytools import CONTEXT, clip_tokenizer, dual, dual_config
from torch.nn.functional import normalize
from transformers import AutoModel, CLIPModel

from vlm.errors import CheckpointError
from vlm.siglip import load, save
from vlm.siglip.encode import encode_texts

TEXTS = [
    "A red  Square,\tleft of a BLUE circle!",
    "",
    "snow_man isn't here",
    "ÉTÉ À LA PLAGE Σίσυφος İstanbul",
    "full-width！ 写真 🙂",
    "word " * 200,
]
SIZES = [(28, 28), (60, 44), (28, 84), (33, 46)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory as transformers writes it, and the model in it."""
    folder = tmp_path_factory.mktemp("clip")
    theirs = CLIPModel(dual_config("clip")).eval()
    shake(theirs, 0.2)
    with torch.no_grad():
        theirs.logit_scale.fill_(2.5)
    theirs.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "do_convert_rgb": True,
        "resample": 3,
    }
    image |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    image |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder, theirs


@torch.no_grad()
def test_embeddings_logits_probabilities_and_loss_are_transformers(checkpoint: tuple[Path, Any]) -> None:
    folder, theirs = checkpoint
    model, processor = load(folder)
    texts = TEXTS[:4]
    pixels: Any = processor.images([picture(seed, size) for seed, size in enumerate(SIZES)])
    # transformers' own way: padded to the longest, with a mask. CLIP looks back only, so that it is the same.
    tokens = clip_tokenizer()(texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    wanted = theirs(**pixels, **tokens, return_loss=True)
    ids, cut = processor.texts(texts)
    image, text = model.encode_image(**pixels), model.encode_text(ids)
    assert cut == () and model.family == "clip" and model.embedding_size == 24 == image.shape[1]
    assert (image - wanted.image_embeds).abs().max() < 1e-5 and (text - wanted.text_embeds).abs().max() < 1e-5
    assert (image[:1] - image[1:]).norm(dim=1).min() > 0.05 and (text[:1] - text[1:]).norm(dim=1).min() > 0.05
    logits = model.logits(image, text)
    assert (logits - wanted.logits_per_image).abs().max() < 1e-4 and wanted.logits_per_image.std() > 0.1
    assert (model.loss(image, text) - wanted.loss).abs() < 1e-5
    assert torch.equal(model.probabilities(logits), logits.softmax(1)) and model.bias is None
    raw = model.encode_image(**pixels, normalize=False)
    assert (normalize(raw, dim=1) - image).abs().max() < 1e-6 and (raw.norm(dim=1) - 1).abs().max() > 0.01


def test_ids_are_the_tokenizers(checkpoint: tuple[Path, Any]) -> None:
    _, processor = load(checkpoint[0])
    ids, cut = processor.texts(TEXTS)
    wanted = clip_tokenizer()(TEXTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    assert torch.equal(ids, wanted.input_ids)
    typed = processor.texts(["<|endoftext|> in the middle"]).input_ids[0]
    assert (typed == 517).int().argmax() > 10  # what a user types is text, never the end
    assert cut == (5,) and ids[5, -1] == 517 and (ids[:, 0] == 516).all()


def test_pixels_are_the_image_processors(checkpoint: tuple[Path, Any]) -> None:
    from transformers import CLIPImageProcessor

    _, processor = load(checkpoint[0])
    assert processor.transform.mode == "crop" and processor.transform.resize_shortest == 32
    theirs = CLIPImageProcessor.from_pretrained(checkpoint[0])
    for seed, size in enumerate(SIZES):
        image = picture(seed, size)
        wanted = torch.as_tensor(theirs(image, return_tensors="pt").pixel_values[0])
        got = processor.images([image])["pixel_values"][0]
        assert (got - wanted).abs().max() < 1.1 / 255 / 0.26  # one step where torchvision resizes


@torch.no_grad()
def test_what_is_saved_is_opened_by_transformers(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, theirs = checkpoint
    model, processor = load(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.scale == theirs.logit_scale.exp()
    model, processor = load(folder)
    save(model, processor, tmp_path / "saved")
    again, reader = load(tmp_path / "saved")
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert reader.transform == processor.transform and reader.rule is processor.rule
    assert torch.equal(reader.texts(TEXTS).input_ids, processor.texts(TEXTS).input_ids)
    opened = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(opened) is CLIPModel
    pixels: Any = processor.images([picture(1)])
    assert torch.equal(opened.get_image_features(**pixels).pooler_output, model.encode_image(**pixels, normalize=False))


@torch.no_grad()
def test_a_configuration_from_before_the_end_token_was_right(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    """OpenAI's repositories say `eos_token_id: 2` and read the highest id."""
    folder, theirs = checkpoint
    model, processor = load(folder)
    save(model, processor, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "manifest.json").unlink()
    old, reader = load(tmp_path)
    assert old.model.text_model.eos_token_id == 2
    assert torch.equal(encode_texts(old, reader, TEXTS[:4]).vectors, encode_texts(model, processor, TEXTS[:4]).vectors)


@pytest.mark.parametrize("stated", [49407, 400])
def test_a_tokenizer_with_another_end_token_is_refused(
    stated: int, checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    """transformers would read the first position of every text: one embedding for all."""
    model, processor = load(checkpoint[0])
    save(model, processor, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["eos_token_id"] = stated
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"end token is 517, the text tower reads the position of id {stated}"):
        load(tmp_path)


@torch.no_grad()
def test_padding_is_never_seen() -> None:
    """Whatever follows the first end token."""
    model, processor = dual("clip")
    ids = processor.texts(["two dogs"]).input_ids
    other = ids.clone()
    other[0, int((ids[0] == 517).int().argmax()) + 1 :] = 30
    assert torch.equal(model.encode_text(ids), model.encode_text(other))
