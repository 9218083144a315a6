"""`vlm new` end to end, offline: checkpoints that transformers saved become a model that the other commands open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture, shake
from safetensors.torch import load_file
from test_gemma_tokenizer import train
from transformers import GemmaForCausalLM, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

import vlm
from vlm.build.presets import tiny_decoder
from vlm.cli import main
from vlm.encoders.siglip import resample_position_table
from vlm.text.tokenizer import from_sentencepiece

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {**VISION, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 32}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories as transformers saves them: siglip (both towers), vision (alone) and gemma with its tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    full = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)).eval()
    shake(full)
    full.save_pretrained(folder / "siglip")
    preprocessing = {"resample": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "siglip" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    alone = SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()
    alone.load_state_dict(full.vision_model.state_dict())
    alone.save_pretrained(folder / "vision")
    (folder / "spm").mkdir()
    tokenizer = from_sentencepiece(train(folder / "spm"))
    causal: Any = GemmaForCausalLM
    language = causal(tiny_decoder("gemma", vocab_size=len(tokenizer), pad_token_id=0)).eval()
    shake(language)
    language.save_pretrained(folder / "gemma")
    tokenizer.save_pretrained(folder / "gemma")
    return folder


def made(parts: Path, out: Path, *options: str, tower: str = "siglip") -> tuple[vlm.VLM, vlm.Processor]:
    words = ["new", "--encoder", str(parts / tower), "--decoder", str(parts / "gemma"), "--out", str(out)]
    assert main([*words, *options]) == 0
    return vlm.load(out)


def stored(parts: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(parts / name / "model.safetensors")


@pytest.mark.parametrize("tower", ["siglip", "vision"])
def test_tower_and_rows_are_the_sources_bit_for_bit(parts: Path, tmp_path: Path, tower: str) -> None:
    model, processor = made(parts, tmp_path / "out", tower=tower)
    state = model.state_dict()
    prefix = "vision_model." if tower == "siglip" else ""
    vision = {name.removeprefix(prefix): value for name, value in stored(parts, tower).items()}
    ours = {name.removeprefix("model.vision_tower."): v for name, v in state.items() if "vision_tower" in name}
    assert len(ours) > 30 and all(torch.equal(value, vision[name]) for name, value in ours.items())
    language = stored(parts, "gemma")
    old = language.pop("model.embed_tokens.weight")
    assert torch.equal(state["model.language_model.embed_tokens.weight"][: len(old)], old)
    for name, value in language.items():
        assert torch.equal(state[name.replace("model.", "model.language_model.", 1)], value)
    assert not any(value.any() for name, value in state.items() if "multi_modal_projector" in name)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.dtype == torch.float32 and processor.image_token_id == len(old) + 1152


def test_features_are_transformers_own_at_the_towers_size(parts: Path, tmp_path: Path) -> None:
    model, processor = made(parts, tmp_path / "out")
    theirs = SiglipModel.from_pretrained(parts / "siglip").eval()
    pixels = processor.image_transform([picture(1, (60, 50))]).pixel_values
    with torch.no_grad():
        got = model.model.vision_tower(pixels).features
        assert torch.equal(got, theirs.vision_model(pixels).last_hidden_state) and got.std() > 0.1


def test_what_it_prints(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of `vlm info`, and how much of the vocabulary is new."""
    model, processor = made(parts, tmp_path / "out")
    table = capsys.readouterr().out
    assert main(["info", str(tmp_path / "out")]) == 0
    assert table.startswith(capsys.readouterr().out.rstrip())
    rows = model.config.text_config.vocab_size - len(stored(parts, "gemma")["model.embed_tokens.weight"])
    assert f"{rows:,} of the vocabulary; {len(processor.tokenizer):,} tokens" in table.splitlines()[-1]
    made(parts, tmp_path / "json", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["new_vocabulary_rows"] == rows and facts["image_tokens"] == 9
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_the_other_commands_open_it(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(parts, tmp_path / "out")
    picture(1, (60, 50)).save(tmp_path / "a.png")
    capsys.readouterr()
    options = ["--model", str(tmp_path / "out"), "--max-new-tokens", "4", "--device", "cpu", "--json"]
    assert main(["caption", str(tmp_path / "a.png"), *options]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = vlm.generate(*vlm.load(tmp_path / "out"), [tmp_path / "a.png"], ["caption en"], max_new_tokens=4)
    assert said["text"] == expected[0]


def test_options_reach_the_model(parts: Path, tmp_path: Path) -> None:
    options = ["--image-size", "70", "--projector", "mlp", "--seed", "3", "--set", "image.resample=bicubic"]
    model, processor = made(parts, tmp_path / "out", *options, "projector.depth=3", "image.mean=[0.1, 0.2, 0.3]")
    assert model.config.vision_config.image_size == processor.image_transform.image_size == 70
    assert model.config.projector_config == {"kind": "mlp", "depth": 3}
    assert processor.image_transform.resample == "bicubic" and processor.image_transform.mean == (0.1, 0.2, 0.3)
    positions = stored(parts, "siglip")["vision_model.embeddings.position_embedding.weight"]
    got = model.model.vision_tower.embeddings.position_embedding.weight
    assert torch.equal(got, resample_position_table(positions, 25))
    same, _ = vlm.new(parts / "siglip", {"kind": "mlp", "depth": 3}, parts / "gemma", image_size=70, seed=3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())


def test_a_tower_read_as_naflex(parts: Path, tmp_path: Path) -> None:
    model, processor = made(parts, tmp_path / "out", "--encoder-kind", "siglip2_naflex", "--max-num-patches", "20")
    assert processor.image_transform.max_num_patches == 20 and model.config.encoder == "siglip2_naflex"
    batch = processor([picture(1, (300, 60))], ["no"])
    assert batch.spatial_shapes is not None and batch.spatial_shapes.tolist() == [[2, 10]]
    assert model(**batch).logits.isfinite().all()


def test_a_naflex_policy(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--encoder-kind", "siglip2_naflex", "--naflex", "native"]
    _, processor = made(parts, tmp_path / "out", *options)
    assert processor.image_transform.naflex == "native" and processor.image_transform.grid(20, 60) == (2, 5)
    capsys.readouterr()
    assert (
        main(
            ["new", "--encoder", str(parts / "siglip"), "--decoder", str(parts / "gemma"), *options[2:]]
            + ["--out", str(tmp_path / "b")]
        )
        == 2
    )
    assert "reads squares" in capsys.readouterr().err


def test_another_tokenizer(parts: Path, tmp_path: Path) -> None:
    model, processor = made(parts, tmp_path / "out", "--tokenizer", str(parts / "spm" / "gemma.model"))
    ours = vlm.new(parts / "siglip", "linear", parts / "gemma")[1]
    assert processor.tokenizer.get_vocab() == ours.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--image-size", "70", "--encoder-kind", "siglip2_naflex"], "set its budget"),
        (["--image-size", "10"], "image_size is 10, expected a whole number from 14"),
        (["--max-num-patches", "64"], "max_num_patches is a budget of NaFlex towers"),
        (["--projector", "lineer"], "unknown projector 'lineer' (did you mean 'linear'?)"),
        (["--encoder-kind", "siglip3"], "cannot be read as 'siglip3'"),
        (["--set", "image.resampel=bicubic"], "unknown image setting 'resampel' (did you mean 'resample'?)"),
        (["--set", "resample=bicubic"], "--set resample=bicubic: expected image.NAME=VALUE"),
        (["--set", "image.resample"], "expected image.NAME=VALUE"),
        (["--set", "image.std=[0.5"], "--set image.std=[0.5:1: not valid YAML"),
        (["--set", "image.std=[0.5]"], "std must be three numbers, got [0.5]"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--decoder", "{parts}/siglip"], "decoder model_type is 'siglip_text_model'"),
        (["--encoder", "{parts}/gemma"], "model_type is 'gemma', expected a SigLIP checkpoint"),
        (["--encoder", "{parts}/nothing"], "no such directory"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    parts: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["new", "--encoder", str(parts / "siglip"), "--decoder", str(parts / "gemma"), "--out", str(tmp_path / "o")]
    assert main([*words, *(word.replace("{parts}", str(parts)) for word in options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and says in captured.err
    assert captured.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_full_directory_is_left_alone(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "notes.txt").write_text("mine")
    words = ["new", "--encoder", str(parts / "siglip"), "--decoder", str(parts / "gemma"), "--out", str(tmp_path / "o")]
    assert main(words) == 2 and "not empty" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "o").iterdir()] == ["notes.txt"]
