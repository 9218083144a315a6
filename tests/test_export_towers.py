"""Trained towers leave their model in their library's format, and come back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coretools import loud, picture, shake
from encodertools import ENCODERS, each_encoder, needs
from test_big_vision import golden, part
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

import vlm
from vlm import siglip
from vlm.build.presets import tiny, tiny_decoder
from vlm.checkpoints.geometry import with_geometry
from vlm.cli import main
from vlm.encoders import use
from vlm.errors import ConfigError

LAYERED = [kind for kind in ENCODERS if kind not in ("siglip2_naflex", "fused")]
CLASSES: dict[str, tuple[Any, int]] = {
    "siglip": (SiglipVisionModel, 0),
    "clip": (CLIPVisionModel, 1),
    "dinov2": (Dinov2WithRegistersModel, 3),
    "dinov3": (DINOv3ViTModel, 3),
}
"""transformers' class and its tokens before the patches."""
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
TEXT: dict[str, Any] = {**VISION, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 32}


def made(source: Any, **options: Any) -> tuple[vlm.VLM, vlm.Processor]:
    return vlm.new(source, "linear", tiny_decoder("gemma"), tiny("siglip")[1].tokenizer, **options)


def tower(model: vlm.VLM) -> dict[str, Tensor]:
    return dict(model.model.vision_tower.state_dict())


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def pixels(size: int = 28) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@each_encoder
def test_every_tower_leaves_and_comes_back(kind: str, tmp_path: Path) -> None:
    """Weights, features and every number of the image transform."""
    needs(kind)
    model, processor = loud(kind, "gemma")
    model, processor = with_geometry(model, processor, image={"resample": "bilinear", "background": (9, 9, 9)})
    report = vlm.export(model, processor, tmp_path / "out", to="tower", max_shard_size="40KB")
    assert report.ok and all(row.max_rel is not None for row in report.rows if "features" in row.name)
    folders = sorted(str(folder) for folder in (tmp_path / "out").glob("*-*") if folder.is_dir())
    assert len(folders) == (2 if kind == "fused" else 0)
    again, reader = made("+".join(folders) or tmp_path / "out")
    assert equal(tower(again), tower(model)) and reader.image_transform == processor.image_transform
    assert again.config.encoder == kind
    image = processor.image_transform([picture(1, (60, 50))])
    inputs = {name: value for name, value in image._asdict().items() if isinstance(value, Tensor)}
    with torch.no_grad():
        got, want = (one.model.vision_tower(**inputs).features for one in (again, model))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", list(CLASSES))
@torch.no_grad()
def test_transformers_opens_them(kind: str, tmp_path: Path) -> None:
    """Its own class, strictly, gives the features: CLIP's last hidden state comes without the norm."""
    model, processor = loud(kind, "gemma")
    vlm.export(model, processor, tmp_path / "out", to="tower", parity="none")
    reader, prefix = CLASSES[kind]
    opened, info = reader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    hidden = opened(pixels()).last_hidden_state[:, prefix:]
    want = model.model.vision_tower(pixels()).features
    assert (hidden - want).abs().max() < 1e-5 or kind == "clip"
    assert (opened.post_layernorm(hidden) - want).abs().max() < 1e-5 if kind == "clip" else True


def test_dinov2_without_registers(tmp_path: Path) -> None:
    config = Dinov2Config(**{**VISION, "mlp_ratio": 2})
    theirs = Dinov2Model(config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "source")
    model, processor = made(tmp_path / "source")
    vlm.export(model, processor, tmp_path / "out", to="tower")
    reader: Any = Dinov2Model
    opened, info = reader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and equal(opened.state_dict(), theirs.state_dict())  # the mask token was kept


@pytest.mark.parametrize("layer", [-2, [-2, -1]])
@pytest.mark.parametrize("kind", LAYERED)
@torch.no_grad()
def test_feature_layers_leave_as_they_are(kind: str, layer: Any, tmp_path: Path) -> None:
    """Cut at the highest block that is used; the choice is read back without being asked for."""
    needs(kind)
    model, processor = with_geometry(*loud(kind, "gemma"), layer=layer, projector="mlp")
    report = vlm.export(model, processor, tmp_path / "out", to="tower")
    assert report.ok and any("the features are the outputs of block" in note for note in report.notes)
    again, _ = made(tmp_path / "out")
    assert equal(tower(again), tower(model))
    for name in ("feature_layers", "feature_norm", "num_hidden_layers"):
        assert getattr(again.config.vision_config, name) == getattr(model.config.vision_config, name)
    size = model.config.vision_config.image_size
    assert torch.equal(again.model.vision_tower(pixels(size)).features, model.model.vision_tower(pixels(size)).features)
    if kind in CLASSES:
        reader, prefix = CLASSES[kind]
        opened = reader.from_pretrained(tmp_path / "out")
        states = opened(pixels(), output_hidden_states=True).hidden_states
        features = model.model.vision_tower(pixels()).features
        assert (states[1][:, prefix:] - features[..., :32]).abs().max() < 1e-5


# --- what the checkpoint had beside the tower -------------------------------------------------------------------------


def saved_siglip(folder: Path) -> Any:
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)).eval()
    shake(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_siglips_pooling_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept through building, saving, opening, another geometry and saving over a model that had none."""
    theirs = saved_siglip(tmp_path / "siglip")
    model, processor = made(tmp_path / "siglip")
    assert not any(name.startswith("head") for name in tower(model))
    model, processor = with_geometry(model, processor, image={"resample": "bilinear"}, projector="mlp")
    vlm.save(*tiny(), tmp_path / "model")
    vlm.save(model, processor, tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "tower", "--out", str(tmp_path / "out")]) == 0
    assert "not trained with it" in capsys.readouterr().out
    reader: Any = SiglipVisionModel
    opened, info = reader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(opened(pixels()).pooler_output, theirs.vision_model(pixels()).pooler_output)
    second, other = made(tmp_path / "out")
    third, last = made(tmp_path / "model")  # the tower of a model of ours
    for number, (one, its) in enumerate(((second, other), (third, last))):
        vlm.export(one, its, tmp_path / str(number), to="tower", parity="weights")
        again = reader.from_pretrained(tmp_path / str(number))
        assert equal(again.state_dict(), opened.state_dict())
    vlm.save(*tiny(), tmp_path / "model")  # over it: no head of another tower is left
    vlm.export(*vlm.load(tmp_path / "model"), tmp_path / "none", to="tower")
    assert json.loads((tmp_path / "none" / "config.json").read_text())["vision_use_head"] is False


@torch.no_grad()
def test_the_norm_above_a_feature_layer_is_kept_without_a_head(tmp_path: Path) -> None:
    theirs = saved_siglip(tmp_path / "siglip")
    model, processor = made(tmp_path / "siglip", layer=-2)
    vlm.export(model, processor, tmp_path / "out", to="tower")
    opened = SiglipVisionModel.from_pretrained(tmp_path / "out")
    assert torch.equal(opened.state_dict()["post_layernorm.weight"], theirs.vision_model.post_layernorm.weight)
    assert equal(tower(made(tmp_path / "out")[0]), tower(model))


@pytest.mark.parametrize("name", ["siglip", "naflex"])
@torch.no_grad()
def test_the_head_of_a_big_vision_file(name: str, tmp_path: Path) -> None:
    arrays = part(golden(name), "params/")
    np.savez(tmp_path / "towers.npz", **{"params/" + k: v for k, v in arrays.items()})  # type: ignore[arg-type]
    model, processor = made(tmp_path / "towers.npz")
    vlm.export(model, processor, tmp_path / "out", to="tower")
    want = siglip.load(tmp_path / "towers.npz")[0].model.vision_model.state_dict()
    from safetensors.torch import load_file

    got = {key.removeprefix("vision_model."): v for key, v in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert any(key.startswith("head.") for key in got) and equal(got, dict(want))


@torch.no_grad()
def test_clips_projection(tmp_path: Path) -> None:
    theirs = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "clip")
    model, processor = made(tmp_path / "clip")
    vlm.export(model, processor, tmp_path / "out", to="tower")
    opened: Any = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out")
    want = theirs.get_image_features(pixel_values=pixels())
    want = getattr(want, "pooler_output", want)
    assert (opened(pixels()).image_embeds - want).abs().max() < 1e-6
    assert equal(tower(made(tmp_path / "out")[0]), tower(model))


@torch.no_grad()
def test_timms_attention_pool(tmp_path: Path) -> None:
    needs("timm")
    import timm
    from timm.models._hub import save_for_hf

    args = {"patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "img_size": 28}
    theirs = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **args).eval()
    shake(theirs)
    save_for_hf(theirs, str(tmp_path / "timm"), model_args=args, safe_serialization=True)
    model, processor = made(tmp_path / "timm", image_size=28)
    vlm.save(model, processor, tmp_path / "model")
    vlm.export(*vlm.load(tmp_path / "model"), tmp_path / "out", to="tower")
    opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(opened(pixels()), theirs(pixels()))


@torch.no_grad()
def test_open_clips_projection(tmp_path: Path) -> None:
    """A whole open_clip model takes the tower back: its pooled output is the original's."""
    needs("open_clip")
    import open_clip.model
    from safetensors.torch import load_file, save_file

    settings = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "head_width": 8}
    visual = open_clip.model._build_vision_tower(16, settings, False).eval()
    shake(visual)
    (tmp_path / "clip").mkdir()
    values = {"model_cfg": {"embed_dim": 16, "vision_cfg": settings}, "preprocess_cfg": {}}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(values))
    stored = {f"visual.{name}": value.contiguous() for name, value in visual.state_dict().items()}
    save_file(stored, tmp_path / "clip" / "open_clip_model.safetensors")
    model, processor = made(tmp_path / "clip")
    vlm.export(model, processor, tmp_path / "out", to="tower")
    assert equal(load_file(tmp_path / "out" / "open_clip_model.safetensors"), stored)
    assert equal(tower(made(tmp_path / "out")[0]), tower(model))


def test_a_tower_whose_file_says_no_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    name = "own_encoder:PatchTower"
    spec = use(name).SPEC
    model, processor = made(spec.config(), encoder_kind=name)
    with pytest.raises(ConfigError, match=r"does not say in which format it stands alone.*`vlm new --encoder` reads"):
        vlm.export(model, processor, tmp_path / "out", to="tower")
    vlm.save(model, processor, tmp_path / "model")
    assert equal(tower(made(tmp_path / "model")[0]), tower(model))


def test_settings_that_other_formats_cannot_say_come_back(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"rounding": "down", "resample": "bilinear"}, {"mode": "letterbox"}]
    check: Callable[[vlm.Processor], Any] = lambda reader: reader.image_transform  # noqa: E731
    for number, change in enumerate(changes):
        model, processor = with_geometry(*loud("siglip", "gemma"), image=change)
        vlm.export(model, processor, tmp_path / str(number), to="tower", parity="none")
        assert check(made(tmp_path / str(number))[1]) == check(processor)
        larger = made(tmp_path / str(number), image_size=56)[1]
        assert check(larger) == replace(check(processor), image_size=56)
