"""`vlm.new`: parts from configurations and from checkpoints that transformers wrote, and swapping one part."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud, picture, shake
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vlm
from vlm import tokenizer as tokenizers
from vlm.encoders import siglip, siglip2_naflex
from vlm.errors import CheckpointError, ConfigError
from vlm.presets import TINY_CORPUS, tiny_decoder

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "projection_size": 32,
}
CAUSAL: dict[str, Any] = {"gemma": GemmaForCausalLM, "gemma2": Gemma2ForCausalLM, "gemma3_text": Gemma3ForCausalLM}
OLD_ROWS = 403


@pytest.fixture(scope="module")
def bare_tokenizer() -> Any:
    """A Gemma tokenizer without image tokens."""
    tokenizer = tokenizers.build(TINY_CORPUS * 20, vocab_size=400, loc_seg=False)
    return tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, bare_tokenizer: Any) -> Path:
    """Directories as transformers saves them: siglip (both towers), vision (alone), gemma, gemma2, gemma3_text."""
    folder = tmp_path_factory.mktemp("parts")
    full = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)).eval()
    shake(full)
    full.save_pretrained(folder / "siglip")
    preprocessing = {"resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.25]}
    (folder / "siglip" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    alone = SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()
    alone.load_state_dict(full.vision_model.state_dict())
    alone.save_pretrained(folder / "vision")
    for kind, causal in CAUSAL.items():
        language = causal(tiny_decoder(kind, vocab_size=OLD_ROWS, pad_token_id=0)).eval()
        shake(language)
        language.save_pretrained(folder / kind)
        bare_tokenizer.save_pretrained(folder / kind)
    return folder


def state(model: vlm.VLM, part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if part in name}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys() and one
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("source", ["siglip", "vision"])
def test_tower_features_are_transformers_own(parts: Path, source: str) -> None:
    """From a full SigLIP checkpoint and from the vision tower alone; the pooling head is left out."""
    model, processor = vlm.new(parts / source, "linear", parts / "gemma")
    theirs = SiglipModel.from_pretrained(parts / "siglip").eval().vision_model
    pixels = processor.image_transform([picture(1, (50, 40))]).pixel_values
    with torch.no_grad():
        got = model.model.vision_tower(pixels).features
        assert torch.equal(got, theirs(pixels).last_hidden_state)
    assert got.std() > 0.1 and not any("head" in name for name in model.state_dict() if "vision_tower" in name)
    assert not model.training and model.dtype == torch.float32


@pytest.mark.parametrize("kind", list(CAUSAL))
def test_decoder_logits_are_transformers_own(parts: Path, kind: str) -> None:
    """Pure causal text through the assembled model equals the language model; the old vocabulary rows are untouched."""
    model, processor = vlm.new(parts / "siglip", "linear", parts / kind)
    theirs = CAUSAL[kind].from_pretrained(parts / kind, attn_implementation="eager").eval()
    ids = torch.tensor([[2, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]])
    with torch.no_grad():
        got = model(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits
        wanted = theirs(ids).logits
    assert torch.allclose(got[..., :OLD_ROWS], wanted, atol=1e-5) and wanted.std() > 0.1
    table = model.model.language_model.embed_tokens.weight
    assert torch.equal(table[:OLD_ROWS], theirs.model.embed_tokens.weight) and table is model.lm_head.weight
    assert table.shape[0] % 64 == 0 and table.shape[0] > len(processor.tokenizer)


def test_new_vocabulary_rows(parts: Path) -> None:
    """N(0, 0.02), not the mean embedding; the same for the same seed."""
    model, processor = vlm.new(parts / "siglip", "linear", parts / "gemma")
    rows = model.model.language_model.embed_tokens.weight[OLD_ROWS:].detach()
    assert rows.shape[0] >= 1100
    assert abs(float(rows.std()) - 0.02) < 0.001 and abs(float(rows.mean())) < 0.001
    assert float((rows.abs() > 0.04).float().mean()) == pytest.approx(0.0455, abs=0.006)  # normal, not uniform
    assert (rows[0] - rows[1]).abs().max() > 0.01
    again, other = (vlm.new(parts / "siglip", "linear", parts / "gemma", seed=seed)[0] for seed in (0, 1))
    assert torch.equal(again.lm_head.weight[OLD_ROWS:], rows)
    assert not torch.equal(other.lm_head.weight[OLD_ROWS:], rows)
    assert processor.image_token_id == model.config.image_token_id


def test_fresh_projector_is_zero(parts: Path) -> None:
    model, _ = vlm.new(parts / "siglip", "linear", parts / "gemma")
    projector = model.model.multi_modal_projector
    assert not projector.linear.weight.any() and not projector.linear.bias.any()
    mlp = vlm.new(parts / "siglip", {"kind": "mlp", "depth": 3}, parts / "gemma")[0].model.multi_modal_projector
    assert not mlp.layers[2].weight.any() and mlp.layers[0].weight.any() and mlp.layers[1].bias.any()


def test_swapping_a_part_leaves_the_others(parts: Path) -> None:
    """From configurations and from checkpoints: bit-equal weights in every part that was not swapped."""
    _, donor = loud("siglip", "gemma")

    def make(encoder: Any, projector: str, decoder: Any) -> vlm.VLM:
        image = {"max_num_patches": 4} if encoder is naflex else None
        return vlm.new(encoder, projector, decoder, donor.tokenizer, image=image)[0]

    naflex, fixed, text = siglip2_naflex.tiny(), siglip.tiny(), tiny_decoder("gemma")
    base = make(fixed, "linear", text)
    for other in (make(fixed, "mlp", text), make(naflex, "linear", text), make(parts / "siglip", "mlp", text)):
        assert_equal(state(base, "language_model"), state(other, "language_model"))
    for other in (make(fixed, "mlp", text), make(fixed, "linear", tiny_decoder("gemma2"))):
        assert_equal(state(base, "vision_tower"), state(other, "vision_tower"))
    deep = [make(encoder, "mlp", decoder) for encoder, decoder in ((fixed, text), (naflex, tiny_decoder("gemma2")))]
    assert_equal(state(deep[0], "projector"), state(deep[1], "projector"))
    loaded = [make(encoder, "linear", parts / "gemma") for encoder in (fixed, naflex, parts / "siglip")]
    assert_equal(state(loaded[0], "language_model"), state(loaded[1], "language_model"))
    assert_equal(state(loaded[0], "language_model"), state(loaded[2], "language_model"))


def test_recorded_preprocessing_is_used(parts: Path) -> None:
    """The checkpoint's own filter and normalisation; a setting overrides; NaFlex keeps its float filter."""
    _, processor = vlm.new(parts / "siglip", "linear", parts / "gemma")
    transform = processor.image_transform
    assert (transform.mode, transform.image_size, transform.patch_size) == ("squash", 28, 14)
    assert (transform.resample, transform.mean, transform.std) == ("bicubic", (0.4, 0.5, 0.6), (0.5, 0.5, 0.25))
    _, processor = vlm.new(parts / "siglip", "linear", parts / "gemma", image={"resample": "lanczos"})
    assert processor.image_transform.resample == "lanczos"
    _, processor = vlm.new(parts / "vision", "linear", parts / "gemma")
    assert processor.image_transform.resample == "bilinear"
    _, processor = vlm.new(
        parts / "siglip", "linear", parts / "gemma", encoder_kind="siglip2_naflex", image={"max_num_patches": 9}
    )
    assert processor.image_transform.resample == "bilinear" and processor.image_transform.mean == (0.4, 0.5, 0.6)
    assert processor.image_transform.max_num_patches == 9


def test_unused_pooling_head_is_dropped_from_configurations() -> None:
    """A configuration with its default head must not leave parameters without a gradient in the model."""
    _, donor = loud("siglip", "gemma")
    for config in (SiglipVisionConfig(**VISION), siglip2_naflex.Config(**{**VISION, "num_patches": 4})):
        before = copy.deepcopy(config.to_dict())
        model, _ = vlm.new(config, "linear", tiny_decoder("gemma"), donor.tokenizer)
        assert not [name for name in model.state_dict() if "vision_tower.head" in name]
        assert config.to_dict() == before  # the caller's configuration is not changed


def test_arguments_are_not_changed(bare_tokenizer: Any) -> None:
    text, size = tiny_decoder("gemma"), len(bare_tokenizer)
    before = copy.deepcopy(text.to_dict())
    vlm.new(siglip.tiny(), "linear", text, bare_tokenizer)
    assert text.to_dict() == before and len(bare_tokenizer) == size


def broken(parts: Path, tmp_path: Path, source: str, change: Any) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    folder = tmp_path / source
    shutil.copytree(parts / source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_broken_towers_are_refused(parts: Path, tmp_path: Path) -> None:
    name = next(
        n for n in load_file(parts / "siglip" / "model.safetensors") if n.endswith("0.mlp.fc1.weight") and "vis" in n
    )

    def missing(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    def shape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(3, 3)

    def surplus(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name.replace("fc1", "fc9")] = torch.zeros(1)

    for i, (change, message) in enumerate(
        [
            (missing, "missing: encoder.layers.0.mlp.fc1.weight"),
            (shape, r"mis-shaped: encoder.layers.0.mlp.fc1.weight \(3, 3\) for \(64, 32\)"),
            (surplus, "unexpected: encoder.layers.0.mlp.fc9.weight"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            vlm.new(broken(parts, tmp_path / str(i), "siglip", change), "linear", parts / "gemma")


def test_broken_decoders_are_refused(parts: Path, tmp_path: Path) -> None:
    def missing(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    def rows(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()

    with pytest.raises(CheckpointError, match="missing: norm.weight"):
        vlm.new(parts / "siglip", "linear", broken(parts, tmp_path / "a", "gemma", missing))
    with pytest.raises(CheckpointError, match="mis-shaped: embed_tokens.weight"):
        vlm.new(parts / "siglip", "linear", broken(parts, tmp_path / "b", "gemma", rows))


def test_pickles_are_refused(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickle"
    shutil.copytree(parts / "siglip", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only safetensors"):
        vlm.new(folder, "linear", parts / "gemma")


def test_shards_outside_the_directory_are_refused(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(parts / "siglip", folder)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../gemma/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        vlm.new(folder, "linear", parts / "gemma")


def test_sharded_towers_load(parts: Path, tmp_path: Path) -> None:
    SiglipModel.from_pretrained(parts / "siglip").save_pretrained(tmp_path / "s", max_shard_size="30KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    one, two = (vlm.new(folder, "linear", parts / "gemma")[0] for folder in (tmp_path / "s", parts / "siglip"))
    assert_equal(one.state_dict(), two.state_dict())


def test_bad_requests(parts: Path, tmp_path: Path, bare_tokenizer: Any) -> None:
    text = tiny_decoder("gemma")
    with pytest.raises(ConfigError, match="no config.json"):
        vlm.new(tmp_path, "linear", text, bare_tokenizer)
    with pytest.raises(ConfigError, match="model_type is 'gemma', expected a SigLIP"):
        vlm.new(parts / "gemma", "linear", text, bare_tokenizer)
    with pytest.raises(ConfigError, match="decoder is missing"):
        vlm.new(siglip.tiny(), "linear")
    with pytest.raises(ConfigError, match="tokenizer is missing"):
        vlm.new(siglip.tiny(), "linear", text)
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        vlm.new(siglip.tiny(), "liner", text, bare_tokenizer)
    with pytest.raises(ConfigError, match="decoder model_type is 'siglip_text_model'"):
        vlm.new(siglip.tiny(), "linear", parts / "siglip", bare_tokenizer)
    with pytest.raises(ConfigError, match="no encoder takes a GemmaConfig"):
        vlm.new(text, "linear", text, bare_tokenizer)
