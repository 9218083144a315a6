"""Opening PaliGemma directories as transformers and the Hub write them: every key layout, exact weights, honest
configurations, several devices, and a refusal for everything that would otherwise load wrong in silence."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud, picture
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
)

import vlm
from vlm.checkpoints.configs import paligemma_config
from vlm.checkpoints.loader import empty
from vlm.checkpoints.manifest import NAME as MANIFEST
from vlm.errors import CheckpointError, ConfigError
from vlm.exchange import importing
from vlm.model.forward import VLM

IMAGES = [picture(1, (50, 31)), picture(2, (20, 70))]
Tensors = dict[str, Tensor]


def write_paligemma(folder: Path, decoder: str) -> VLM:
    """A PaliGemma directory written by transformers alone, with the weights of a tiny model; returns that model."""
    model, processor = loud("siglip", decoder)
    text = model.config.text_config.to_dict()
    config = PaliGemmaConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config=text,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
        image_token_index=processor.image_token_id,
        vocab_size=text["vocab_size"],
    )
    theirs = PaliGemmaForConditionalGeneration(config)
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(folder)
    images: Any = SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=2)
    images.image_seq_length = 4
    PaliGemmaProcessor(image_processor=images, tokenizer=processor.tokenizer).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paligemma") / "g1"
    write_paligemma(folder, "gemma")
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / "model.safetensors", {"format": "pt"})


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def same(model: VLM, other: VLM) -> bool:
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) and v.dtype == two[k].dtype for k, v in one.items())


# --- what opens -------------------------------------------------------------------------------------------------------


def hub(name: str) -> str:
    """As published: `vision_tower.vision_model.`."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def newer(name: str) -> str:
    """As transformers keeps it in memory since 4.52."""
    return "model." + name.replace("language_model.model.", "language_model.")


def newer_hub(name: str) -> str:
    return newer(hub(name))


LAYOUTS: list[Callable[[str], str]] = [str, hub, newer, newer_hub]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["fresh", "hub", "newer", "newer_hub"])
def test_every_key_layout_opens_bit_for_bit(copied: Path, layout: Callable[[str], str]) -> None:
    wanted = loud("siglip", "gemma")[0]
    rewrite(copied, lambda tensors: {layout(name): tensor for name, tensor in tensors.items()})
    model, _ = vlm.load(copied)
    assert same(model, wanted)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert not model.training
    made, _ = vlm.new(copied, "linear", copied)  # its tower and its decoder, as parts of a new model
    kept = [name for name in wanted.state_dict() if "multi_modal_projector" not in name]
    assert len(kept) > 50 and all(torch.equal(made.state_dict()[name], wanted.state_dict()[name]) for name in kept)


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_stored_output_embedding_must_be_the_tied_one(copied: Path, head: str) -> None:
    embedding = "language_model.model.embed_tokens.weight"
    rewrite(copied, lambda t: t.update({head: t[embedding].clone()}))
    assert same(vlm.load(copied)[0], loud("siglip", "gemma")[0])
    rewrite(copied, lambda t: t[head].mul_(1.01))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from embed_tokens.weight"):
        vlm.load(copied)


@pytest.mark.parametrize("decoder", ["gemma", "gemma2"])
def test_logits_and_text_equal_transformers(decoder: str, tmp_path: Path) -> None:
    write_paligemma(tmp_path, decoder)
    model, processor = vlm.load(tmp_path)
    theirs: Any = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    if decoder == "gemma2":  # transformers' window would hide tokens; ours follows the original
        assert set(model.config.text_config.layer_types) == {"full_attention"}
        for mask in theirs.model.language_model.layers:
            mask.attention_type = "full_attention"
        theirs.config.text_config.layer_types = ["full_attention"] * 2
    batch = processor(IMAGES, ["caption en", "no"])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")}
    with torch.no_grad():
        real = batch.attention_mask.bool()
        model.config.softcap_in_generation = False
        hidden = theirs.model(**inputs).last_hidden_state
        assert (model(**batch).logits - theirs.lm_head(hidden))[real].abs().max() < 1e-4


def test_the_image_transform_is_that_of_the_checkpoint(written: Path) -> None:
    _, processor = vlm.load(written)
    theirs = PaliGemmaProcessor.from_pretrained(written, backend="pil")
    batch = processor(IMAGES, ["caption en", "no"], ["yes", "a red square"])
    wanted = theirs(
        images=IMAGES,
        text=["<image>caption en", "<image>no"],
        suffix=["yes", "a red square"],
        padding="longest",
        return_tensors="pt",
    )
    assert batch.pixel_values is not None and torch.equal(batch.pixel_values, wanted["pixel_values"])
    for row in range(2):
        real, expected = batch.attention_mask[row].bool(), wanted["attention_mask"][row].bool()
        assert batch.input_ids[row][real].tolist() == wanted["input_ids"][row][expected].tolist()
    assert processor.image_transform.resample == "bilinear"


def test_a_null_list_of_layer_types_is_none(copied: Path) -> None:
    edit(copied, "config.json", lambda c: c["text_config"].update(layer_types=None))
    model, processor = vlm.load(copied)
    assert len(vlm.generate(model, processor, IMAGES[:1], ["caption en"], max_new_tokens=3)) == 1


def test_an_older_preprocessor_file_and_a_sentencepiece_model_open(copied: Path) -> None:
    values = json.loads((copied / "processor_config.json").read_text())
    (copied / "processor_config.json").unlink()
    (copied / "preprocessor_config.json").write_text(json.dumps(values["image_processor"]))
    assert vlm.load(copied)[1].image_transform == vlm.load(copied)[1].image_transform
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no preprocessor_config.json"):
        vlm.load(copied)


def test_dtypes(copied: Path) -> None:
    rewrite(copied, lambda t: {k: v.bfloat16() for k, v in t.items()})
    model, _ = vlm.load(copied)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in vlm.load(copied, dtype="float32")[0].parameters()} == {torch.float32}
    rewrite(copied, lambda t: {k: v.float() if "norm" in k else v for k, v in t.items()})
    edit(copied, "config.json", lambda c: c.pop("dtype", None))
    model, _ = vlm.load(copied)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    assert vlm.load(copied, dtype="bfloat16")[0].dtype == torch.bfloat16


# --- honest configurations --------------------------------------------------------------------------------------------


def test_published_configurations_are_completed_as_published(written: Path) -> None:
    """What the Hub's file of paligemma-3b-pt-224 leaves out, and what its class would fill in wrongly."""
    values = {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": 256,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
            "vocab_size": 257216,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_image_tokens": 256,
            "patch_size": 14,
            "projection_dim": 2048,
            "projector_hidden_act": "gelu_fast",
            "vision_use_head": False,
        },
    }
    config = paligemma_config(values, "config.json")
    assert (
        sum(p.numel() for p in empty(VLM, config).parameters()) == 2_923_335_408 + 64 * 2048
    )  # 64 rows more than published
    del values["vision_config"]
    assert paligemma_config(values, "config.json").vision_config.intermediate_size == 4304
    del values["image_token_index"]
    assert paligemma_config(values, "config.json").image_token_id is None  # taken from the tokenizer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["text_config"].update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected"),
        (lambda c: c["text_config"].update(hidden_size="32"), "text_config.hidden_size is '32'"),
        (lambda c: c["text_config"].update(vocab_size=-1), "text_config.vocab_size is -1"),
        (lambda c: c["vision_config"].update(patch_size=0), "vision_config.patch_size is 0"),
        (lambda c: c["vision_config"].update(image_size=7), "image_size 7 is smaller than patch_size 14"),
        (lambda c: c["text_config"].update(num_hidden_layers=3), "3 layers in model.language_model"),
        (lambda c: c["vision_config"].update(num_hidden_layers=1), "1 layers in model.vision_tower"),
        (lambda c: c["text_config"].update(intermediate_size=128), "mis-shaped: .*down_proj"),
        (lambda c: c["vision_config"].update(intermediate_size=4096), "mis-shaped: .*fc1"),
        (lambda c: c["text_config"].update(model_type="llama"), "decoder model_type is 'llama'"),
        (lambda c: c["text_config"].update(rms_norm_eps="x"), "rms_norm_eps is 'x'"),
        (lambda c: c.update(image_token_index=5), "<image> is id"),
        (lambda c: c.update(text_config=[1]), "text_config is list"),
        (lambda c: c.update(num_labels=10**9), "num_labels is 1000000000"),
        (lambda c: c["vision_config"].update(image_size=None), "image_size is null"),
        (lambda c: c["text_config"].update(attention_dropout=-1), "attention_dropout is -1"),
        (lambda c: c["text_config"].update(rope_theta=5e4, rope_parameters={"rope_theta": 1e4}), "rope_theta is 50000"),
        (lambda c: c.update(dtype=-1), "dtype is -1"),
        (lambda c: c.update(tie_word_embeddings=False), "no lm_head.weight"),
        (lambda c: c.pop("text_config"), "no text_config"),
        (
            lambda c: c.update(model_type="siglip"),
            "two towers, which write no text: .*vlm new --encoder",
        ),
        (lambda c: c.update(model_type="gemma2"), "decoder, build a model on it: vlm new --decoder"),
    ],
)
def test_wrong_configurations_are_refused(copied: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(copied, "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        vlm.load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["image_processor"].update(size={"height": 56, "width": 56}), "the tower reads 28x28"),
        (lambda c: c["image_processor"].update(image_std=[0, 0, 0]), "std must be positive"),
        (lambda c: c["image_processor"].update(image_mean=[0.5]), "mean must be three numbers"),
        (lambda c: c["image_processor"].update(image_seq_length=5), "image_seq_length is 5, the tower gives 4"),
        (lambda c: c["image_processor"].update(do_normalize=False), "do_normalize False"),
        (lambda c: c["image_processor"].update(do_center_crop=True), "do_center_crop True"),
        (lambda c: c["image_processor"].update(rescale_factor=1.0), "rescale_factor 1.0"),
        (lambda c: c["image_processor"].update(image_processor_type="CLIPImageProcessor"), "CLIPImageProcessor"),
        (lambda c: c["image_processor"].update(resample=True), "resample True"),
        (lambda c: c["image_processor"].update(resample=9), "resample 9, known"),
    ],
)
def test_wrong_image_settings_are_refused(copied: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(copied, "processor_config.json", change)
    with pytest.raises(CheckpointError, match=message):
        vlm.load(copied)


# --- weights ----------------------------------------------------------------------------------------------------------

UP = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), "1 missing: model.language_model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"language_model.model.extra": torch.zeros(2)}), "1 unexpected: .*extra"),
        (lambda t: t.update({UP: torch.zeros(3, 5)}), r"1 mis-shaped: .*up_proj.weight \(3, 5\) for"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), "are quantised: 1 tensors .*up_proj.weight I8"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "up_proj.weight F8_E4M3"),
        (lambda t: t.update({UP: t[UP].double()}), "up_proj.weight F64"),
        (lambda t: t[UP].view(-1)[7:8].fill_(float("nan")), "up_proj.weight holds NaN or infinity"),
        (lambda t: t[UP].view(-1)[7:8].fill_(float("-inf")), "up_proj.weight holds NaN or infinity"),
        (lambda t: {"module." + k: v for k, v in t.items()}, "missing: .*unexpected: .*module"),
        (lambda t: t.update({"model.language_model.norm.weight": torch.zeros(32)}), "the same parameter"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied: Path, change: Callable[[Tensors], Any], message: str) -> None:
    rewrite(copied, change)
    with pytest.raises(CheckpointError, match=message):
        vlm.load(copied)


def test_nonfinite_weights_open_when_asked_for(copied: Path) -> None:
    rewrite(copied, lambda t: t[UP].view(-1)[7:8].fill_(float("nan")))
    model, _ = vlm.load(copied, allow_nonfinite=True)
    assert sum(int(p.isnan().sum()) for p in model.parameters()) == 1


def test_nothing_is_read_before_the_headers_fit(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.checkpoints.weights import Weights

    def refuse(self: Weights, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Weights, "read", refuse)
    rewrite(copied, lambda t: t.pop(UP))
    with pytest.raises(CheckpointError, match="missing"):
        vlm.load(copied)


def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A file gives way to something else of its name."""

    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: f.unlink(), "no model.safetensors"),
    "empty": (lambda f: f.write_bytes(b""), "not a complete safetensors file"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "not a complete safetensors file"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"x" * 9), "not a complete safetensors file"),
    "pointer": (lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "header": (lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]), "not a complete safetensors file"),
    "directory": (replaced(Path.mkdir), "not a regular file"),
    "pipe": (replaced(os.mkfifo), "not a regular file"),
    "dangling": (replaced(lambda f: f.symlink_to("nowhere")), "no model.safetensors|no such file"),
    "pickle": (lambda f: f.rename(f.with_name("pytorch_model.bin")), "only safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(copied: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        vlm.load(copied)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_is_refused(copied: Path, name: str) -> None:
    """Opening one would wait for ever."""
    replaced(os.mkfifo)(copied / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        vlm.load(copied)


@pytest.fixture
def sharded(written: Path, tmp_path: Path) -> Path:
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(written)
    folder = Path(shutil.copytree(written, tmp_path / "sharded"))
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="80KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_shards_open(sharded: Path) -> None:
    assert same(vlm.load(sharded)[0], loud("siglip", "gemma")[0])


def redirect(target: str) -> Callable[[dict[str, Any]], Any]:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = target

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (redirect("../model.safetensors"), "not a plain file name"),
        (redirect("/etc/model.safetensors"), "not a plain file name"),
        (redirect("absent.safetensors"), "no such file"),
        (redirect("x" * 5000 + ".safetensors"), "not a plain file name"),
        (redirect("pytorch_model.bin"), "ending in .safetensors"),
        (lambda i: i["weight_map"].popitem(), "disagree about 1 tensors|no index lists"),
        (lambda i: i["weight_map"].update(more=next(iter(i["weight_map"].values()))), "disagree about 1 tensors: more"),
        (lambda i: i.update(weight_map={}), "weight_map is missing"),
        (lambda i: i.update(weight_map=[1]), "weight_map is missing"),
    ],
)
def test_wrong_indexes_are_refused(sharded: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(sharded, "model.safetensors.index.json", change)
    with pytest.raises(CheckpointError, match=message):
        vlm.load(sharded)


def test_a_stale_index_or_shard_is_refused(sharded: Path, written: Path, copied: Path) -> None:
    shutil.copy(sharded / "model.safetensors.index.json", copied)
    with pytest.raises(CheckpointError, match="holds both model.safetensors and"):
        vlm.load(copied)
    shutil.copy(next(sharded.glob("*-of-*.safetensors")), sharded / "model-00009-of-00009.safetensors")
    with pytest.raises(CheckpointError, match="model-00009-of-00009.safetensors beside"):
        vlm.load(sharded)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": ' + "9" * 6000 + "}", "[" * 100_000, "\udcff"])
def test_broken_json_is_refused(copied: Path, content: str) -> None:
    (copied / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="config.json: (not valid JSON|holds a list)"):
        vlm.load(copied)


JUNK: tuple[Any, ...] = (None, -1, 0, 3.5, 10**30, "x", "", [], {}, [1, 2, 3], True, float("inf"))


def keys_of(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(values, dict):
        return []
    return [found for key, value in values.items() for found in [(*path, key), *keys_of(value, (*path, key))]]


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["paligemma", "own"])
def test_junk_values_open_or_are_refused(kind: str, name: str, written: Path, tmp_path: Path) -> None:
    """Whatever stands in a file: no exception but ours, each naming the place."""
    folder = tmp_path / "model"
    if kind == "own":
        vlm.save(*loud("siglip2_naflex", "gemma3_text"), folder)
        (folder / MANIFEST).unlink()
    else:
        shutil.copytree(written, folder)
    values = json.loads((folder / name).read_text())
    draw, refused = random.Random(f"{kind}/{name}"), 0
    for _ in range(40):
        changed = json.loads(json.dumps(values))
        *parents, last = draw.choice(keys_of(values))
        target = changed
        for key in parents:
            target = target[key]
        target[last] = draw.choice(JUNK)
        (folder / name).write_text(json.dumps(changed))
        try:
            vlm.load(folder)
        except CheckpointError as error:
            refused += 1
            assert str(folder) in str(error)
    assert refused > 5


def test_nobody_is_asked_whether_to_run_code(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on the terminal when nothing is said about a checkpoint's own code."""
    (copied / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for kind in ("EvilTokenizer", "GemmaTokenizer"):
        change: dict[str, Any] = {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
        values = json.loads((copied / "tokenizer_config.json").read_text())
        (copied / "tokenizer_config.json").write_text(json.dumps({**values, **change}))
        if kind == "EvilTokenizer":
            with pytest.raises(CheckpointError, match="code inside the checkpoint"):
                vlm.load(copied)
        else:
            assert same(vlm.load(copied)[0], loud("siglip", "gemma")[0])
    assert importing.convert(copied, copied.parent / "imported").ok


def test_settings_of_generation_in_a_checkpoint_change_nothing(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers would fill what a caller leaves open from the file."""
    model, processor = vlm.load(copied)
    options: dict[str, Any] = {"max_new_tokens": 12}
    wanted = vlm.generate(model, processor, IMAGES, ["caption en", "no"], **options)
    settings = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "temperature": 0.7, "do_sample": False}
    edit(copied, "generation_config.json", lambda c: c.update(settings, guidance_scale=3, output_scores=True))
    with caplog.at_level("INFO", logger="vlm"):
        again, _ = vlm.load(copied)
    assert "repetition_penalty" in caplog.text
    assert vlm.generate(again, processor, IMAGES, ["caption en", "no"], **options) == wanted
    vlm.save(again, processor, tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version="2.0"), "tokenizer.json: cannot be read .*newer version"),
        (lambda c: c.update(pre_tokenizer={"type": "?"}), "tokenizer.json: cannot be read"),
        (lambda c: c.update(model={"type": "Sequence"}), "tokenizer.json: cannot be read"),
    ],
)
def test_tokenizers_that_cannot_be_read(copied: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """The library raises a plain Exception."""
    edit(copied, "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=message):
        vlm.load(copied)


def test_code_in_a_checkpoint_is_not_run(copied: Path) -> None:
    (copied / "code.py").write_text("raise SystemExit('ran')")
    edit(copied, "config.json", lambda c: c.update(auto_map={"AutoModel": "code.Model", "AutoConfig": "code.Config"}))
    edit(copied, "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["code.T", None]}))
    edit(copied, "processor_config.json", lambda c: c.update(auto_map={"AutoProcessor": "code.P"}))
    assert same(vlm.load(copied)[0], loud("siglip", "gemma")[0])


# --- manifest ---------------------------------------------------------------------------------------------------------


def test_the_manifest_sees_what_nothing_else_can(tmp_path: Path) -> None:
    """A transposed square matrix, a flipped bit, another head count: each loads without it."""
    model, processor = loud("siglip", "gemma")
    folder = vlm.save(model, processor, tmp_path / "model")
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(listed) == {f.name for f in folder.iterdir()} - {MANIFEST}
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"

    def transpose(tensors: Tensors) -> None:
        tensors[name] = tensors[name].T.contiguous()

    rewrite(folder, transpose)
    with pytest.raises(CheckpointError, match="model.safetensors: has another s.* than manifest.json says"):
        vlm.load(folder)
    assert not same(vlm.load(folder, verify="none")[0], model)
    rewrite(folder, transpose)
    edit(folder, "config.json", lambda c: c["vision_config"].update(num_attention_heads=8))
    with pytest.raises(CheckpointError, match="config.json: has another s"):
        vlm.load(folder)
    with pytest.raises(ConfigError, match="unknown verify 'ful'"):
        vlm.load(folder, verify="ful")  # type: ignore[arg-type]


def test_an_untied_configuration_is_refused(tmp_path: Path) -> None:
    folder = vlm.save(*loud("siglip", "gemma"), tmp_path / "model")
    (folder / MANIFEST).unlink()
    edit(folder, "config.json", lambda c: c.update(tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match="false, but there is no lm_head.weight"):
        vlm.load(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.language_model.embed_tokens.weight"].clone()}))
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to true"):
        vlm.load(folder)


def test_large_files_are_hashed_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.checkpoints import manifest

    folder = vlm.save(*loud("siglip", "gemma"), tmp_path / "model")
    monkeypatch.setattr(manifest, "QUICK_BYTES", 100_000)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    vlm.load(folder)
    with pytest.raises(CheckpointError, match="another sha256"):
        vlm.load(folder, verify="full")


def test_an_open_model_and_its_files_are_apart(tmp_path: Path) -> None:
    """Weights are views of the files: training them does not change a file, and saving over the files they came from
    does not change the model."""
    model, processor = loud("siglip", "gemma")
    vlm.save(model, processor, tmp_path / "model")
    opened, _ = vlm.load(tmp_path / "model")
    with torch.no_grad():
        for parameter in opened.parameters():
            parameter.add_(1)
    assert same(vlm.load(tmp_path / "model", verify="full")[0], model)
    wanted = {name: tensor.clone() for name, tensor in opened.state_dict().items()}
    vlm.save(opened, processor, tmp_path / "model")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in opened.state_dict().items())
    assert same(vlm.load(tmp_path / "model")[0], opened)


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    vlm.save(model, processor, tmp_path / "model")
    vlm.save(model, processor, tmp_path / "model", max_shard_size="80KB")
    assert same(vlm.load(tmp_path / "model", verify="full")[0], model)
    vlm.save(model, processor, tmp_path / "model")
    assert same(vlm.load(tmp_path / "model", verify="full")[0], model)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1


# --- placement --------------------------------------------------------------------------------------------------------


def test_parts_on_disk_give_the_same_text(written: Path, tmp_path: Path) -> None:
    model, processor = vlm.load(written)
    devices = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "lm_head": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
    }
    away, _ = vlm.load(written, device_map=devices, offload_folder=tmp_path / "off")
    assert away.model.vision_tower.post_layernorm.weight.is_meta
    options: dict[str, Any] = {"max_new_tokens": 8}
    wanted = vlm.generate(model, processor, IMAGES, ["caption en", "no"], **options)
    assert vlm.generate(away, processor, IMAGES, ["caption en", "no"], **options) == wanted
    assert len(set(wanted)) == 2


def test_auto_placement_within_a_memory_limit(written: Path, tmp_path: Path) -> None:
    model, processor = vlm.load(written)
    limits = {"cpu": "300KB"}
    away, _ = vlm.load(written, device_map="auto", max_memory=limits, offload_folder=tmp_path / "off")
    assert any(p.is_meta for p in away.parameters()) and not all(p.is_meta for p in away.parameters())
    batch = processor(IMAGES, ["caption en", "no"])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, away(**batch).logits)
    assert same(vlm.load(written, device_map="auto")[0], model)


def test_placements_that_cannot_be_are_refused(written: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        vlm.load(written, device_map={"": "disk"})
    with pytest.raises(ConfigError, match="no device for model.language_model"):
        vlm.load(written, device_map={"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"})
    with pytest.raises(ConfigError, match="expected 'auto'"):
        vlm.load(written, device_map="balanced")
    with pytest.raises(ConfigError, match="both given"):
        vlm.load(written, device_map="auto", device="cpu")


def test_the_embedding_scale_is_probed(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers before 5.4, which scaled in the decoder instead."""
    from transformers.models.gemma import modeling_gemma

    monkeypatch.setattr(modeling_gemma.GemmaTextScaledWordEmbedding, "forward", torch.nn.Embedding.forward)
    with pytest.raises(ConfigError, match=r"scales token embeddings by 1 instead of sqrt\(hidden_size\)"):
        vlm.load(written)
