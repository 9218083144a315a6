"""What `vlm.export` writes: names, files, shards, refusals, towers, the model card, and nothing when it fails."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from coretools import loud, picture, pixels
from safetensors import safe_open
from traintools import left_by_a_killed_process
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vlm
from vlm.build.presets import tiny, tiny_decoder
from vlm.checkpoints.loader import empty
from vlm.checkpoints.shards import write_shards
from vlm.cli import main
from vlm.errors import CheckpointError, ConfigError, GenerationError
from vlm.exchange import card
from vlm.exchange.exporting import export
from vlm.exchange.formats import FORMATS
from vlm.exchange.paligemma import config_values
from vlm.settings import parse_size

LINEAR = ("weight", "bias")
TOWER_LAYER = [
    f"{module}.{kind}"
    for module in (
        *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    )
    for kind in LINEAR
]
DECODER_LAYER = [
    *("input_layernorm", "post_attention_layernorm"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
]
HUB_NAMES = {
    *(f"vision_tower.vision_model.embeddings.patch_embedding.{kind}" for kind in LINEAR),
    "vision_tower.vision_model.embeddings.position_embedding.weight",
    *(f"vision_tower.vision_model.encoder.layers.{i}.{name}" for i in range(2) for name in TOWER_LAYER),
    *(f"vision_tower.vision_model.post_layernorm.{kind}" for kind in LINEAR),
    *(f"multi_modal_projector.linear.{kind}" for kind in LINEAR),
    "language_model.model.embed_tokens.weight",
    *(f"language_model.model.layers.{i}.{name}.weight" for i in range(2) for name in DECODER_LAYER),
    "language_model.model.norm.weight",
}
"""Names of a PaliGemma checkpoint on the Hub (google/paligemma-3b-pt-224), cut to two layers each."""
SHARED: dict[str, Any] = {"vocab_size": 257_152, "num_attention_heads": 8, "head_dim": 256}
GEMMA_2B = GemmaConfig(
    **SHARED, hidden_size=2048, intermediate_size=16_384, num_hidden_layers=18, num_key_value_heads=1
)
GEMMA2_2B = Gemma2Config(
    **SHARED, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_key_value_heads=4
)
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "parity.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, by the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
    return tensors


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / name).read_text())
    return values


def test_the_files_and_the_names_are_those_of_the_hub(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    export(model, processor, tmp_path / "out", parity="none")
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    tensors = stored(tmp_path / "out")
    assert set(tensors) == HUB_NAMES
    assert torch.equal(
        tensors["vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"],
        model.model.vision_tower.encoder.layers[1].mlp.fc1.weight,
    )
    assert torch.equal(tensors["language_model.model.embed_tokens.weight"], model.lm_head.weight)


def test_every_number_is_written_so_that_no_reader_needs_a_default(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma2")
    export(model, processor, tmp_path / "out", parity="none")
    config = read(tmp_path / "out")
    image, width = model.config.image_token_id, model.config.text_config.hidden_size
    assert config["model_type"] == "paligemma" and config["architectures"] == ["PaliGemmaForConditionalGeneration"]
    assert config["image_token_index"] == image == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert config["projection_dim"] == config["hidden_size"] == config["vision_config"]["projection_dim"] == width
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == model.lm_head.weight.shape[0]
    assert config["vision_config"]["intermediate_size"] == 64 and config["vision_config"]["hidden_act"]
    assert config["text_config"]["layer_types"] == ["sliding_attention", "full_attention"]
    assert config["text_config"]["final_logit_softcapping"] == 30.0
    assert config["text_config"]["num_image_tokens"] == 4 and config["dtype"] == "float32"
    # What vLLM insists on: a bool, and a vocabulary piece for the newline it appends.
    assert read(tmp_path / "out", "tokenizer_config.json")["add_bos_token"] is False
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened.add_bos_token is False and "\n" in opened.get_vocab()
    # vLLM takes a length from here as a limit on every request.
    assert not [key for key in read(tmp_path / "out", "generation_config.json") if "length" in key or "tokens" == key]
    for name in ("image_seq_length", "size", "resample", "image_mean"):
        value = read(tmp_path / "out", "preprocessor_config.json")[name]
        assert value == read(tmp_path / "out", "processor_config.json")["image_processor"][name]


@pytest.mark.parametrize(("text", "parameters"), [(GEMMA_2B, 2_923_335_408), (GEMMA2_2B, 3_032_094_960)])
def test_transformers_builds_the_published_sizes_from_what_is_written(text: Any, parameters: int) -> None:
    """PaliGemma 3B and PaliGemma 2 3B at 224 px: the parameters of the published checkpoints (without the 64 rows that
    the Hub's files append)."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        vision_use_head=False,
    )
    config = vlm.VLMConfig(
        encoder="siglip",
        vision_config=vision,
        projector_config={"kind": "linear"},
        text_config=text,
        image_token_id=257_000,
    )
    written = config_values(empty(vlm.VLM, config), torch.bfloat16)
    with torch.device("meta"):
        built = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(written))
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters


def test_no_soft_cap_in_generation_is_written_as_null(tmp_path: Path) -> None:
    model, processor = copy.deepcopy(loud("siglip", "gemma2"))
    model.config.softcap_in_generation = False
    export(model, processor, tmp_path / "out")
    assert read(tmp_path / "out")["text_config"]["final_logit_softcapping"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_hold_every_tensor_once_within_the_limit(tmp_path: Path, dtype: str) -> None:
    model, processor = loud("siglip", "gemma")
    export(model, processor, tmp_path / "one", parity="none", dtype=dtype)
    export(model, processor, tmp_path / "many", parity="none", dtype=dtype, max_shard_size="30KB")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = read(tmp_path / "many", "model.safetensors.index.json")
    whole, parts = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"]) == set(parts) == set(whole)
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(torch.equal(whole[name], parts[name]) and str(whole[name].dtype) == f"torch.{dtype}" for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]
        assert sum(sizes) <= 30_000 or len(sizes) == 1
        assert file.stat().st_mode & 0o044 == 0o044  # a server often runs as another user


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("300kb", 300_000), (7_700_000, 7_700_000)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write it as 5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"encoder": "siglip2_naflex"}, "any aspect ratio"),
        ({"projector": "mlp"}, "its projector is 'mlp', PaliGemma's is one linear layer"),
        ({"decoder": "gemma3_text"}, "its decoder is 'gemma3_text', PaliGemma has Gemma 1 and Gemma 2"),
        ({"image": {"mode": "letterbox"}}, "its images are prepared by 'letterbox'"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, parts: dict[str, Any], reason: str) -> None:
    model, processor = tiny(**parts)
    with pytest.raises(ConfigError, match=reason) as refusal:
        export(model, processor, tmp_path / "out")
    assert "--to tower" in str(refusal.value) and "import vlm.model" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_transformers_would_extend_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    bare = vlm.text.tokenizer.build(["caption en"] * 20, vocab_size=300, loc_seg=False)
    config = copy.deepcopy(model.config)
    config.text_config.vocab_size = len(bare)
    config.image_token_id = bare.get_vocab()["<image>"]
    small = vlm.VLM(config)
    with pytest.raises(ConfigError, match="lacks 1152 of PaliGemma's <loc> and <seg> tokens"):
        export(small, vlm.Processor(bare, processor.image_transform), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"to": "palligemma"}, ConfigError, "unknown format 'palligemma' .did you mean 'paligemma'"),
        ({"parity": "sample"}, ConfigError, "unknown parity 'sample'"),
        ({"dtype": "float8"}, ConfigError, "unknown dtype 'float8'"),
        ({"dtype": "float16"}, GenerationError, "float16 overflows"),
        ({"max_shard_size": "big"}, ConfigError, "is not a size"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export(*loud("siglip", "gemma"), tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_in_memory_is_refused(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    absent: Any = copy.deepcopy(model)
    with pytest.raises(ConfigError, match="weights of the model are not in memory"):
        export(absent.to("meta"), processor, tmp_path / "out")


def test_an_untied_output_embedding_is_refused(tmp_path: Path) -> None:
    model, processor = copy.deepcopy(loud("siglip", "gemma"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ConfigError, match="its output embedding is not its input embedding"):
        export(model, processor, tmp_path / "out", parity="none")


def test_a_processor_of_another_model_is_refused(tmp_path: Path) -> None:
    other = tiny(image={"mean": (0.4, 0.4, 0.4)})[1].tokenizer
    other.add_tokens([f"word{i}" for i in range(100)])
    processor = vlm.Processor(other, loud("siglip", "gemma")[1].image_transform)
    with pytest.raises(CheckpointError, match="the tokenizer has id"):
        export(loud("siglip", "gemma")[0], processor, tmp_path / "out", parity="none")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_numbers_that_are_none_are_refused(tmp_path: Path, value: float) -> None:
    weights = {"a": torch.zeros(3), "layer.7.weight": torch.tensor([0.0, value, 1.0], dtype=torch.float64)}
    with pytest.raises(CheckpointError, match="layer.7.weight holds NaN or infinity in bfloat16"):
        write_shards(tmp_path, weights, torch.bfloat16)


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    (tmp_path / "file").write_text("a file")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=name):
            export(*loud("siglip", "gemma"), tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


def test_an_empty_directory_and_what_a_kill_left_give_way(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    left_by_a_killed_process(tmp_path / "out")
    export(*loud("siglip", "gemma"), tmp_path / "out", parity="weights")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, MemoryError, OSError(28, "No space left on device")])
def test_an_export_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Any) -> None:
    def stop(folder: Path, *_: Any) -> None:
        assert (folder / "model.safetensors").exists() and not (tmp_path / "out").exists()
        raise end

    monkeypatch.setattr(card, "write", stop)
    with pytest.raises(CheckpointError if isinstance(end, OSError) else end):
        export(*loud("siglip", "gemma"), tmp_path / "out", parity="none")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="GB of weights, but 0.00 GB of the disk are free"):
        export(*loud("siglip", "gemma"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- back again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["gemma", "gemma2"])
def test_an_export_is_imported_bit_for_bit(tmp_path: Path, decoder: str) -> None:
    model, processor = loud("siglip", decoder)
    export(model, processor, tmp_path / "out", parity="none", max_shard_size="50KB")
    again, theirs = vlm.load(tmp_path / "out")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert theirs.image_transform == processor.image_transform
    image, prompt = [picture(3, (40, 31))], ["caption en\ttwo  spaces <loc0001>"]
    ours, back = processor(image, prompt, ["yes"]), theirs(image, prompt, ["yes"])
    assert all(torch.equal(ours[name], back[name]) for name in ours.keys())


# --- towers -----------------------------------------------------------------------------------------------------------


def test_a_siglip_tower_for_transformers(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    export(model, processor, tmp_path / "out", to="tower", max_shard_size="40KB")
    reader: Any = SiglipVisionModel
    tower, info = reader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    values = torch.stack([pixels(1), pixels(2)])
    with torch.no_grad():
        assert torch.equal(tower(values).last_hidden_state, model.encode(values).features)


def test_a_naflex_tower_for_transformers(tmp_path: Path) -> None:
    model, processor = loud("siglip2_naflex", "gemma3_text")  # the decoder does not matter
    report = export(model, processor, tmp_path / "out", to="tower")
    reader: Any = Siglip2VisionModel
    tower, info = reader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = processor.image_transform([picture(1, (60, 30)), picture(2, (28, 28))])
    mask, grids = inputs.pixel_attention_mask, inputs.spatial_shapes
    assert mask is not None and grids is not None and not mask.bool().all()
    with torch.no_grad():
        ours = model.encode(inputs.pixel_values, mask, grids).features
        theirs = tower(inputs.pixel_values, pixel_attention_mask=mask, spatial_shapes=grids).last_hidden_state
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-5
    # transformers rounds resized images to 8 bit, along each axis: at most one step, and not zero
    (row,) = [row for row in report.rows if row.name == "pixels"]
    assert row.ok is None and 0 < row.max_abs <= 2.001 / 255
    assert any("float" in note and "8 bit" in note for note in report.notes)


@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
def test_a_tower_of_another_dtype_is_compared_as_it_was_written(tmp_path: Path, encoder: str) -> None:
    model, processor = loud(encoder, "gemma")
    half = copy.deepcopy(model).bfloat16()
    for name, one, dtype in (("narrow", model, "bfloat16"), ("kept", half, None), ("wide", half, "float32")):
        report = export(one, processor, tmp_path / name, to="tower", dtype=dtype)
        (row,) = [row for row in report.rows if row.name == "tower features"]
        assert report.ok and row.ok and row.max_abs < 1e-5
        assert report.dtype == ("float32" if name == "wide" else "bfloat16")


def test_a_tower_of_letterboxed_images_says_so(tmp_path: Path) -> None:
    report = export(*tiny(image={"mode": "letterbox"}), tmp_path / "out", to="tower")
    (row,) = [row for row in report.rows if row.name == "pixels"]
    assert report.ok and row.ok is None and row.max_abs > 0.1
    assert any("prepared by 'letterbox' here" in note for note in report.notes)


@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
def test_a_tower_starts_a_new_model(tmp_path: Path, encoder: str) -> None:
    model, processor = loud(encoder, "gemma")
    export(model, processor, tmp_path / "out", to="tower", parity="weights")
    fresh, other = vlm.new(str(tmp_path / "out"), "mlp", tiny_decoder("gemma"), processor.tokenizer)
    wanted = model.model.vision_tower.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in fresh.model.vision_tower.state_dict().items())
    assert other.image_transform == processor.image_transform and fresh.config.encoder == encoder


def test_a_tower_of_another_family_is_refused(tmp_path: Path) -> None:
    model, processor = copy.deepcopy(loud("siglip", "gemma"))
    model.config.encoder = "dinov9"
    for to in ("tower", "paligemma"):
        with pytest.raises(ConfigError, match="unknown encoder 'dinov9'"):
            export(model, processor, tmp_path / "out", to=to)
    with pytest.raises(ConfigError, match="tower is 'clip', PaliGemma's is SigLIP"):
        export(*copy.deepcopy(loud("clip", "gemma")), tmp_path / "out", to="paligemma")


# --- the model card ---------------------------------------------------------------------------------------------------


def front_matter(folder: Path) -> dict[str, Any]:
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(front)
    return values


def test_the_card_says_where_the_model_comes_from(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    start = tmp_path / "secret-client" / "model"
    start.mkdir(parents=True)
    stage = {"name": "tune", "steps": 120, "batch_size": 32, "train": {"projector": 1e-3, "decoder": 1e-5}}
    made_from = {"encoder": "google/siglip2-base-patch16-224", "decoder": str(tmp_path / "secret-client")}
    config = {"model": made_from, "stages": [stage], "out": str(tmp_path / "secret-client")}
    (start / "training.json").write_text(json.dumps({"config": config, "examples": 5000}))
    export(model, processor, tmp_path / "out", parity="weights", source=start)
    front, text = front_matter(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-text-to-text"
    assert front["base_model"] == "google/siglip2-base-patch16-224"
    assert "`tune`: 120 steps of 32 examples; trained: projector at 0.001, decoder at 1e-05" in text
    assert "on 5,000 examples" in text and "secret-client" not in text


def test_parts_given_as_configurations_or_as_several_towers_are_no_obstacle(tmp_path: Path) -> None:
    """A run may name its encoder by keys and values, and a fused one as a list."""
    model, processor = loud("siglip", "gemma")
    made_from = {
        "encoder": ["google/siglip2-base-patch16-224", {"model_type": "dinov2"}],
        "decoder": {"model_type": "x"},
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "training.json").write_text(json.dumps({"config": {"model": made_from}}))
    export(model, processor, tmp_path / "a", parity="none", source=tmp_path / "m")
    assert front_matter(tmp_path / "a")["base_model"] == "google/siglip2-base-patch16-224"


def test_a_hub_id_is_the_base_model_and_a_broken_record_is_no_obstacle(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    export(model, processor, tmp_path / "a", parity="none", source="google/paligemma2-3b-pt-224")
    assert front_matter(tmp_path / "a")["base_model"] == "google/paligemma2-3b-pt-224"
    (tmp_path / "training.json").write_text("{")
    export(model, processor, tmp_path / "b", to="tower", parity="none", source=tmp_path)
    assert front_matter(tmp_path / "b")["pipeline_tag"] == "image-feature-extraction"
    assert "base_model" not in front_matter(tmp_path / "b")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vlm.save(*loud("siglip", "gemma"), tmp_path / "model")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "--out", str(out), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr()
    assert "PaliGemmaForConditionalGeneration" in printed.out and "greedy tokens" in printed.out
    assert "FAIL" not in printed.out and f"written to {out}" in printed.err
    assert read(out)["dtype"] == "bfloat16" and read(out, "parity.json")["ok"] is True
    assert main(["export", str(tmp_path / "model"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: the directory is not empty")


def test_the_command_fails_when_the_export_is_not_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.save(*loud("siglip", "gemma"), tmp_path / "model")
    real = FORMATS["tower"]

    def off(*args: Any) -> Any:
        return {name: [value + 0.01 for value in values] for name, values in real.run_written(*args).items()}

    monkeypatch.setitem(FORMATS, "tower", replace(real, run_written=off))
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "--to", "tower", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "the written checkpoint is not the model" in error and "tower features" in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
