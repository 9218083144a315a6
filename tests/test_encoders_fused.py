"""Several towers on one grid: from checkpoints and configurations, on the command line and in a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture, shake
from PIL import Image
from torch.nn import functional as F

import vlm
from vlm.build.presets import tiny, tiny_decoder
from vlm.build.towers import choose, several
from vlm.cli import main
from vlm.errors import CheckpointError, ConfigError, VLMError
from vlm.images.fused import FusedTransform, one_view, same_view, unpack
from vlm.images.transforms import ImageTransform
from vlm.measure.info import describe, table
from vlm.model.parts import encoder_spec

SIZES = [(70, 30), (25, 80), (40, 40)]
# 28 px with patches of 14, 32 px with patches of 16: both 2 x 2.
SHAPES: dict[str, dict[str, Any]] = {
    "siglip": {"image_size": 28, "patch_size": 14},
    "dinov2": {"image_size": 32, "patch_size": 16, "hidden_size": 24},
    "clip": {"image_size": 28, "patch_size": 7},
}


def config(kind: str) -> Any:
    return encoder_spec(kind).read_config({**encoder_spec(kind).tiny().to_dict(), **SHAPES[kind]})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tower checkpoints, and a decoder with its tokenizer."""
    from transformers import CLIPVisionModel, Dinov2WithRegistersModel, SiglipVisionModel

    root = tmp_path_factory.mktemp("fused")
    classes: dict[str, Any] = {
        "siglip": SiglipVisionModel,
        "dinov2": Dinov2WithRegistersModel,
        "clip": CLIPVisionModel,
    }
    for kind, theirs in classes.items():
        torch.manual_seed(0)
        model = theirs(config(kind))
        shake(model)
        model.save_pretrained(root / kind)
    small, processor = tiny("siglip")
    small.model.language_model.save_pretrained(root / "gemma")
    processor.tokenizer.save_pretrained(root / "gemma")
    return root


def new(encoder: Any, **options: Any) -> tuple[vlm.VLM, vlm.Processor]:
    return vlm.new(encoder, "linear", tiny_decoder("gemma"), tiny("siglip")[1].tokenizer, **options)


def both(folders: Path) -> str:
    return f"{folders / 'siglip'}+{folders / 'dinov2'}"


def alone(folder: Path, images: list, **options: Any) -> torch.Tensor:
    """A member's features by itself, of its own image transform."""
    model, processor = new(folder, **options)
    return model.model.vision_tower(processor.image_transform(images).pixel_values).features


@torch.no_grad()
def test_features_are_the_members_side_by_side(folders: Path, tmp_path: Path) -> None:
    """Each from its own pixels, through its own weights; saved and opened bit for bit."""
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    model, processor = new(both(folders))
    pixels = processor.image_transform(images).pixel_values
    got = model.model.vision_tower(pixels)
    squash = {"image": {"mode": "squash"}}
    want = [alone(folders / "siglip", images), alone(folders / "dinov2", images, **squash)]
    assert pixels.shape == (3, 3 * 28**2 + 3 * 32**2) and got.grid.tolist() == [[2, 2]] * 3
    assert got.features.shape == (3, 4, 32 + 24) and (got.features - torch.cat(want, -1)).abs().max() < 1e-6
    assert min(float(part.std()) for part in want) > 0.1
    vlm.save(model, processor, tmp_path / "saved")
    again, reader = vlm.load(tmp_path / "saved")
    assert torch.equal(again.model.vision_tower(pixels).features, got.features)
    assert reader.image_transform == processor.image_transform
    assert again.config.vision_config.to_dict() == model.config.vision_config.to_dict()
    # A list of the same is the same; the order is the order of the channels.
    turned, _ = new([str(folders / "dinov2"), folders / "siglip"], image={"mode": "squash"})
    values = torch.cat([part.flatten(1) for part in reversed(unpack(pixels, [28, 32]))], 1)
    assert torch.equal(turned.model.vision_tower(values).features, torch.cat([want[1], want[0]], -1))


def test_weights_are_loaded_strictly(folders: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folders / "dinov2", tmp_path / "dinov2")
    weights = load_file(folders / "dinov2" / "model.safetensors")
    weights.pop("layernorm.bias")
    save_file(weights, tmp_path / "dinov2" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dinov2: .* 1 missing: layernorm.bias"):
        new([folders / "siglip", tmp_path / "dinov2"])
    with pytest.raises(CheckpointError, match="no-such: no such directory"):
        new(f"{folders / 'siglip'}+{folders / 'no-such'}")


@torch.no_grad()
def test_new_weights_and_checkpoints_may_be_mixed(folders: Path) -> None:
    """Each new member has a stream of its own; keys and values are a configuration too."""
    values = {"model_type": "clip_vision_model", **config("clip").to_dict(), "image_size": 28, "patch_size": 14}
    one, _ = new([folders / "siglip", values])
    two, _ = new([folders / "dinov2", values])
    assert [kind for kind, _ in one.config.vision_config.towers] == ["siglip", "clip"]
    first, second = (dict(model.model.vision_tower.members[1].state_dict()) for model in (one, two))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    twins, _ = new([values, values])
    left, right = (member.state_dict() for member in twins.model.vision_tower.members)
    assert any(not torch.equal(value, right[name]) for name, value in left.items())


def test_grids_that_differ_are_refused(folders: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"different grids: 1. siglip \(28 px, patches of 14\) gives 2x2, 2. clip.*siglip@28 \+ clip@14",
    ):
        new([folders / "siglip", folders / "clip"])
    for fuse in ({"grid": [4, 4]}, {"resample": "bilinear"}, {"grid": [4, 4], "resample": "nearest"}, {"gird": [2, 2]}):
        with pytest.raises(ConfigError, match="grid|resample"):
            new([folders / "siglip", folders / "clip"], fuse=fuse)
    for grid in ([4], [0, 4], [4.0, 4.0], "4x4", [4000, 4]):
        with pytest.raises(ConfigError, match="expected \\[rows, columns\\]"):
            new([folders / "siglip", folders / "clip"], fuse={"grid": grid, "resample": "bilinear"})
    with pytest.raises(ConfigError, match="is for several towers, and there is one"):
        new(folders / "siglip", fuse={"grid": [2, 2], "resample": "bilinear"})


@torch.no_grad()
def test_resampled_features_are_announced(folders: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """4x4 of CLIP down to 2x2 is the mean of blocks where bilinear with antialias says so; logged, shown, recorded."""
    options = {"fuse": {"grid": [2, 2], "resample": "bilinear"}, "image": {"mode": "squash"}}
    with caplog.at_level(logging.WARNING, "vlm.build.towers"):
        model, processor = new([folders / "siglip", folders / "clip"], **options)
    assert "features of clip are resampled (bilinear) from its grid of 4x4 to 2x2" in caplog.text
    assert "siglip are resampled" not in caplog.text
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    got = model.model.vision_tower(processor.image_transform(images).pixel_values)
    fine = alone(folders / "clip", images, image={"mode": "squash"}).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    want = F.interpolate(fine, size=(2, 2), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    assert got.grid.tolist() == [[2, 2]] * 3 and (got.features[..., 32:] - want).abs().max() < 1e-5
    assert torch.equal(got.features[..., :32], alone(folders / "siglip", images))
    vlm.save(model, processor, tmp_path / "saved")
    vision = json.loads((tmp_path / "saved" / "config.json").read_text())["vision_config"]
    assert (vision["grid"], vision["resample"]) == ([2, 2], "bilinear")
    shown = table(describe(vlm.load(tmp_path / "saved")))
    assert describe((model, processor))["effective_resolution"] == [28, 28]
    assert "16 patches of 7 px, grid 4x4 resampled to 2x2" in shown and "fused (siglip + clip)" in shown
    # Any grid can be asked for, square or not.
    wide, reader = new([folders / "siglip", folders / "clip"], fuse={"grid": [2, 4], "resample": "bilinear"})
    assert wide.model.vision_tower(reader.image_transform(images).pixel_values).grid.tolist() == [[2, 4]] * 3
    assert reader.max_image_tokens == 8


def test_sizes_of_their_own(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`A@56+B@64` gives both 4 x 4; one image_size for all; cells that drift apart are said."""
    model, processor = new(f"{folders / 'siglip'}@56+{folders / 'dinov2'}@64")
    assert [member.image_size for member in processor.image_transform.members] == [56, 64]
    assert model.config.vision_config.grid == [4, 4] and processor.max_image_tokens == 16
    _, processor = new([folders / "siglip", config("siglip")], image_size=56)
    assert processor.image_transform.grid(0, 0) == (4, 4)
    with pytest.raises(ConfigError, match="each member of a fused tower has its own"):
        new(encoder_spec("fused").tiny(), image_size=56)
    for given in (f"{folders / 'siglip'}@56", f"{folders / 'siglip'}@56+{folders / 'dinov2'}@64"):
        with pytest.raises(ConfigError, match="image_size=28: .* says its image size after the @"):
            choose(given, image_size=28)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vlm.build.towers"):
        choose(f"{folders / 'siglip'}@41+{folders / 'dinov2'}@32")
    assert "siglip leave the image's last pixels out" in caplog.text
    assert "drift apart by up to 0.63 of a cell" in caplog.text  # 2 cells * (1 - 28/41)


def test_names_of_several_towers(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert several(str(tmp_path / "a+b")) == [str(tmp_path / "a+b")]
    assert several("a+b@3") == ["a", "b@3"] and several(["a+b"]) == ["a+b"] and several("a") == ["a"]
    wrongs: list[Any] = ["a+", "+b", []]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="joined by|empty list"):
            several(wrong)


def test_all_members_see_the_same_part(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SigLIP squashes and DINOv2 crops: squash for both, and it is said; another way is asked for all at once."""
    with caplog.at_level(logging.WARNING, "vlm.encoders.fused"):
        chosen = choose(both(folders))
    assert "dinov2 was trained with crop, here it gets squash" in caplog.text
    assert [member.mode for member in chosen.transform.members] == ["squash", "squash"]
    caplog.clear()
    for mode in ("crop", "letterbox"):
        chosen = choose(both(folders), image={"mode": mode, "background": [1, 2, 3]})
        members = chosen.transform.members
        assert {(member.mode, member.resize_shortest, member.background) for member in members} == {
            (mode, None, (1, 2, 3))
        }
    assert "trained with" not in caplog.text
    for setting in ({"mean": [0, 0, 0]}, {"image_size": 28}, {"resize_shortest": 40}, {"max_num_patches": 4}):
        with pytest.raises(ConfigError, match="belongs to each member"):
            choose(both(folders), image=setting)
    same = choose([config("dinov2"), config("dinov2")])
    assert {(member.mode, member.resize_shortest) for member in same.transform.members} == {("crop", 37)}


def test_one_part_of_an_image() -> None:
    """Crops of one proportion agree (224 of 256, 448 of 512), of different ones do not."""
    base = ImageTransform(mode="crop", patch_size=14, image_size=224, resize_shortest=256)
    double = ImageTransform(mode="crop", patch_size=14, image_size=448, resize_shortest=512)
    whole = ImageTransform(mode="crop", patch_size=14, image_size=224)
    assert same_view([base, double]) and not same_view([base, whole])
    assert [member.mode for member in one_view([base, whole], {})] == ["squash", "squash"]
    assert one_view([base, double], {}) == [base, double]
    with pytest.raises(ConfigError, match="different parts of an image: crop 256, crop"):
        FusedTransform.of([base, whole], (16, 16))
    with pytest.raises(ConfigError, match=r"reads float\[M, 8\], got \(1, 9\)|of 1 \+ 1 px"):
        unpack(torch.zeros(1, 9), [1, 1])


def test_members_that_cannot_be(folders: Path) -> None:
    naflex, fused = (encoder_spec(kind).tiny() for kind in ("siglip2_naflex", "fused"))
    with pytest.raises(ConfigError, match="siglip2_naflex gives each image a grid of its own"):
        new([naflex, naflex])
    with pytest.raises(ConfigError, match="cannot be a member of another"):
        new([fused, config("siglip")])
    with pytest.raises(ConfigError, match="two members or more"):
        encoder_spec("fused").config(members=[{"encoder": "siglip", "config": {}}])
    with pytest.raises(ConfigError, match="unknown encoder 'os'"):
        encoder_spec("fused").config(members=[{"encoder": "os", "config": {}}] * 2)
    with pytest.raises(ConfigError, match="there are several"):
        new(both(folders), encoder_kind="siglip2_naflex")


@torch.no_grad()
def test_layers_of_every_member(folders: Path) -> None:
    images = [picture(0, (40, 40))]
    options = {"layer": [-2, -1], "image": {"mode": "squash"}}
    model, processor = new(both(folders), **options)
    got = model.model.vision_tower(processor.image_transform(images).pixel_values).features
    want = [alone(folders / kind, images, **options) for kind in ("siglip", "dinov2")]
    assert got.shape[-1] == 2 * (32 + 24) and torch.allclose(got, torch.cat(want, -1), atol=1e-6)


def test_generation_with_several_images_and_beams() -> None:
    """A sample with two images beside one with one: each as if alone, and beams keep images together."""
    net, processor = tiny("fused")
    shake(net)
    model: Any = net
    pictures = [[picture(0), picture(1)], [picture(2)]]
    for beams in (1, 3):
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        together = model.generate(**processor(pictures, ["caption en"] * 2), **options)
        first = model.generate(**processor(pictures[:1], ["caption en"]), **options)
        second = model.generate(**processor(pictures[1:], ["caption en"]), **options)
        for row, own in ((0, first), (1, second)):
            length = min(together.shape[1], own.shape[1])
            assert together[row, -5:][:length].tolist() == own[0, -5:][:length].tolist()


def test_a_model_directory_that_contradicts_itself(folders: Path, tmp_path: Path) -> None:
    model, processor = new(both(folders))
    vlm.save(model, processor, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    file = tmp_path / "model" / "processor_config.json"
    stored = json.loads(file.read_text())

    def refused(change: Any, message: str) -> None:
        values = json.loads(json.dumps(stored))
        change(values["image_transform"])
        file.write_text(json.dumps(values))
        with pytest.raises(VLMError, match=message):
            vlm.load(tmp_path / "model")

    refused(lambda t: t["members"][1].update(image_size=48), "the tower has image_size 32")
    refused(lambda t: t.update(common_grid=[3, 3]), r"the tower has the grid \(2, 2\)")
    refused(lambda t: t["members"].pop(), "needs two members")
    refused(lambda t: t["members"][1].update(mode="letterbox"), "different parts of an image")
    refused(lambda t: t.update(mode="crop"), "unknown key 'mode'")
    file.write_text(json.dumps(stored))
    config_file = tmp_path / "model" / "config.json"
    values = json.loads(config_file.read_text())
    values["vision_config"]["members"][0]["config"]["hidden_size"] = 10**9
    config_file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"members\[0\].config.hidden_size is 1000000000"):
        vlm.load(tmp_path / "model")


def test_on_the_command_line(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """new, info, check, export, and a run whose YAML names the towers."""
    decoder = ["--decoder", str(folders / "gemma")]
    start = tmp_path / "start"
    words = ["--encoder", f"{folders / 'siglip'}+{folders / 'clip'}", *decoder]
    assert main(["new", *words, "--out", str(start)]) == 2
    assert "different grids" in capsys.readouterr().err
    words += ["--set", "fuse.grid=[4, 4]", "fuse.resample=bilinear"]
    assert main(["new", *words, "--out", str(start)]) == 0
    assert "grid 2x2 resampled to 4x4" in capsys.readouterr().out
    assert main(["info", str(start)]) == 0
    assert "fused (siglip + clip)" in capsys.readouterr().out
    assert main(["export", str(start), "--to", "paligemma", "--out", str(tmp_path / "paligemma")]) == 2
    assert "'fused'" in capsys.readouterr().err
    assert main(["export", str(start), "--to", "tower", "--out", str(tmp_path / "tower")]) == 0
    assert {"1-siglip", "2-clip"} <= {path.name for path in (tmp_path / "tower").iterdir()}
    capsys.readouterr()
    assert main(["check", str(start)]) == 0
    assert " 0 FAIL" in capsys.readouterr().out


def test_a_run_builds_and_trains_it(folders: Path, tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    lines = [{"image": f"{name}.png", "prefix": "caption en", "suffix": name} for name in "ab"]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    towers = [str(folders / "siglip"), {"model_type": "dinov2_with_registers", **SHAPES["dinov2"], **DINO}]
    values = {
        "out": str(tmp_path / "run"),
        "model": {"encoder": towers, "decoder": str(folders / "gemma"), "image": {"mode": "squash"}},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "stages": [{"name": "all", "module": "full", "train": {"encoder": 1e-3, "projector": 1e-3}, "steps": 2}],
        "accelerator": "cpu",
    }
    values["stages"][0] |= {"batch_size": 2}  # type: ignore[index]
    assert main(["train", "--config", str(write_yaml(tmp_path / "run.yaml", values))]) == 0
    model, _ = vlm.load(tmp_path / "run" / "model")
    start, _ = vlm.new(towers, "linear", folders / "gemma", image={"mode": "squash"})
    trained, fresh = (net.model.vision_tower.state_dict() for net in (model, start))
    for member in ("members.0.", "members.1."):
        assert any(not torch.equal(value, fresh[name]) for name, value in trained.items() if name.startswith(member))


DINO = {"num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "num_register_tokens": 2}


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(values))
    return path
