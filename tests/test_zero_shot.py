"""Zero-shot classification: an untrained tower behind the checkpoint's head is the checkpoint."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture, shake
from test_big_vision import sentencepiece_file
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel, SiglipTokenizer, SiglipVisionModel

from vlm.build.presets import tiny
from vlm.checkpoints.parts import load_tower
from vlm.errors import ConfigError, DataError
from vlm.images.transforms import ImageTransform
from vlm.measure.probes import Labelled
from vlm.model.parts import encoder_spec
from vlm.siglip import load
from vlm.siglip.classes import class_embeddings
from vlm.siglip.processor import DualProcessor
from vlm.siglip.rules import RULES, canonicalize
from vlm.siglip.templates import Templates, prompts
from vlm.siglip.zero_shot import pooled, why_no_zero_shot, zero_shot
from vlm.text.tokenizer import build

__all__ = ["sentencepiece_file"]  # a fixture
CLASSES = ["red cat", "Blue DOG", "tree"]
TEMPLATES = ("{}", "a photo of a {}.")


def write(path: Path, kind: str) -> Any:
    """A tiny checkpoint with both towers and a Gemma tokenizer, and transformers' model of it."""
    vision = encoder_spec(kind).tiny().to_dict()
    vision.pop("vision_use_head")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": 300, "max_position_embeddings": 12, "projection_size": 32}
    config: Any = {"siglip": SiglipConfig, "siglip2_naflex": Siglip2Config}[kind]
    model = {"siglip": SiglipModel, "siglip2_naflex": Siglip2Model}[kind](
        config(vision_config=vision, text_config=text)
    )
    shake(model)
    model.eval().save_pretrained(path)
    build([*CLASSES, *TEMPLATES] * 5, vocab_size=300).save_pretrained(path)
    return model


def tower(path: Path, kind: str) -> tuple[Any, Any]:
    values = json.loads((path / "config.json").read_text())["vision_config"]
    module = encoder_spec(kind)
    encoder = module.encoder(encoder_spec(kind).read_config({**values, "vision_use_head": False}))
    load_tower(encoder, path)
    return encoder, module.transform(encoder.config, **({"max_num_patches": 16} if "naflex" in kind else {}))


def embedded(model: Any, processor: Any, names: list[str], templates: tuple[str, ...]) -> torch.Tensor:
    """As the probe embeds its classes."""
    return class_embeddings(model, processor, prompts(names, Templates("given", templates, canonical=True)))


@pytest.mark.parametrize("kind", ["siglip", "siglip2_naflex"])
def test_an_untrained_tower_is_the_checkpoint(kind: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, kind)
    encoder, transform = tower(tmp_path, kind)
    images = [picture(seed, size) for seed, size in enumerate([(28, 28), (60, 20), (20, 70), (33, 44)])]
    model, processor = load(tmp_path)
    ours = model.logits(
        pooled(model, encoder, transform, images, batch_size=3), embedded(model, processor, CLASSES, ("{}",))
    )
    pixels = transform(images)
    inputs: dict[str, Any] = {"pixel_values": pixels.pixel_values}
    if kind == "siglip2_naflex":
        inputs |= {"pixel_attention_mask": pixels.pixel_attention_mask, "spatial_shapes": pixels.spatial_shapes}
    with torch.no_grad():
        wanted = theirs(
            **inputs, input_ids=processor.texts(list(map(canonicalize, CLASSES))).input_ids
        ).logits_per_image
    assert wanted.std() > 0.01
    assert (ours - wanted).abs().max() < 1e-5
    test = [Labelled(str(i), image, CLASSES[0]) for i, image in enumerate(images)]
    result = zero_shot(tmp_path, encoder, transform, test, CLASSES)
    assert result is not None
    assert result.per_item == {str(i): bool(row.argmax() == 0) for i, row in enumerate(wanted)}
    assert (result.num_train, result.num_test, result.num_classes) == (0, 4, 3)


def test_a_naflex_tower_read_from_a_fixed_size_checkpoint(tmp_path: Path) -> None:
    """Its square image, patch for patch the same, gets the same embedding; the head leaves padding out."""
    theirs = write(tmp_path, "siglip")
    square, squares = tower(tmp_path, "siglip")
    module = encoder_spec("siglip2_naflex")
    values = {**square.config.to_dict(), "num_patches": 4}
    del values["image_size"]
    encoder = module.encoder(encoder_spec("siglip2_naflex").read_config(values))
    load_tower(encoder, tmp_path)
    images = [picture(1), picture(2, (14, 56))]
    model = load(tmp_path)[0]
    transform = module.transform(encoder.config, max_num_patches=4)
    got = pooled(model, encoder, transform, images)
    with torch.no_grad():
        wanted = theirs.get_image_features(squares(images[:1]).pixel_values).pooler_output
    assert (got[:1] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    alone = pooled(model, encoder, transform, images[1:])
    assert (got[1:] - alone).abs().max() < 1e-5 * alone.abs().max()


def test_a_trained_tower_gives_other_numbers(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    encoder, transform = tower(tmp_path, "siglip")
    model = load(tmp_path)[0]
    before = pooled(model, encoder, transform, [picture(1)])
    shake(encoder, 0.1, seed=3)
    assert (pooled(model, encoder, transform, [picture(1)]) - before).abs().max() > 0.01


def test_templates_are_averaged_after_normalisation(tmp_path: Path) -> None:
    theirs = write(tmp_path, "siglip")
    model, processor = load(tmp_path)
    got = embedded(model, processor, CLASSES, TEMPLATES)
    with torch.no_grad():
        rows = theirs.get_text_features(processor.texts(["tree", "a photo of a tree"]).input_ids).pooler_output
    rows = rows / rows.norm(dim=-1, keepdim=True)
    wanted = rows.sum(0) / rows.sum(0).norm()
    assert (got[2] - wanted).abs().max() < 1e-6


# --- texts


def text_ids(tokenizer: Any, texts: list[str], context: int, family: str = "siglip2") -> torch.Tensor:
    transform = ImageTransform(mode="squash", image_size=28, patch_size=14)
    return DualProcessor(transform, tokenizer, RULES[family], context).texts(texts).input_ids


def test_texts_by_hand() -> None:
    tokenizer = build(["red cat"] * 5, vocab_size=300)
    cat = tokenizer("red cat", add_special_tokens=False)["input_ids"]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert len({eos, pad}) == 2 and 1 <= len(cat) < 7
    rows = text_ids(tokenizer, ["Red CAT", "red cat " * 20], 8).tolist()
    assert rows[0] == cat + [eos] + [pad] * (7 - len(cat))
    assert rows[1][-1] == eos and pad not in rows[1] and tokenizer.bos_token_id not in rows[1]


def test_texts_are_those_of_the_siglip_tokenizer(sentencepiece_file: Path) -> None:
    """SigLIP v1: padding is EOS, and the tokenizer itself lower-cases and drops punctuation."""
    theirs = SiglipTokenizer(str(sentencepiece_file))
    texts = ["A photo of a Cat.", "caption", "a long text " * 10]
    theirs.pad_token = theirs.eos_token
    wanted = theirs(texts, padding="max_length", max_length=16, truncation=True)["input_ids"]
    assert text_ids(theirs, texts, 16, "siglip").tolist() == wanted


def original(text: str) -> str:
    """The rule of the original, character by character."""
    kept = "".join(" " if char in "_ \t\n" else char for char in text if char == "_" or char not in string.punctuation)
    words = [word for word in kept.lower().split(" ") if word]
    return " ".join(words)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Golden_Retriever", "golden retriever"),
        ("great_white_shark", "great white shark"),
        ("Jack-o'-lantern", "jackolantern"),
        ("  St. Bernard\t(dog) ", "st bernard dog"),
        ("CRT_screen / monitor", "crt screen monitor"),
        ("_", ""),
        ("Café-Été", "caféété"),
        ("a photo of a T-shirt.", "a photo of a tshirt"),
    ],
)
def test_names_are_canonical(name: str, wanted: str) -> None:
    assert canonicalize(name) == wanted == original(name)
    tokenizer = build(["red cat"] * 5, vocab_size=300)
    assert torch.equal(text_ids(tokenizer, [name], 64, "siglip"), text_ids(tokenizer, [wanted], 64, "siglip"))


def test_names_and_templates_reach_the_tower_in_canonical_form(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    model, processor = load(tmp_path)
    got = embedded(model, processor, ["Red_Cat", "blue dog!"], ("A photo: a {}.",))
    wanted = embedded(model, processor, ["red cat", "blue dog"], ("a photo a {}",))
    assert torch.equal(got, wanted)
    encoder, transform = tower(tmp_path, "siglip")
    images = [picture(seed) for seed in range(4)]
    plain = [Labelled(str(i), image, "red cat") for i, image in enumerate(images)]
    spelt = [Labelled(str(i), image, "Red_Cat") for i, image in enumerate(images)]
    one, other = zero_shot(tmp_path, encoder, transform, plain, CLASSES), zero_shot(
        tmp_path, encoder, transform, spelt, ["Red_Cat", "BLUE_dog", "tree."]
    )  # fmt: skip
    assert one is not None and other is not None
    assert one.per_item == other.per_item and other.settings["unseen_items"] == 0


def test_a_class_list_with_two_names_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As ImageNet's: two kinds of crane, two of maillot."""
    write(tmp_path, "siglip")
    encoder, transform = tower(tmp_path, "siglip")
    test = [Labelled(str(i), picture(i), label) for i, label in enumerate(["crane", "maillot", "tree", "crane"])]
    alone = zero_shot(tmp_path, encoder, transform, test, ["crane", "tree", "maillot"])
    caplog.clear()
    twice = zero_shot(tmp_path, encoder, transform, test, ["crane", "tree", "maillot", "crane", "maillot"])
    assert alone is not None and twice is not None
    assert twice.per_item == alone.per_item and twice.num_classes == 3
    assert twice.settings["shared_names"] == {"crane": ["crane", "crane"], "maillot": ["maillot", "maillot"]}
    assert "4 of the 5 class names are 2 texts to the text tower ('crane', 'crane'; 'maillot'" in caplog.text
    assert "Give each class a name of its own" in caplog.text
    assert alone.settings["shared_names"] == {}


# --- refusals


def test_reasons(tmp_path: Path) -> None:
    write(tmp_path / "both", "siglip")
    encoder, transform = tower(tmp_path / "both", "siglip")
    assert why_no_zero_shot(tmp_path / "both", encoder) is None
    SiglipVisionModel(encoder.config).save_pretrained(tmp_path / "alone")
    reason = why_no_zero_shot(tmp_path / "alone", encoder)
    assert reason is not None and "no text tower" in reason
    test = [Labelled("1", picture(0), "a")]
    assert zero_shot(tmp_path / "alone", encoder, transform, test, ["a", "b"]) is None
    assert "tokenizer" in str(why_no_zero_shot("x.npz", encoder))
    dino = tiny("dinov2", "gemma")[0].model.vision_tower
    assert "dinov2" in str(why_no_zero_shot(tmp_path / "both", dino))
    config = encoder.config.__class__(**{**encoder.config.to_dict(), "feature_layers": [1], "feature_norm": False})
    assert "feature layers" in str(why_no_zero_shot(tmp_path / "both", type(encoder)(config)))


def test_errors(tmp_path: Path) -> None:
    write(tmp_path, "siglip")
    encoder, transform = tower(tmp_path, "siglip")
    test = [Labelled("1", picture(0), "a")]
    with pytest.raises(DataError, match="two different classes"):
        zero_shot(tmp_path, encoder, transform, test, ["a", "a"])
    with pytest.raises(DataError, match=r"class name '\?\?' is empty to the text tower"):
        zero_shot(tmp_path, encoder, transform, test, ["a", "b", "??"])
    with pytest.raises(DataError, match="exactly once"):
        zero_shot(tmp_path, encoder, transform, test, ["a", "b"], ["a photo"])
    result = zero_shot(tmp_path, encoder, transform, test, ["b", "c"])
    assert result is not None and result.accuracy == 0 and result.settings["unseen_labels"] == ["a"]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        zero_shot(tmp_path, encoder, transform, test, ["a", "b"])
