"""`vlm.new`: parts from configurations and from checkpoints that transformers wrote, and swapping one part."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from coretools import loud, picture, shake
from safetensors.torch import load_file, save_file
from test_gemma_tokenizer import train
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    GemmaTokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vlm
from vlm.build.presets import TINY_CORPUS, tiny_decoder
from vlm.encoders import siglip, siglip2_naflex
from vlm.errors import CheckpointError, ConfigError
from vlm.text import tokenizer as tokenizers

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


def interpolated(table: torch.Tensor, new: int) -> torch.Tensor:
    """A square table at another size: linear between corners, rows then columns."""
    old = math.isqrt(len(table))
    at = np.linspace(0, old - 1, new)
    grid = table.double().numpy().reshape(old, old, -1)
    for axis in (0, 1):
        grid = np.apply_along_axis(lambda line: np.interp(at, np.arange(old), line), axis, grid)
    return torch.from_numpy(grid.reshape(new * new, -1)).float()


@pytest.mark.parametrize("source", ["siglip", "vision"])
def test_another_image_size_resamples_the_positions_alone(parts: Path, source: str) -> None:
    grown, processor = vlm.new(parts / source, "linear", parts / "gemma", image_size=70)
    same, _ = vlm.new(parts / source, "linear", parts / "gemma")
    name = "model.vision_tower.embeddings.position_embedding.weight"
    assert processor.image_transform.image_size == grown.config.vision_config.image_size == 70
    assert grown.state_dict()[name].shape == (25, 32)
    assert torch.allclose(grown.state_dict()[name], interpolated(same.state_dict()[name], 5), atol=1e-6)
    rest = [{key: value for key, value in m.state_dict().items() if key != name} for m in (grown, same)]
    assert_equal(*rest)
    batch = processor([picture(1, (90, 70))], ["no"])
    assert int((batch.input_ids == processor.image_token_id).sum()) == 25 and grown(**batch).logits.isfinite().all()
    again, _ = vlm.new(parts / source, "linear", parts / "gemma", image_size=28)
    assert_equal(again.state_dict(), same.state_dict())


def test_image_size_of_a_new_tower() -> None:
    _, donor = loud("siglip", "gemma")
    text = tiny_decoder("gemma")
    model, processor = vlm.new(siglip.tiny(), "linear", text, donor.tokenizer, image_size=56)
    assert len(model.model.vision_tower.embeddings.position_embedding.weight) == 16
    assert processor.image_transform.image_size == 56 and siglip.tiny().image_size == 28


def test_unseen_pixels_are_warned_of(parts: Path, caplog: pytest.LogCaptureFixture) -> None:
    vlm.new(parts / "siglip", "linear", parts / "gemma", image_size=42)
    assert not caplog.records
    vlm.new(parts / "siglip", "linear", parts / "gemma", image_size=48)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "48 is no multiple of the patch size 14: the last 6 pixels of each side are never seen; 42 or 56" in message


def test_bad_image_sizes(parts: Path) -> None:
    def new(**options: Any) -> None:
        vlm.new(parts / "siglip", "linear", parts / "gemma", **options)

    with pytest.raises(ConfigError, match=r"siglip2_naflex tower takes images of any size.*\"max_num_patches\": 16"):
        new(image_size=56, encoder_kind="siglip2_naflex")
    for size in (13, 0, -28, 28.0, "28"):
        with pytest.raises(ConfigError, match="image_size is .*, expected a whole number from 14"):
            new(image_size=size)
    with pytest.raises(ConfigError, match="image_size is 56, the tower has 28; use image_size=56, which resamples"):
        new(image={"image_size": 56})
    with pytest.raises(ConfigError, match="patch_size is 16, the tower has 14; leave it out"):
        new(image={"patch_size": 16})
    with pytest.raises(ConfigError, match="unknown image setting 'resampel'.*did you mean 'resample'"):
        new(image={"resampel": "bilinear"})


def test_everything_is_float32(parts: Path, tmp_path: Path) -> None:
    """Whatever the checkpoints and configurations say; bfloat16 values are kept exactly."""
    _, donor = loud("siglip", "gemma")
    for source, kind in (("siglip", SiglipModel), ("gemma", GemmaForCausalLM)):
        kind.from_pretrained(parts / source).bfloat16().save_pretrained(tmp_path / source)
    assert json.loads((tmp_path / "gemma" / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = vlm.new(tmp_path / "siglip", "linear", tmp_path / "gemma", donor.tokenizer)
    configs = [SiglipVisionConfig(**VISION, dtype="bfloat16"), tiny_decoder("gemma", dtype="bfloat16")]
    fresh, _ = vlm.new(configs[0], "linear", configs[1], donor.tokenizer)
    for made in (model, fresh):
        assert {value.dtype for value in made.state_dict().values()} == {torch.float32}
    stored = load_file(tmp_path / "gemma" / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == torch.bfloat16 and torch.equal(model.model.language_model.norm.weight, stored.float())


def test_gemmas_vocabulary_becomes_paligemmas(parts: Path, tmp_path: Path) -> None:
    """256,000 Gemma rows: 257,216 in all, `<loc0000>` 256000, `<seg000>` 257024, `<image>` 257152 (a decoder of width 2
    and 3 real pieces stands in)."""
    pieces = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "\n": 4, **{f"p{i}": i for i in range(5, 256_000)}}
    tokenizer = GemmaTokenizer(vocab=pieces, merges=[], mask_token=None)  # type: ignore[arg-type]
    text = tiny_decoder("gemma", vocab_size=256_000, hidden_size=2, intermediate_size=2, num_hidden_layers=1)
    model, processor = vlm.new(siglip.tiny(), "linear", text, tokenizer)
    ids = processor.tokenizer.convert_tokens_to_ids(["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", "<image>"])
    assert ids == [256_000, 257_023, 257_024, 257_151, 257_152]
    assert model.config.text_config.vocab_size == 257_216 and model.config.image_token_id == 257_152


@pytest.mark.parametrize("decoder", ["gemma", "gemma2"])
def test_parts_of_a_paligemma(decoder: str, tmp_path: Path) -> None:
    """Tower and decoder of one, in the Hub's layout: no new rows, a new projector, Gemma 2 without its window."""
    model, processor = loud("siglip", decoder)
    vlm.export(model, processor, tmp_path / "pali", parity="none")
    config = json.loads((tmp_path / "pali" / "config.json").read_text())
    config.pop("vlm_sliding_window", None)  # our note that this model uses the window; no published file has it
    (tmp_path / "pali" / "config.json").write_text(json.dumps(config))
    made, other = vlm.new(tmp_path / "pali", "linear", tmp_path / "pali")
    assert_equal(state(made, "vision_tower"), state(model, "vision_tower"))
    assert_equal(state(made, "language_model"), state(model, "language_model"))
    assert not any(value.any() for value in state(made, "projector").values())
    assert other.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert other.image_transform == processor.image_transform
    assert set(getattr(made.config.text_config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def test_the_decoder_of_a_model_of_ours(parts: Path, tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma2")
    vlm.save(model, processor, tmp_path / "ours")
    made, other = vlm.new(parts / "siglip", "linear", tmp_path / "ours")
    assert_equal(state(made, "language_model"), state(model, "language_model"))
    assert made.config.text_config.layer_types == model.config.text_config.layer_types
    assert other.image_token_id == processor.image_token_id


@pytest.mark.parametrize("kind", ["siglip", "siglip2_naflex", "fused"])
def test_the_tower_of_a_model_of_ours(kind: str, parts: Path, tmp_path: Path) -> None:
    """With the image transform that the model was trained with; in layers and sizes as it is."""
    model, processor = loud(kind, "gemma")
    settings = {"resample": "bicubic", "rounding": "nearest"} if kind != "siglip2_naflex" else {"naflex": "native"}
    members = getattr(processor.image_transform, "members", None)
    if members is None:
        transform = replace(processor.image_transform, **settings)  # type: ignore[arg-type]
        processor = vlm.Processor(processor.tokenizer, transform)
    vlm.save(model, processor, tmp_path / "ours")
    made, other = vlm.new(tmp_path / "ours", "linear", parts / "gemma")
    assert_equal(state(made, "vision_tower"), state(model, "vision_tower"))
    assert other.image_transform == processor.image_transform and made.config.encoder == kind


def test_a_sentencepiece_file_is_a_tokenizer(parts: Path, tmp_path: Path) -> None:
    path = train(tmp_path)
    model, processor = vlm.new(siglip.tiny(), "linear", tiny_decoder("gemma"), path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = processor(None, ["a red  square"]).input_ids[0].tolist()
    assert ids == [2, *original.encode("a red  square"), *original.encode("\n")]
    assert processor.image_token_id == original.get_piece_size() + 1152 < model.config.text_config.vocab_size


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
    with pytest.raises(CheckpointError, match="decoder model_type is 'siglip_text_model'"):
        vlm.new(siglip.tiny(), "linear", parts / "siglip", bare_tokenizer)
    with pytest.raises(ConfigError, match="no encoder takes a GemmaConfig"):
        vlm.new(text, "linear", text, bare_tokenizer)
