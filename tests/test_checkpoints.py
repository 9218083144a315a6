"""Model directories: bit for bit, opened by transformers' Auto classes, and everything that is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud, picture, shake
from safetensors.torch import load_file, save_file

import vlm
from vlm.build.presets import tiny
from vlm.checkpoints.places import DEMO_SIGLIP, SHIPPED, locate
from vlm.cli.options import DUAL_MODEL
from vlm.errors import CheckpointError, ConfigError, GenerationError
from vlm.images.transforms import ImageTransform

KINDS = [("siglip", "gemma"), ("siglip2_naflex", "gemma2"), ("siglip", "gemma3_text")]
IMAGES = [picture(1, (50, 31)), picture(2, (20, 70))]
PROMPTS = ["caption en", "no"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = loud("siglip", "gemma")
    return vlm.save(model, processor, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(("encoder", "decoder"), KINDS)
def test_round_trip_is_exact(encoder: str, decoder: str, tmp_path: Path) -> None:
    """Every tensor bit for bit, batches, logits and generated text; a second save writes the same bytes."""
    model, processor = loud(encoder, decoder)
    vlm.save(model, processor, tmp_path / "a")
    again, processor2 = vlm.load(tmp_path / "a")
    one, two = model.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) and value.dtype == two[name].dtype for name, value in one.items())
    buffers = dict(again.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    batch, batch2 = (p(IMAGES, PROMPTS) for p in (processor, processor2))
    assert all(torch.equal(batch[name], batch2[name]) for name in batch.keys())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch2).logits)
    options: dict[str, Any] = {"max_new_tokens": 8}
    assert vlm.generate(model, processor, IMAGES, PROMPTS, **options) == vlm.generate(
        again, processor2, IMAGES, PROMPTS, **options
    )
    assert not again.training
    vlm.save(again, processor2, tmp_path / "b")
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_directory_stands_alone(saved: Path) -> None:
    names = {file.name for file in saved.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".py"))]


def test_tied_weights_are_stored_once_and_tied_again(saved: Path, tmp_path: Path) -> None:
    stored = load_file(saved / "model.safetensors")
    assert not [name for name in stored if "lm_head" in name]
    again, processor = vlm.load(saved)
    assert again.lm_head.weight.data_ptr() == again.model.language_model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        again.lm_head.weight.add_(1)
    assert torch.equal(again.model.language_model.embed_tokens.weight, again.lm_head.weight)
    vlm.save(again, processor, tmp_path / "changed")
    assert torch.equal(vlm.load(tmp_path / "changed")[0].lm_head.weight, again.lm_head.weight)


def test_sharded_save(saved: Path, tmp_path: Path) -> None:
    model, processor = vlm.load(saved)
    vlm.save(model, processor, tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again, _ = vlm.load(tmp_path / "shards")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    lost = next(iter((tmp_path / "shards").glob("*.safetensors")))
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        vlm.load(tmp_path / "shards")


@pytest.mark.slow
def test_auto_classes_open_it_in_a_fresh_process(saved: Path, tmp_path: Path) -> None:
    """AutoConfig, AutoModelForImageTextToText and AutoProcessor after one import, offline, with the same logits."""
    model, processor = vlm.load(saved)
    with torch.no_grad():
        torch.save(model(**processor(IMAGES, PROMPTS)).logits, tmp_path / "logits.pt")
    IMAGES[0].save(tmp_path / "0.png")
    IMAGES[1].save(tmp_path / "1.png")
    code = f"""
import torch, vlm.model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
config = AutoConfig.from_pretrained({str(saved)!r})
model = AutoModelForImageTextToText.from_pretrained({str(saved)!r}).eval()
processor = AutoProcessor.from_pretrained({str(saved)!r})
batch = processor([{str(tmp_path / "0.png")!r}, {str(tmp_path / "1.png")!r}], {PROMPTS!r})
with torch.no_grad():
    logits = model(**batch).logits
assert torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r}))
body = AutoModel.from_pretrained({str(saved)!r})
print(type(config).__name__, type(model).__name__, type(processor).__name__, type(body).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["VLMConfig", "VLM", "Processor", "VLMModel"]


def test_bfloat16(saved: Path, tmp_path: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        model, processor = vlm.load(saved, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    full, _ = vlm.load(saved)
    for name, value in full.state_dict().items():
        assert torch.equal(value.bfloat16(), model.state_dict()[name])
    vlm.save(model, processor, tmp_path / "half")
    again, _ = vlm.load(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert len(vlm.generate(again, processor, IMAGES, PROMPTS, max_new_tokens=3)) == 2
    assert vlm.load(tmp_path / "half", dtype="float32")[0].dtype == torch.float32


def test_float16_is_refused_unless_forced(saved: Path) -> None:
    with pytest.raises(GenerationError, match="float16 overflows"):
        vlm.load(saved, dtype="float16")
    assert vlm.load(saved, dtype="float16", force_fp16=True)[0].dtype == torch.float16
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        vlm.load(saved, dtype="bfloat")


def test_attention_can_be_chosen(saved: Path, tmp_path: Path) -> None:
    for wanted in ("eager", "sdpa"):
        model, _ = vlm.load(saved, attn_implementation=wanted)
        assert model.model.language_model.config._attn_implementation == wanted
        assert model.model.vision_tower.config._attn_implementation == wanted
    capped, processor = tiny(decoder="gemma2")
    vlm.save(capped, processor, tmp_path / "gemma2")
    assert vlm.load(tmp_path / "gemma2")[0].model.language_model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="soft-cap of 50"):
        vlm.load(tmp_path / "gemma2", attn_implementation="sdpa")


@pytest.mark.parametrize("problem", ["missing", "unexpected", "mis-shaped"])
def test_weights_that_do_not_fit_are_refused(copied: Path, problem: str) -> None:
    """With the names of the tensors."""
    tensors = load_file(copied / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    if problem == "missing":
        del tensors[name]
    elif problem == "unexpected":
        tensors[name.replace("up_proj", "side_proj")] = torch.zeros(2)
        name = name.replace("up_proj", "side_proj")
    else:
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 {problem}: .*{name.rsplit('.', 3)[-2]}"):
        vlm.load(copied)


def test_a_pickle_is_refused(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        vlm.load(copied)


def test_truncated_weights_are_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="copy"):
        vlm.load(copied)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json"])
def test_missing_files_are_refused(copied: Path, name: str) -> None:
    (copied / name).unlink()
    for extra in copied.glob("tokenizer*"):
        if name == "tokenizer.json":
            extra.unlink()
    with pytest.raises(CheckpointError, match="copy"):
        vlm.load(copied)


def test_directories_that_are_no_model(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        vlm.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no config.json"):
        vlm.load(tmp_path)
    change(copied, "config.json", model_type="llava")
    with pytest.raises(CheckpointError, match="model_type 'llava', expected 'vlm' or 'paligemma'"):
        vlm.load(copied)


def test_what_the_package_ships_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DUAL_MODEL in SHIPPED
    shipped = locate(DEMO_SIGLIP)
    assert shipped == Path(vlm.__file__).parent / "demo/assets/dual" and (shipped / "config.json").exists()
    with pytest.raises(CheckpointError, match=f"did you mean '{DEMO_SIGLIP}'"):
        locate("demo-siglp")
    Path(DEMO_SIGLIP).mkdir()
    assert locate(DEMO_SIGLIP) == Path(DEMO_SIGLIP)  # a path that exists is what is meant


def test_model_and_processor_must_belong_together(copied: Path, tmp_path: Path) -> None:
    model, processor = vlm.load(copied)
    image = json.loads((copied / "processor_config.json").read_text())["image_transform"]
    for values, message in (
        ({**image, "image_size": 42}, "image_size 28, the processor's image_transform 42"),
        ({**image, "patch_size": 7}, "patch_size 14, the processor's image_transform 7"),
        (
            {**image, "mode": "naflex", "max_num_patches": 4, "image_size": None},
            "'naflex' does not fit encoder 'siglip'",
        ),
    ):
        change(copied, "processor_config.json", image_transform=values)
        with pytest.raises(CheckpointError, match=message):
            vlm.load(copied)
        with pytest.raises(CheckpointError, match=message):
            vlm.save(model, vlm.Processor(processor.tokenizer, ImageTransform.from_dict(values)), tmp_path / "x")
        assert not (tmp_path / "x" / "model.safetensors").exists()
    change(copied, "processor_config.json", image_transform=image)
    change(copied, "config.json", image_token_id=7)
    with pytest.raises(CheckpointError, match="image_token_id 7"):
        vlm.load(copied)


def test_a_foreign_tokenizer_is_refused(copied: Path, tmp_path: Path) -> None:
    from vlm.model.processor import Processor
    from vlm.text import tokenizer as tokenizers

    model, processor = vlm.load(copied)
    longer = tokenizers.build(["other words entirely, many of them 0 1 2 3"] * 9, vocab_size=500)
    with pytest.raises(CheckpointError, match="<image> is id"):
        vlm.save(model, Processor(longer, processor.image_transform), tmp_path / "x")
    processor.tokenizer.add_tokens([f"<more{i}>" for i in range(100)])
    with pytest.raises(CheckpointError, match="the embedding only"):
        vlm.save(model, processor, tmp_path / "x")


def test_frozen_and_trained_models_save_alike(tmp_path: Path) -> None:
    """requires_grad and training mode are no part of a checkpoint."""
    model, processor = tiny()
    shake(model)
    model.train().requires_grad_(False)
    vlm.save(model, processor, tmp_path / "m")
    again, _ = vlm.load(tmp_path / "m")
    assert all(parameter.requires_grad for parameter in again.parameters()) and not again.training
    assert model.training
