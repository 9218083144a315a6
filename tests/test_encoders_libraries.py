"""The `timm` and `open_clip` encoders against the libraries themselves; skipped by name without them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture, shake
from encodertools import needs

import vlm
from vlm.build.presets import tiny, tiny_decoder
from vlm.encoders._layers import feature_width
from vlm.encoders._libraries import without
from vlm.errors import CheckpointError, ConfigError, VLMError
from vlm.measure.info import describe
from vlm.model.config import VLMConfig
from vlm.model.parts import encoder_spec

STAGES = {"depths": [1, 1, 1, 1]}
SMALL = {"patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
# name -> (architecture, its arguments, image size, tokens before the patches, layout)
TIMM: dict[str, tuple[str, dict[str, Any], int, int, str]] = {
    "vit": ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 2}, 28, 3, "NLC"),
    "siglip": ("vit_base_patch16_siglip_224", SMALL, 28, 0, "NLC"),
    "average": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}, 28, 1, "NLC"),
    "dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 32, 5, "NLC"),
    "eva": ("eva02_tiny_patch14_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 28, 1, "NLC"),
    "convnext": ("convnext_atto", {**STAGES, "dims": [8, 16, 24, 32]}, 64, 0, "NCHW"),
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1]}, 64, 0, "NCHW"),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 8, **STAGES, "num_heads": [1, 1, 2, 2]}, 224, 0, "NHWC"),
}
CLIP = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 3, "head_width": 8}
# name -> (vision_cfg, embed_dim, quick_gelu, tokens before the patches)
OPEN_CLIP: dict[str, tuple[dict[str, Any], int, bool, int]] = {
    "vit": (CLIP, 16, True, 1),
    "coca": ({**CLIP, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}, 16, False, 1),
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, 16, True, 0),
    "timm": ({"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token"}, 16, False, 1),
}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
each_timm = pytest.mark.parametrize("name", list(TIMM))
each_open_clip = pytest.mark.parametrize("name", list(OPEN_CLIP))


def timm_model(name: str) -> Any:
    """A timm model with its classifier, all weights told apart."""
    import timm

    architecture, args, size, _, _ = TIMM[name]
    torch.manual_seed(0)
    model: Any = timm.create_model(architecture, num_classes=10, **args)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size))
    return loud(model)


def loud(model: Any) -> Any:
    """All weights told apart; batch norms as if they had been trained."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    shake(model, 0.15 if norms else 0.3)
    generator = torch.Generator().manual_seed(5)
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        for values in (norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var):
            values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def timm_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as timm itself writes them for the Hub."""
    needs("timm")
    from timm.models._hub import save_for_hf

    root = tmp_path_factory.mktemp("timm")
    for name, (_, args, size, _, _) in TIMM.items():
        args = {**args, "img_size": size} if name in ("vit", "siglip", "average") else args
        save_for_hf(timm_model(name), str(root / name), model_args=args, safe_serialization=True)
    return root


def new(folder: Path, **options: Any) -> tuple[vlm.VLM, vlm.Processor]:
    return vlm.new(folder, "linear", tiny_decoder("gemma"), tiny("siglip")[1].tokenizer, **options)


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def rows(features: torch.Tensor, prefix: int, layout: str = "NLC") -> torch.Tensor:
    """[M, P, E] of a library's features."""
    if layout == "NLC":
        return features[:, prefix:]
    if layout == "NCHW":
        features = features.permute(0, 2, 3, 1)
    return features.reshape(len(features), -1, features.shape[-1])


@each_timm
@torch.no_grad()
def test_features_are_timms(timm_folders: Path, name: str, tmp_path: Path) -> None:
    """From its own checkpoint: every feature, then saved, opened and described."""
    architecture, _, size, prefix, layout = TIMM[name]
    model, processor = new(timm_folders / name, image_size=size)
    tower, config = model.model.vision_tower, model.config.vision_config
    assert model.config.encoder == "timm" and (config.architecture, config.layout) == (architecture, layout)
    want = rows(timm_model(name).forward_features(pixels(size)), prefix, layout)
    got = tower(pixels(size))
    side = int(want.shape[1] ** 0.5)
    assert got.grid.tolist() == [[side, side]] * 2 and got.features.shape == want.shape
    assert want.std() > 0.01 and (got.features - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))
    vlm.save(model, processor, tmp_path / "saved")
    again, reader = vlm.load(tmp_path / "saved")
    assert torch.equal(again.model.vision_tower(pixels(size)).features, got.features)
    assert reader.image_transform == processor.image_transform and describe((again, reader))["flops"]["encoder"] > 0


@pytest.mark.parametrize("name", [name for name in TIMM if name != "swin"])
@torch.no_grad()
def test_offloaded_timm_towers(timm_folders: Path, name: str, tmp_path: Path) -> None:
    size = TIMM[name][2]
    model, processor = new(timm_folders / name, image_size=size)
    check_offloaded(model, processor, size, tmp_path)


def check_offloaded(model: Any, processor: Any, size: int, folder: Path) -> None:
    """A tower on the disk, and its trunk behind a hook, give the features of the tower in memory."""
    want = model.model.vision_tower(pixels(size)).features
    vlm.save(model, processor, folder / "m")
    rest = ("model.multi_modal_projector", "model.language_model", "lm_head")
    devices = {"model.vision_tower": "disk", **dict.fromkeys(rest, "cpu")}
    there, _ = vlm.load(folder / "m", device_map=devices, offload_folder=folder / "parts")
    assert all(parameter.is_meta for parameter in there.model.vision_tower.parameters())
    for _ in range(2):
        assert torch.equal(there.model.vision_tower(pixels(size)).features, want)
    tower: Any = copy.deepcopy(model.model.vision_tower)
    inner = tower.trunk if hasattr(tower, "trunk") else tower.visual
    fired: list[int] = []
    inner.register_forward_hook(lambda *_: fired.append(1))
    assert torch.equal(tower(pixels(size)).features, want) and fired == [1]


@pytest.mark.parametrize("name", [name for name, case in TIMM.items() if case[4] == "NLC"])
@torch.no_grad()
def test_layers_of_timm_models(timm_folders: Path, name: str) -> None:
    """Blocks without a norm; the last one with it; nothing is left in the tower above them."""
    _, _, size, _, _ = TIMM[name]
    theirs = timm_model(name)
    blocks = theirs.forward_intermediates(pixels(size), norm=False, output_fmt="NLC", intermediates_only=True)
    model, _ = new(timm_folders / name, image_size=size, layer=-2)
    tower = model.model.vision_tower
    assert (tower(pixels(size)).features - blocks[1]).abs().max() < 1e-5
    assert len(tower.trunk.blocks) == 2 and not any("norm." == n[:5] for n, _ in tower.trunk.named_parameters())
    model, _ = new(timm_folders / name, image_size=size, layer=[-1, -3])
    last = rows(theirs.forward_features(pixels(size)), TIMM[name][3])
    got = model.model.vision_tower(pixels(size)).features
    assert (got - torch.cat([last, blocks[0]], -1)).abs().max() < 1e-5
    assert feature_width(model.config.vision_config) == 64


def test_timm_convnets_have_one_layer_and_whole_cells(timm_folders: Path) -> None:
    with pytest.raises(ConfigError, match="convnext_atto gives its last stage only"):
        new(timm_folders / "convnext", layer=-2)
    with pytest.raises(VLMError, match="cell of resnet18 is 32 px; take 64 or 96"):
        new(timm_folders / "resnet", image_size=70)


@pytest.mark.parametrize("name", ["vit", "siglip", "eva", "dinov3"])
@torch.no_grad()
def test_another_image_size_as_timm_does_it(timm_folders: Path, name: str) -> None:
    _, _, size, prefix, _ = TIMM[name]
    theirs = timm_model(name)
    theirs.set_input_size(img_size=(2 * size, 2 * size))
    model, processor = new(timm_folders / name, image_size=2 * size)
    want = rows(theirs.forward_features(pixels(2 * size)), prefix)
    assert (model.model.vision_tower(pixels(2 * size)).features - want).abs().max() < 1e-5
    assert processor.image_transform.image_size == 2 * size


@each_timm
def test_every_parameter_of_a_timm_tower_learns(timm_folders: Path, name: str) -> None:
    """Heads, pools and norms that no feature goes through are not there."""
    model, _ = new(timm_folders / name, image_size=TIMM[name][2])
    tower = model.model.vision_tower
    out = tower(pixels(TIMM[name][2])).features
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert [key for key, parameter in tower.named_parameters() if parameter.grad is None] == []
    assert not any("num_batches_tracked" in key for key in tower.state_dict())


@pytest.mark.parametrize(("name", "size"), [("vit", 42), ("convnext", 64), ("siglip", 42)])
def test_timms_transform(timm_folders: Path, name: str, size: int) -> None:
    """The pixels are those of timm's own evaluation transform (images whose crop has no odd offset)."""
    from timm.data import create_transform, resolve_data_config

    folder = timm_folders / name
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    _, processor = new(folder, image_size=size)
    theirs: Any = create_transform(**resolve_data_config({"input_size": (3, size, size)}, pretrained_cfg=cfg))
    for seed, shape in enumerate([(40, 40), (120, 120), (size, size), (92, 46)]):
        own = processor.image_transform([picture(seed, shape)]).pixel_values[0]
        assert (own - theirs(picture(seed, shape))).abs().max() < 1e-5
    assert processor.image_transform.mean == pytest.approx(cfg["mean"])


def test_a_timm_configuration_cannot_choose_code(timm_folders: Path, tmp_path: Path) -> None:
    """Names outside the registry, places to download from, files and classes are refused before anything is built."""
    for name in ("hf-hub:timm/vit", "local-dir:/x", "os.path", "../vit", "no_such_model", "vit_tiny_patch16_224/x", ""):
        with pytest.raises(ConfigError, match="is not in timm's registry"):
            encoder_spec("timm").read_config({"architecture": name})
    wrong: list[dict[str, Any]] = [{"checkpoint_path": "x.pth"}, {"pretrained": True}, {"pretrained_cfg": {}}]
    for args in (*wrong, {"features_only": True}, {"in_chans": 4}):
        with pytest.raises(ConfigError, match=f"model_args.{next(iter(args))} is not an argument"):
            encoder_spec("timm").read_config({"architecture": "vit_tiny_patch16_224", "model_args": args})
    with pytest.raises(ConfigError, match="expected plain values"):
        encoder_spec("timm").read_config(
            {"architecture": "vit_tiny_patch16_224", "model_args": {"norm_layer": torch.nn.Identity}}
        )
    with pytest.raises(ConfigError, match="timm cannot build"):
        encoder_spec("timm").read_config(
            {"architecture": "vit_tiny_patch16_224", "model_args": {"no_such_argument": 1}}
        )
    complete = {**encoder_spec("timm").tiny().to_dict(), "architecture": "hf-hub:timm/vit"}
    with pytest.raises(ConfigError, match="is not in timm's registry"):
        vlm.VLM(VLMConfig(encoder="timm", vision_config=complete, image_token_id=3))


def test_a_timm_checkpoint_is_loaded_strictly(timm_folders: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(timm_folders / "vit", tmp_path / "vit")
    weights = load_file(timm_folders / "vit" / "model.safetensors")
    moved = {name.replace("blocks.2.", "blocks.7."): value for name, value in weights.items()}
    save_file(moved, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: trunk.blocks.2.*unexpected: blocks.7"):
        new(tmp_path / "vit", image_size=28)


# --- open_clip --------------------------------------------------------------------------------------------------------


def open_clip_model(name: str) -> Any:
    """A whole open_clip model, text tower included."""
    from open_clip.model import CustomTextCLIP

    settings, width, quick, _ = OPEN_CLIP[name]
    torch.manual_seed(0)
    return loud(CustomTextCLIP(width, settings, TEXT, quick_gelu=quick))


@pytest.fixture(scope="module")
def open_clip_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as open_clip itself writes them for the Hub."""
    needs("open_clip")
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_for_hf

    class NoTokenizer:
        def save_pretrained(self, folder: Any) -> None:
            pass

    root = tmp_path_factory.mktemp("open_clip")
    for name, (settings, width, quick, _) in OPEN_CLIP.items():
        model = open_clip_model(name)
        image = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "squash"}
        set_model_preprocess_cfg(model, {"size": settings["image_size"], "mode": "RGB", **image})
        values = {"embed_dim": width, "quick_gelu": quick, "vision_cfg": settings, "text_cfg": TEXT}
        tokenizer: Any = NoTokenizer()
        save_for_hf(model, tokenizer, values, str(root / name), safe_serialization=True)
    return root


def open_clip_rows(name: str, visual: Any, values: torch.Tensor) -> torch.Tensor:
    """What the library's own forward passes to its pool: caught by a hook on the layer before it."""
    module = {"vit": "ln_post", "coca": "transformer", "resnet": "layer4", "timm": "trunk.norm"}[name]
    seen: list[torch.Tensor] = []
    hook = visual.get_submodule(module).register_forward_hook(lambda _m, _i, output: seen.append(output))
    visual(values)
    hook.remove()
    return rows(seen[0], OPEN_CLIP[name][3], "NCHW" if name == "resnet" else "NLC")


@each_open_clip
@torch.no_grad()
def test_features_are_open_clips(open_clip_folders: Path, name: str, tmp_path: Path) -> None:
    size = OPEN_CLIP[name][0]["image_size"]
    model, processor = new(open_clip_folders / name)
    tower = model.model.vision_tower
    want = open_clip_rows(name, open_clip_model(name).visual, pixels(size))
    got = tower(pixels(size))
    assert model.config.encoder == "open_clip" and got.features.shape == want.shape and want.std() > 0.01
    assert (got.features - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))
    transform = processor.image_transform
    assert (transform.mode, transform.resample, transform.mean) == ("squash", "bicubic", (0.4, 0.5, 0.6))
    vlm.save(model, processor, tmp_path / "saved")
    again, reader = vlm.load(tmp_path / "saved")
    assert torch.equal(again.model.vision_tower(pixels(size)).features, got.features)
    assert reader.image_transform == transform and describe((again, reader))["flops"]["encoder"] > 0


@each_open_clip
@torch.no_grad()
def test_offloaded_open_clip_towers(open_clip_folders: Path, name: str, tmp_path: Path) -> None:
    """Their class token and positions are the tower's own: brought in when the tower is called, not its methods."""
    model, processor = new(open_clip_folders / name)
    check_offloaded(model, processor, OPEN_CLIP[name][0]["image_size"], tmp_path)


@each_open_clip
def test_every_parameter_of_an_open_clip_tower_learns(open_clip_folders: Path, name: str) -> None:
    model, _ = new(open_clip_folders / name)
    tower = model.model.vision_tower
    out = tower(pixels(OPEN_CLIP[name][0]["image_size"])).features
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert [key for key, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["vit", "coca", "timm"])
@torch.no_grad()
def test_layers_of_open_clip_towers(open_clip_folders: Path, name: str) -> None:
    size, prefix = OPEN_CLIP[name][0]["image_size"], OPEN_CLIP[name][3]
    visual = open_clip_model(name).visual
    blocks = visual.trunk.blocks if name == "timm" else visual.transformer.resblocks
    seen: list[torch.Tensor] = []
    blocks[-2].register_forward_hook(lambda _m, _i, output: seen.append(output[:, prefix:]))
    last = open_clip_rows(name, visual, pixels(size))
    model, _ = new(open_clip_folders / name, layer=-2)
    assert (model.model.vision_tower(pixels(size)).features - seen[0]).abs().max() < 1e-5
    model, _ = new(open_clip_folders / name, layer=[-2, -1])
    got = model.model.vision_tower(pixels(size)).features
    assert (got - torch.cat([seen[0], last], -1)).abs().max() < 1e-5


@torch.no_grad()
def test_another_image_size_as_open_clip_does_it(open_clip_folders: Path) -> None:
    from open_clip.model import CustomTextCLIP, resize_pos_embed

    settings, width, quick, _ = OPEN_CLIP["vit"]
    theirs = CustomTextCLIP(width, {**settings, "image_size": 70}, TEXT, quick_gelu=quick).eval()
    state = open_clip_model("vit").state_dict()
    resize_pos_embed(state, theirs)
    theirs.load_state_dict(state)
    model, _ = new(open_clip_folders / "vit", image_size=70)
    want = open_clip_rows("vit", theirs.visual, pixels(70))
    got = model.model.vision_tower(pixels(70))
    assert got.grid.tolist() == [[5, 5]] * 2 and (got.features - want).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_open_clips_transform(mode: str) -> None:
    """The pixels are those of open_clip's own evaluation transform (images whose crop has no odd offset)."""
    needs("open_clip")
    from open_clip.transform import PreprocessCfg, image_transform_v2

    image: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": mode, "fill_color": 7}
    theirs: Any = image_transform_v2(PreprocessCfg(size=28, **image), is_train=False)
    config = encoder_spec("open_clip").read_config({"vision_cfg": CLIP, "embed_dim": 16, **image})
    own = encoder_spec("open_clip").transform(config)
    for seed, shape in enumerate([(40, 40), (56, 28), (28, 84), (84, 56)]):
        if mode == "shortest" and shape == (84, 56):
            continue
        got = own([picture(seed, shape)]).pixel_values[0]
        assert (got - theirs(picture(seed, shape))).abs().max() < 1e-5


def test_an_open_clip_configuration_cannot_choose_code() -> None:
    needs("open_clip")
    for name in ("hf-hub:timm/vit", "os.path", "no_such_model"):
        with pytest.raises(ConfigError, match="is not in timm's registry"):
            encoder_spec("open_clip").read_config({"vision_cfg": {**CLIP, "timm_model_name": name}, "embed_dim": 16})
    with pytest.raises(ConfigError, match=r"vision_cfg.hf_model_name is 'x'; open_clip knows"):
        encoder_spec("open_clip").read_config({"vision_cfg": {"hf_model_name": "x"}, "embed_dim": 16})


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_numbers_that_are_not_the_towers(kind: str) -> None:
    """What was measured is recorded; changed by hand, the tower says so and drops no patch."""
    needs(kind)
    module = encoder_spec(kind)
    for change in ({"num_prefix_tokens": 0}, {"num_prefix_tokens": 4}, {"layout": "NCHW"}, {"hidden_size": 31}):
        tower = module.encoder(encoder_spec(kind).read_config({**module.tiny().to_dict(), **change}))
        with pytest.raises(ConfigError, match="is not the architecture's"):
            tower(pixels(28))


def test_what_is_left_out_must_be_there() -> None:
    """Modules become nothing, parameters None; a name of neither is refused, whatever attribute it is."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    without(module, ["0", "2.bias"])
    assert [name for name, _ in module.named_parameters()] == ["1.weight", "1.bias", "2.weight"]
    assert "1.num_batches_tracked" not in module.state_dict()
    for name in ("3", "2.forward", "2.biass", ""):
        with pytest.raises(ConfigError, match="the architecture has no"):
            without(module, [name])


# --- without the libraries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "extra"), [("timm", "timm"), ("open_clip", "open-clip")])
def test_a_missing_library_is_named(kind: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds are known without their libraries; building one says what to install."""
    import sys

    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ConfigError, match=rf"needs {kind}, .*pip install 'vlm-backbone\[{extra}\]'"):
        encoder_spec(kind).tiny()
