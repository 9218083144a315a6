"""What is called what it is: quantised weights, adapters, manifests that say nothing, maps that split one tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud, picture
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlm
from vlm.checkpoints import manifest
from vlm.checkpoints.weights import directory_source
from vlm.cli import main
from vlm.errors import CheckpointError, ConfigError
from vlm.settings import parse_size
from vlm.train import checkpoint

LAYER = "model.language_model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm.save(*loud("siglip", "gemma"), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """Without its manifest: it is changed on purpose."""
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    (folder / manifest.NAME).unlink()
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], config: dict[str, Any] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))


def to(dtype: torch.dtype, **more: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    """The layer in another dtype, with tensors of these endings beside it."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(dtype)
        tensors.update({f"{LAYER}.{name}": tensor for name, tensor in more.items()})

    return change


def gptq(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.weight"]
    tensors[f"{LAYER}.qweight"] = torch.zeros(4, 64, dtype=torch.int32)
    tensors[f"{LAYER}.qzeros"] = torch.zeros(1, 8, dtype=torch.int32)
    tensors[f"{LAYER}.scales"] = torch.zeros(1, 64, dtype=torch.float16)


SCALES = torch.ones(64)
QUANTISED: list[tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any] | None, str]] = [
    (to(torch.int8, SCB=SCALES), {"quant_method": "bitsandbytes", "load_in_8bit": True}, r"\(bitsandbytes, 8 bits\)"),
    (to(torch.int8), None, "1 tensors such as .*up_proj.weight I8"),
    (to(torch.uint8), {"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes, 4 bits\)"),
    (to(torch.float8_e4m3fn), {"quant_method": "fp8"}, r"\(fp8\).*F8_E4M3"),
    (to(torch.float8_e5m2), None, "up_proj.weight F8_E5M2"),
    (to(torch.bfloat16, weight_scale_inv=SCALES), None, "up_proj.weight_scale_inv F32"),
    (gptq, {"quant_method": "gptq", "bits": 4}, r"\(gptq, 4 bits\): 2 tensors such as .*qweight I32"),
    (gptq, None, "qweight I32"),
    (lambda tensors: None, {"quant_type": "int8_weight_only", "quant_method": "torchao"}, r"\(torchao\)"),
    (lambda tensors: None, {"quant_method": "awq", "bits": 4}, r"\(awq, 4 bits\); only float32"),
]


@pytest.mark.parametrize(("change", "config", "told"), QUANTISED)
def test_quantised_weights_are_called_quantised(
    change: Callable[[dict[str, Tensor]], Any], config: dict[str, Any] | None, told: str, copied: Path
) -> None:
    """As a whole model, and where a part is read from it."""
    rewrite(copied, change, config)
    for read in (vlm.load, directory_source):
        with pytest.raises(CheckpointError, match=rf"the weights are quantised.*{told}.*model.dequantize\(\)"):
            read(copied)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_a_directory_of_adapters_is_called_one(
    weights: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "runs/a/model", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    if weights is not None:
        save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, tmp_path / weights)
    told = r"is an adapter \(LoRA, adapter_config.json\), not a model: it belongs on runs/a/model. Merge it once"
    for read in (vlm.load, directory_source):
        with pytest.raises(CheckpointError, match=told):
            read(tmp_path)
    picture(1).save(tmp_path / "a.png")
    assert main(["caption", str(tmp_path / "a.png"), "--model", str(tmp_path)]) == 2
    assert "Merge it once" in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_beside_a_model_is_told(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copied / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    vlm.load(copied)
    assert "adapter_config.json beside the model is not used" in caplog.text


def test_adapters_inside_the_weights_are_called_that(copied: Path) -> None:
    def adapt(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.base_layer.weight"] = tensors.pop(f"{LAYER}.weight")
        tensors[f"{LAYER}.lora_A.default.weight"] = torch.zeros(2, 32)

    rewrite(copied, adapt)
    with pytest.raises(CheckpointError, match=r"adapters \(LoRA\) that are not merged: 2 tensors .*merge_and_unload"):
        vlm.load(copied)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["5", 5, "500", "1.5", 999_999])
def test_a_bare_small_number_is_no_size(size: str | int) -> None:
    with pytest.raises(
        ConfigError, match=rf"'{size}' has no unit and would be {size} bytes; write {size}GB or {size}MB"
    ):
        parse_size(size)


@pytest.mark.parametrize("size", ["5XB", "-5GB", "", "GB", "5e9", "٥GB", "9" * 30 + "GB", 0])
def test_what_is_no_size_is_refused(size: str | int) -> None:
    with pytest.raises(ConfigError, match="(is not a size|the size .* has no unit)"):
        parse_size(size)


def test_sizes_with_and_without_a_unit() -> None:
    assert [parse_size(size) for size in ("5GB", "5 gb", "1.5MB", "2MiB", "60KB", "5B", 1_000_000, "2000000")] == [
        *(5_000_000_000, 5_000_000_000, 1_500_000, 2_097_152, 60_000, 5, 1_000_000, 2_000_000)
    ]


def test_the_command_line_says_how_a_size_is_written(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(saved), "--out", str(tmp_path / "o"), "--max-shard-size", "5", "--parity", "none"]
    assert main(command) == 2
    assert "write 5GB or 5MB" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# --- manifests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [{}, {"mine.txt": None}, [], None, "all", {"config.json": None}])
def test_a_manifest_that_does_not_list_the_model_proves_nothing(listed: Any, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "m"))
    known = json.loads((folder / manifest.NAME).read_text())["files"]
    (folder / "mine.txt").write_text("mine")
    if isinstance(listed, dict):
        listed = {name: known.get(name, {"size": 4, "sha256": "0"}) for name in listed}
    (folder / manifest.NAME).write_text(json.dumps({"format": 1, "files": listed}))
    for verify in ("quick", "full"):
        with pytest.raises(CheckpointError, match="does not list .*model.safetensors|no list of files"):
            vlm.load(folder, verify=verify)
    vlm.load(folder, verify="none")


@pytest.mark.parametrize("text", ['{"files": {}}', '{"files": []}', "{}", "", '{"files": {"state.json": {}}}'])
def test_a_checkpoint_whose_manifest_lists_nothing_is_passed_over(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With and without files beside it; the one before is taken."""
    tensors = {"w": torch.ones(2)}
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors, tensors, {}, keep=3)
    (tmp_path / "step-00000002" / manifest.NAME).write_text(text)
    for file in (tmp_path / "step-00000003").iterdir():
        file.unlink()
    (tmp_path / "step-00000003" / manifest.NAME).write_text(text)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    assert caplog.text.count("passed over") == 2


# --- maps of devices --------------------------------------------------------------------------------------------------


def test_a_map_that_splits_the_embedding_is_refused(saved: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"offload_folder": tmp_path / "off"}
    for head, rest in (("disk", "cpu"), ("cpu", "disk")):
        with pytest.raises(
            ConfigError, match=f"puts lm_head on '{head}' and model.language_model.embed_tokens on '{rest}'"
        ):
            vlm.load(saved, device_map={"": rest, "lm_head": head}, **options)
    layers = {"model.language_model.embed_tokens": "cpu", "model.language_model": "disk"}
    with pytest.raises(ConfigError, match="one tensor"):
        vlm.load(saved, device_map={"": "disk", **layers}, **options)


@pytest.mark.parametrize(
    "places",
    [
        {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "model.language_model": "disk"},
        {"": "disk"},
        {"model": "cpu"},
        {"model.language_model.layers": "disk", "": "cpu", "lm_head": torch.device("cpu")},
        "auto",
    ],
)
def test_other_maps_run_and_give_the_same(places: Any, saved: Path, tmp_path: Path) -> None:
    """A head that is not named goes where the embedding is."""
    model, processor = loud("siglip", "gemma")
    batch = processor([picture(1)], ["caption en"])
    with torch.no_grad():
        wanted = model(**batch).logits
    memory = {"cpu": "150KB"} if places == "auto" else None
    placed, _ = vlm.load(saved, device_map=places, offload_folder=tmp_path / "off", max_memory=memory)
    with torch.no_grad():
        assert torch.equal(placed(**batch).logits, wanted)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10**400, 10**30, 2**63, -(10**30)])
@pytest.mark.parametrize("key", ["image_size", "patch_size", "mean", "background"])
def test_a_huge_number_in_the_image_settings_is_refused_in_a_line(key: str, value: int, copied: Path) -> None:
    settings = json.loads((copied / "processor_config.json").read_text())
    image = settings["image_transform"]
    image[key] = [value] * 3 if isinstance(image[key], list) else value
    (copied / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=key) as caught:
        vlm.load(copied)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_document_that_memory_cannot_hold_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(json, "loads", too_much)
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        vlm.load(copied)
