"""open_clip checkpoints with both towers, against the library itself: embeddings, logits, ids, pixels; skipped by name
without it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture, shake
from encodertools import needs
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid, normalize

from vlm.check import run_dual
from vlm.errors import CheckpointError, ConfigError
from vlm.measure.info import describe
from vlm.siglip import load, save, space
from vlm.text.tokenizer import build

VISION = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "head_width": 8}
TEXT = {"width": 32, "heads": 4, "layers": 2}
EPS = {"norm_kwargs": {"eps": 1e-6}}
SIGLIP_TEXT: dict[str, Any] = {
    **TEXT,
    **EPS,
    "context_length": 48,
    "vocab_size": 400,
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
}
SIGLIP_VISION = {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"}
SIGLIP: dict[str, Any] = {"embed_dim": 96, "init_logit_bias": -10, "custom_text": True, "vision_cfg": SIGLIP_VISION}
CLIP_TEXT = {**TEXT, "context_length": 77, "vocab_size": 49408}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": CLIP_TEXT},
    "custom": {"embed_dim": 24, "custom_text": True, "vision_cfg": VISION, "text_cfg": CLIP_TEXT},
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": CLIP_TEXT,
    },
    "siglip": {**SIGLIP, "text_cfg": SIGLIP_TEXT},
    "siglip2": {**SIGLIP, "text_cfg": {**SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}}},
    "eos": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "context_length": 48, "vocab_size": 400, "hf_tokenizer_name": "x", "pool_type": "eos"},
    },
}
CONFIGS["eos"]["text_cfg"]["eos_id"] = 1
IMAGE = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
TEXTS = [
    "A red_Square, left of a BLUE circle!",
    "",
    "snow &amp;amp; ice isn't   here",
    "ÉTÉ À LA PLAGE Σίσυφος İstanbul",
    "full-width！ 写真 🙂",
    "word " * 200,
    "broken cafÃ©",
]
each = pytest.mark.parametrize("name", list(CONFIGS))


def tokenizer_files(name: str, folder: Path) -> None:
    """A Gemma tokenizer as timm's repositories have it: the end token added by `tokenizer.json`."""
    corpus = ["a red square left of a blue circle", "snow and ice", "a photo of a cat", "word full width isn't here"]
    tokenizer = build(corpus * 5, vocab_size=400)
    tokenizer.save_pretrained(folder)
    if name == "bare":
        return
    values = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 0}}, end],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"padding_side": "right", "pad_token": "<eos>" if name == "siglip" else "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write(name: str, folder: Path, **changes: Any) -> Any:
    """A checkpoint as open_clip itself writes it for the Hub, and the library's own model of it."""
    from open_clip.model import CLIP, CustomTextCLIP

    values = copy.deepcopy(CONFIGS[name])
    torch.manual_seed(0)
    settings = {key: value for key, value in values.items() if key != "custom_text"}
    model: Any = (CustomTextCLIP if values.get("custom_text") else CLIP)(**settings)
    shake(model, 0.05 if name == "resnet" else 0.2)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        if model.logit_bias is not None:
            model.logit_bias.fill_(-3.0)
    model.eval()
    folder.mkdir(exist_ok=True)
    image = IMAGE if "siglip" in name else {**IMAGE, "resize_mode": "shortest", "mean": [0.48, 0.46, 0.41]}
    config = {"model_cfg": {**values, **changes}, "preprocess_cfg": image}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    if values["text_cfg"].get("hf_tokenizer_name"):
        tokenizer_files(name, folder)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("open_clip")
    root = tmp_path_factory.mktemp("open_clip")
    for name in CONFIGS:
        write(name, root / name)
    return root


@each
@torch.no_grad()
def test_everything_is_open_clips(folders: Path, name: str) -> None:
    """What `open_clip.create_model_from_pretrained` and `get_tokenizer` give for the directory, end to end."""
    import open_clip

    theirs: Any
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folders / name}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folders / name}")
    theirs.eval()
    model, processor = load(folders / name)
    ids, cut = processor.texts(TEXTS)
    assert torch.equal(ids, tokenizer(TEXTS)) and cut == (5,) and ids.shape[1] == model.context
    # Sizes whose crop has no odd offset, where torchvision rounds the other way.
    images = [picture(seed, size) for seed, size in enumerate([(40, 40), (56, 28), (28, 84)])]
    pixels: Any = processor.images(images)
    wanted = torch.stack([preprocess(image) for image in images])
    assert (pixels["pixel_values"] - wanted).abs().max() < 1e-5
    image, text = model.encode_image(**pixels), model.encode_text(ids)
    assert (image - theirs.encode_image(wanted, normalize=True)).abs().max() < 1e-5
    assert (text - theirs.encode_text(tokenizer(TEXTS), normalize=True)).abs().max() < 1e-5
    assert (image[:1] - image[1:]).norm(dim=1).min() > 5e-4 and (text[:1] - text[1:]).norm(dim=1).min() > 0.01
    logits = model.logits(image, text)
    assert (logits - theirs.get_logits(wanted, tokenizer(TEXTS))[0]).abs().max() < 1e-4 and logits.std() > 0.05
    assert model.embedding_size == image.shape[1] == CONFIGS[name]["embed_dim"]


@each
@torch.no_grad()
def test_probabilities_and_loss(folders: Path, name: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    model, processor = load(folders / name)
    pixels: Any = processor.images([picture(seed, (40, 40)) for seed in range(3)])
    image, text = model.encode_image(**pixels), model.encode_text(processor.texts(["red", "snow", "a photo"]).input_ids)
    logits = model.logits(image, text)
    if "siglip" in name:
        wanted: Any = SigLipLoss()(image, text, model.scale, model.bias)
        assert torch.equal(model.probabilities(logits), logits.sigmoid()) and float(model.bias or 0) == -3
        by_hand = -logsigmoid((2 * torch.eye(3) - 1) * logits).sum() / 3
        assert (by_hand - wanted).abs() < 1e-5
    else:
        wanted = ClipLoss()(image, text, model.scale)
        assert torch.equal(model.probabilities(logits), logits.softmax(1)) and model.bias is None
    assert (model.loss(image, text) - wanted).abs() < 1e-5


@each
@torch.no_grad()
def test_rules(folders: Path, name: str) -> None:
    """The row of the family's table as the configuration has it."""
    model, processor = load(folders / name)
    rule = processor.rule
    siglip = "siglip" in name
    assert rule.family == model.family == ("open_clip_siglip" if siglip else "open_clip")
    assert rule.case == ("kept, as it is written" if name == "eos" else "lower")
    assert rule.punctuation.startswith("dropped" if siglip else "kept")
    assert rule.attention == ("both" if siglip else "causal")
    assert (rule.bos, rule.eos) == (
        (None, "<eos>") if siglip or name == "eos" else ("<start_of_text>", "<end_of_text>")
    )
    assert rule.pad == ("<eos>" if name == "siglip" else "<pad>" if siglip or name == "eos" else "!")
    assert rule.clean("A_b,  C &amp; d!") == (
        "a b c d" if siglip else "A_b, C & d!" if name == "eos" else "a_b, c & d!"
    )


@each
@torch.no_grad()
def test_the_checks_pass(folders: Path, name: str) -> None:
    model, processor = load(folders / name)
    report = run_dual(model, processor)
    skipped = {result.name for result in report.results if result.status == "n/a"}
    assert report.ok and skipped == {"naflex-padding"} | ({"text-case"} if name == "eos" else set()), report.table()


@each
@torch.no_grad()
def test_saved_and_opened_again(folders: Path, name: str, tmp_path: Path) -> None:
    import open_clip

    model, processor = load(folders / name)
    save(model, processor, tmp_path / "saved")
    again, reader = load(tmp_path / "saved")
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert reader.transform == processor.transform and reader.context == processor.context
    assert torch.equal(reader.texts(TEXTS).input_ids, processor.texts(TEXTS).input_ids)
    if name != "resnet":  # its counters of batches are left out, and the library wants them
        theirs: Any = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}").eval()
        pixels: Any = processor.images([picture(1, (40, 40))])
        assert torch.equal(theirs.encode_image(**{"image": pixels["pixel_values"]}), model.image_features(**pixels))
    assert space.of(again, reader) == space.of(model, processor)
    facts = describe(tmp_path / "saved")
    assert facts["text"]["rule"] == processor.rule.title and facts["embedding"] == model.embedding_size
    assert facts["parameters"] == sum(one.numel() for one in model.parameters())
    half, _ = load(tmp_path / "saved", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.scale == model.scale
    assert (half.encode_text(reader.texts(TEXTS).input_ids).norm(dim=1) - 1).abs().max() < 1e-5


# --- what the library would take without a word


def test_a_tokenizer_without_its_end_token_is_refused(tmp_path: Path) -> None:
    """transformers 5 ignores `add_eos_token` beside a tokenizer.json: the tower would read another position's text."""
    needs("open_clip")
    write("siglip2", tmp_path)
    tokenizer_files("bare", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"add_eos_token": True, "add_bos_token": False, "padding_side": "right"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"SigLIP was trained with .* the end token 1, then 0 on the right to 48"):
        load(tmp_path)


def test_padding_on_the_left_is_refused(tmp_path: Path) -> None:
    needs("open_clip")
    write("siglip2", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["padding_side"]  # Gemma's own is left
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"take the tokenizer files of timm/ViT-B-16-SigLIP2-256"):
        load(tmp_path)


def test_an_end_token_that_is_not_the_configurations(tmp_path: Path) -> None:
    needs("open_clip")
    write("eos", tmp_path)
    values = json.loads((tmp_path / "open_clip_config.json").read_text())
    values["model_cfg"]["text_cfg"]["eos_id"] = 2
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="reads the position of id 2, which the tokenizer never gives"):
        load(tmp_path)


def test_a_bias_that_is_missing_is_named(tmp_path: Path) -> None:
    """open_clip puts 0 there, and every probability is 1."""
    needs("open_clip")
    write("siglip", tmp_path)
    tensors = load_file(tmp_path / "open_clip_model.safetensors")
    del tensors["logit_bias"]
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing: logit_bias"):
        load(tmp_path)


def test_names_of_before(folders: Path, tmp_path: Path) -> None:
    """A text tower that was no module of its own."""
    write("custom", tmp_path)
    tensors = load_file(tmp_path / "open_clip_model.safetensors")
    old = {key.removeprefix("text."): value for key, value in tensors.items()}
    save_file(old, tmp_path / "open_clip_model.safetensors")
    model, processor = load(tmp_path)
    same, _ = load(folders / "custom")
    ids = processor.texts(TEXTS).input_ids
    assert torch.equal(model.encode_text(ids), same.encode_text(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multimodal_cfg": {}}, "CoCa, whose text decoder is not read here"),
        ({"force_custom": True}, "model_cfg.force_custom is True; read here: embed_dim"),
        ({"text_cfg": {**CLIP_TEXT, "hf_model_name": "roberta-base"}}, "a text tower of transformers inside open_clip"),
        ({"text_cfg": {**CLIP_TEXT, "colour": 1}}, "text_cfg.colour is 1; open_clip knows context_length"),
        (
            {"text_cfg": {**CLIP_TEXT, "tokenizer_kwargs": {"trust_remote_code": True}}},
            "trust_remote_code is True; read",
        ),
        ({"text_cfg": {**CLIP_TEXT, "tokenizer_kwargs": {"clean": "eval"}}}, "open_clip's clean is 'eval', known"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "is not in timm's registry"),
        ({"vision_cfg": {**VISION, "pool_type": "none of these"}}, "open_clip cannot build the model"),
    ],
)
def test_a_configuration_cannot_choose_code(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    needs("open_clip")
    write("clip", tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


@torch.no_grad()
def test_the_names_that_people_paste(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As open_clip takes them; beside a timm configuration of the image tower, which describes no text tower."""
    asked = []

    def give(name: str, **_: Any) -> str:
        asked.append(name)
        return str(folders / "siglip2")

    monkeypatch.setattr("vlm.checkpoints.places.snapshot_download", give)
    (folders / "siglip2" / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_siglip_256"}))
    model, _ = load("hf-hub:timm/ViT-B-16-SigLIP2-256")
    (folders / "siglip2" / "config.json").unlink()
    assert asked == ["timm/ViT-B-16-SigLIP2-256"] and model.family == "open_clip_siglip"


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIGS["siglip"]}))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"needs open_clip, .*pip install 'vlm-backbone\[open-clip\]'"):
        load(tmp_path)


def test_other_files(tmp_path: Path) -> None:
    """Weights by the library's other names; none that are safe; no tokenizer."""
    needs("open_clip")
    write("siglip", tmp_path)
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "open_clip_pytorch_model.safetensors")
    (tmp_path / "tokenizer.json").unlink()
    model, processor = load(tmp_path)
    pixels: Any = processor.images([picture(1, (40, 40))])
    assert processor.tokenizer is None and model.encode_image(**pixels).shape == (1, 96)
    with pytest.raises(ConfigError, match="no tokenizer, so it can read images only"):
        processor.texts(["a"])
    tokenizer_files("siglip", tmp_path / "other")
    _, processor = load(tmp_path, tokenizer=tmp_path / "other")
    assert processor.texts(["a"]).input_ids.shape == (1, 48)
    (tmp_path / "open_clip_pytorch_model.safetensors").rename(tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no open_clip_model.safetensors; only safetensors are read"):
        load(tmp_path)


@torch.no_grad()
def test_the_same_weights_in_transformers_differ_by_their_gelu(tmp_path: Path) -> None:
    """Why open_clip's copy is run as open_clip runs it: an exact GELU in v1's text tower, tanh in the original."""
    needs("open_clip")
    from transformers import SiglipTextConfig, SiglipTextModel

    model: Any = write("siglip", tmp_path)
    ids = torch.randint(3, 400, (4, 48), generator=torch.Generator().manual_seed(0))
    same: dict[str, torch.Tensor] = {}
    for activation in ("gelu", "gelu_pytorch_tanh"):
        config = SiglipTextConfig(
            hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=400,
            max_position_embeddings=48, projection_size=96, hidden_act=activation,
        )  # fmt: skip
        theirs = SiglipTextModel(config).eval()
        theirs.load_state_dict(_to_transformers(model.text.state_dict()), strict=False)
        same[activation] = normalize(theirs(input_ids=ids).pooler_output, dim=1)
    ours, _ = load(tmp_path)
    got = ours.encode_text(ids)
    assert (got - same["gelu"]).abs().max() < 1e-5 < (got - same["gelu_pytorch_tanh"]).abs().max()


def _to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's text tower under the names of transformers' SigLIP."""
    found = {"embeddings.token_embedding.weight": state["token_embedding.weight"]}
    found["embeddings.position_embedding.weight"] = state["positional_embedding"]
    renames = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    renames |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for key, value in state.items():
        if key.startswith("transformer.resblocks."):
            number, name = key.removeprefix("transformer.resblocks.").split(".", 1)
            if "in_proj" in name:
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    leaf = "weight" if name.endswith("weight") else "bias"
                    found[f"encoder.layers.{number}.self_attn.{part}_proj.{leaf}"] = rows
            else:
                stem, leaf = name.rsplit(".", 1)
                found[f"encoder.layers.{number}.{renames[stem]}.{leaf}"] = value
    for theirs, ours in (("ln_final", "final_layer_norm"), ("text_projection", "head")):
        found |= {f"{ours}.{leaf}": state[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")}
    return found
