"""CLIP, DINOv2 and DINOv3 against transformers' own classes; feature layers; training with every tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coretools import picture, shake
from encodertools import needs
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vlm
from vlm.build.presets import tiny, tiny_decoder
from vlm.checkpoints.parts import load_tower
from vlm.encoders._layers import feature_width
from vlm.errors import CheckpointError, ConfigError
from vlm.measure.info import describe
from vlm.model.config import VLMConfig
from vlm.model.parts import encoder_spec, model_types
from vlm.registry import kinds

SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28}
SIZE |= {"patch_size": 14}
WIDE = {**SIZE, "intermediate_size": 64}
TEXT = {**WIDE, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8}
CLIP_TEXT = {key: value for key, value in TEXT.items() if key not in ("image_size", "patch_size")}

# name -> (encoder kind, transformers' model, tokens before the patches, its final norm and blocks)
THEIRS: dict[str, Any] = {
    "siglip": ("siglip", lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE, vision_use_head=False)), 0),
    "clip": ("clip", lambda: CLIPVisionModel(CLIPVisionConfig(**WIDE)), 1),
    "clip_full": ("clip", lambda: CLIPModel(CLIPConfig(vision_config=WIDE, text_config=CLIP_TEXT)), 1),
    "dinov2": ("dinov2", lambda: Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2)), 1),
    "registers": (
        "dinov2",
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZE, mlp_ratio=2, num_register_tokens=3)),
        4,
    ),
    "dinov3": ("dinov3", lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDE, num_register_tokens=3)), 4),
}
each = pytest.mark.parametrize("name", list(THEIRS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as transformers saves them."""
    root = tmp_path_factory.mktemp("towers")
    for name, (_, make, _) in THEIRS.items():
        torch.manual_seed(0)
        model = make().eval()
        shake(model)
        model.save_pretrained(root / name)
    return root


def theirs(name: str, folder: Path) -> PreTrainedModel:
    model = type(THEIRS[name][1]()).from_pretrained(folder / name).eval()
    return model.vision_model if name == "clip_full" else model


def norm_of(model: Any) -> Any:
    return next(getattr(model, n) for n in ("post_layernorm", "layernorm", "norm") if hasattr(model, n))


def new(folder: Path, name: str, **options: Any) -> tuple[vlm.VLM, vlm.Processor]:
    tokenizer = tiny("siglip")[1].tokenizer
    return vlm.new(folder / name, "linear", tiny_decoder("gemma"), tokenizer, **options)


def pixels(size: int = 28) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def wanted(name: str, model: Any, values: torch.Tensor, layer: int) -> torch.Tensor:
    """transformers' features: hidden_states counts the embeddings as 0; -1 goes through the final norm."""
    hidden = model(values, output_hidden_states=True).hidden_states[layer]
    return (norm_of(model)(hidden) if layer == -1 else hidden)[:, THEIRS[name][2] :]


@each
@pytest.mark.parametrize("layer", [-1, -2, -3])
@torch.no_grad()
def test_features_are_transformers_own(folders: Path, name: str, layer: int) -> None:
    model, _ = new(folders, name, layer=layer)
    reference = theirs(name, folders)
    got = model.model.vision_tower(pixels())
    assert model.config.encoder == THEIRS[name][0]
    want = wanted(name, reference, pixels(), layer)
    assert got.features.shape == want.shape == (2, 4, 32) and want.std() > 0.1
    assert (got.features - want).abs().max() < 1e-5
    if layer == -1 and not name.startswith("clip"):  # CLIP's last_hidden_state has no norm
        assert (got.features - reference(pixels()).last_hidden_state[:, THEIRS[name][2] :]).abs().max() < 1e-5
    bf16 = model.model.vision_tower.bfloat16()(pixels()).features
    assert bf16.dtype == torch.bfloat16 and (bf16.float() - want).abs().mean() < 0.1 * want.std()


@each
def test_several_layers_and_nothing_unused(folders: Path, name: str, tmp_path: Path) -> None:
    """Concatenated in the order asked for; every parameter gets a gradient; what is not used is not there; saved."""
    reference = theirs(name, folders)
    with torch.no_grad():
        parts = {layer: wanted(name, reference, pixels(), layer) for layer in (-1, -2, -3)}
    for layers, depth, normed in (([-3, -1], 3, True), ([-2, -3], 2, False), ([-2], 2, False)):
        model, processor = new(folders, name, layer=layers)
        tower, vision = model.model.vision_tower, model.config.vision_config
        assert vision.num_hidden_layers == depth and vision.feature_norm is normed
        assert vision.feature_layers == [4 + layer for layer in layers]
        assert model.model.multi_modal_projector.linear.in_features == feature_width(vision) == 32 * len(layers)
        out = tower(pixels()).features
        assert (out - torch.cat([parts[layer] for layer in layers], -1)).abs().max() < 1e-5
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        for key, parameter in tower.named_parameters():
            if not key.endswith(("k_proj.bias", "key.bias")):
                assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-6, key
    vlm.save(model, processor, tmp_path / "saved")
    again, _ = vlm.load(tmp_path / "saved")
    assert again.config.vision_config.to_dict() == vision.to_dict()
    assert torch.equal(again.model.vision_tower(pixels()).features, out)


def test_bad_layers(folders: Path) -> None:
    for layer in (0, -4, [-1, -1], [], 1.5, [True]):
        with pytest.raises(ConfigError, match="layer is"):
            new(folders, "clip", layer=layer)
    with pytest.raises(ConfigError, match="siglip2_naflex tower gives its last layer only"):
        new(folders, "siglip", layer=-2, encoder_kind="siglip2_naflex", image={"max_num_patches": 4})
    config = encoder_spec("clip").choose_layers("clip", encoder_spec("clip").tiny(), -2)
    with pytest.raises(ConfigError, match=r"has its choice of layers, \[1\]"):
        encoder_spec("clip").choose_layers("clip", config, [-1, -2])


@pytest.mark.parametrize("name", ["clip", "clip_full", "dinov2", "registers", "dinov3"])
@torch.no_grad()
def test_another_image_size_as_transformers_does_it(folders: Path, name: str) -> None:
    model, processor = new(folders, name, image_size=70)
    extra = {"interpolate_pos_encoding": True} if name.startswith("clip") else {}
    reference = theirs(name, folders)
    hidden = reference(pixels(70), **extra, output_hidden_states=True).hidden_states[-1]
    want = norm_of(reference)(hidden)[:, THEIRS[name][2] :]
    got = model.model.vision_tower(pixels(70))
    assert got.grid.tolist() == [[5, 5]] * 2 and processor.image_transform.image_size == 70
    assert (got.features - want).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="set the processor's image_transform.image_size to 70"):
        model.model.vision_tower(pixels())


def test_tensors_that_do_not_belong_are_refused(folders: Path) -> None:
    """Blocks above the feature layers are left out on request only."""
    values = {**theirs("dinov2", folders).config.to_dict(), "num_hidden_layers": 2}
    tower = encoder_spec("dinov2").encoder._from_config(encoder_spec("dinov2").read_config(values))
    with pytest.raises(CheckpointError, match=r"unexpected: encoder.layer.2"):
        load_tower(tower, folders / "dinov2")


def test_dropout_is_off_when_frozen(folders: Path) -> None:
    """Drop-path, dropout and DINOv3's random positions: none in eval mode; positions stay in training too."""
    config = Dinov2WithRegistersConfig(**SIZE, mlp_ratio=2, drop_path_rate=0.5, hidden_dropout_prob=0.5)
    for module, given in (("dinov2", config), ("dinov3", DINOv3ViTConfig(**WIDE, drop_path_rate=0.5))):
        tower = encoder_spec(module).encoder._from_config(encoder_spec(module).read_config(given.to_dict()))
        shake(tower)
        outputs = {mode: [tower.train(mode)(pixels()).features for _ in range(4)] for mode in (False, True)}
        assert all(torch.equal(outputs[False][0], other) for other in outputs[False])
        assert not all(torch.equal(outputs[True][0], other) for other in outputs[True])
    quiet = encoder_spec("dinov3").encoder._from_config(encoder_spec("dinov3").read_config(WIDE))
    assert torch.equal(quiet.train()(pixels()).features, quiet.eval()(pixels()).features)


def test_recorded_preprocessing(folders: Path, tmp_path: Path) -> None:
    """As the published checkpoints record it: CLIP and DINOv2 crop, DINOv3 squashes."""
    import shutil

    def recorded(name: str, values: dict[str, Any], **options: Any) -> Any:
        folder = tmp_path / name
        shutil.copytree(folders / name, folder, dirs_exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
        return new(tmp_path, name, **options)[1].image_transform

    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    clip = recorded("clip", {**crop, "size": {"shortest_edge": 224}})
    assert (clip.mode, clip.resize_shortest, clip.resample, clip.image_size) == ("crop", 28, "bicubic", 28)
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073)
    dino = recorded("dinov2", {**crop, "size": {"shortest_edge": 256}, "image_mean": [0.4, 0.4, 0.4]})
    assert (dino.mode, dino.resize_shortest, dino.mean, dino.std[0]) == ("crop", 32, (0.4, 0.4, 0.4), 0.229)
    squash = recorded("dinov3", {"size": {"height": 224, "width": 224}, "resample": 2})
    assert (squash.mode, squash.resize_shortest, squash.resample) == ("squash", None, "bilinear")
    boxed = recorded("dinov2", {**crop, "size": {"shortest_edge": 256}}, image={"mode": "letterbox"})
    assert (boxed.mode, boxed.resize_shortest) == ("letterbox", None)


@pytest.mark.parametrize(
    "size", [(70, 30), (25, 80), (40, 40), (28, 28), (31, 29), (1, 1), (200, 1), (2, 301), (7, 300)]
)
def test_crop_is_transformers_clip_preprocessing(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(5, size)
    own = encoder_spec("clip").transform(encoder_spec("clip").tiny(), resize_shortest=32)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    want = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    assert (own([image]).pixel_values[0] - want).abs().max() < 1e-5


def test_crop_of_a_line_needs_little_memory() -> None:
    """At its scale the whole line would be 8.4 million pixels long."""
    module = encoder_spec("clip")
    line = Image.new("RGB", (300_000, 1), "red")
    values = module.transform(module.tiny())([line]).pixel_values
    assert values.shape == (1, 3, 28, 28) and float((values - values[..., :1, :1]).abs().max()) == 0


def test_crop_settings_are_checked() -> None:
    module = encoder_spec("clip")
    for settings in ({"resize_shortest": 20}, {"resize_shortest": 32, "mode": "squash"}):
        with pytest.raises(ConfigError, match="resize_shortest is"):
            module.transform(module.tiny(), **settings)


@pytest.mark.parametrize("kind", kinds("vlm.encoders"))
def test_each_tower_learns(kind: str, tmp_path: Path) -> None:
    """Tower, linear projector and decoder: a few steps tell two pictures apart; saved, opened and described."""
    needs(kind)
    model, processor = tiny(kind)
    images = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    batch = processor(images, ["answer en what color is the square?"] * 2, ["yes", "no"])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    model.train()
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.15 < 1 < losses[0]  # without the picture ln 2 / 2 = 0.35 per token would be left
    model.eval()
    vlm.save(model, processor, tmp_path / "model")
    again, reader = vlm.load(tmp_path / "model")
    assert reader.image_transform == processor.image_transform
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert describe((again, reader))["parts"]["encoder"]["kind"] == kind


def test_contract_constants() -> None:
    """Each file names its checkpoints; no two files read the same one; tokens_for agrees with the transform."""
    names = [name for kind in kinds("vlm.encoders") for name in encoder_spec(kind).model_types]
    assert len(names) == len(set(names)) and set(names) == set(model_types())
    for kind in kinds("vlm.encoders"):
        module = encoder_spec(kind)
        assert module.config.model_type in module.model_types or kind in ("siglip2_naflex", "dinov2")
        if module.extra:
            continue  # its tiny() needs its library; tests/test_encoders_contract.py has the rest
        config = module.tiny()
        if not module.any_aspect:
            patch = config.patch_size
            for size in (2 * patch, 2 * patch + 13, 5 * patch):
                assert module.tokens_for(config, size) == (size // patch) ** 2
            assert module.transform(config).max_patches == module.tokens_for(config, 2 * patch)
    with pytest.raises(ConfigError, match="unknown encoder 'os.path'"):
        VLMConfig(encoder="os.path")


def test_paligemma_has_no_other_layers(folders: Path, tmp_path: Path) -> None:
    model, processor = new(folders, "siglip", layer=-2)
    with pytest.raises(ConfigError, match="other layers"):
        vlm.export(model, processor, tmp_path / "out", parity="none")


def test_command_line(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`vlm new --layer`, then `vlm check` without a FAIL, for each kind of tower."""
    from vlm.cli import main

    tiny_model, processor = tiny("siglip")
    tiny_model.model.language_model.save_pretrained(tmp_path / "gemma")
    processor.tokenizer.save_pretrained(tmp_path / "gemma")
    for name, layers in (("clip", ["-2"]), ("dinov2", ["-1"]), ("dinov3", ["-1", "-3"])):
        out = tmp_path / name
        parts = ["--encoder", str(folders / name), "--decoder", str(tmp_path / "gemma")]
        assert main(["new", *parts, "--layer", *layers, "--out", str(out)]) == 0
        assert vlm.load(out)[0].config.encoder == name
        capsys.readouterr()
        assert main(["check", str(out)]) == 0, capsys.readouterr().out
        assert " 0 FAIL" in capsys.readouterr().out
