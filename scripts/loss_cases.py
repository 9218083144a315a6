"""The small runs of `compare_losses.py`: command lines, YAML and drawn data. Nothing here knows a module of `vlm`."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece
import yaml
from PIL import Image, ImageDraw

INPUTS = "@INPUTS@"
"""Stands for the folder of `write_inputs` in commands and files."""

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = {**TOWER, "image_size": 28, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", **SQUARE, "vision_use_head": False}
NAFLEX = {**TOWER, "model_type": "siglip2_vision_model", "patch_size": 14, "num_patches": 16, "vision_use_head": False}
DINOV3 = {"model_type": "dinov3_vit", **TOWER, "image_size": 32, "patch_size": 16, "num_register_tokens": 2}
VIT = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "reg_tokens": 2}
VISUAL = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}
ENCODERS: dict[str, Any] = {
    "siglip": SIGLIP,
    "siglip2_naflex": NAFLEX,
    "clip": {"model_type": "clip_vision_model", **SQUARE},
    "dinov2": {"model_type": "dinov2_with_registers", **SQUARE, "mlp_ratio": 2, "num_register_tokens": 2},
    "dinov3": DINOV3,
    "fused": [SIGLIP, DINOV3],
}
if find_spec("timm"):
    args = {"architecture": "vit_tiny_patch16_224", "model_args": VIT, "image_size": 28}
    ENCODERS["timm"] = {"model_type": "vlm_timm", **args}
if find_spec("open_clip"):
    ENCODERS["open_clip"] = {"model_type": "vlm_open_clip", "vision_cfg": VISUAL, "embed_dim": 32}
BLOCKS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
DECODER: dict[str, Any] = {**BLOCKS, "num_key_value_heads": 1, "max_position_embeddings": 512, "vocab_size": 4}
DECODER |= {"attention_dropout": 0.1, "initializer_range": 0.1}  # the draws of dropout count too
WINDOW = {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 8}
LAYERS = ["sliding_attention", "full_attention"]
DECODERS: dict[str, dict[str, Any]] = {
    "gemma": {"model_type": "gemma", **DECODER},
    "gemma2": {"model_type": "gemma2", **WINDOW},
    "gemma3": {"model_type": "gemma3_text", **WINDOW, "layer_types": LAYERS},
}
PROJECTORS: list[Any] = [
    "identity",
    {"kind": "mlp", "depth": 3},
    {"kind": "pixel_shuffle", "factor": 2},
    {"kind": "pool", "factor": 2},
    {"kind": "resampler", "queries": 3, "depth": 1, "heads": 4},
]
SOME = {"projector": 0.3, "decoder": 2e-2}
"""Steep, so that captions differ from image to image after a few steps."""
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 210, 40)}


@dataclass
class Case:
    """`commands` are the words after `vlm`, run in a folder with `files`."""

    name: str
    commands: list[list[str]]
    files: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def cases(steps: int, demo: bool) -> list[Case]:
    """Every tower with every decoder, every projector with both SigLIP towers, and each thing that a stage can do."""
    found = [case(f"{e}-{d}", model(e, d), steps=steps) for e in ENCODERS for d in DECODERS]
    found += [projected(tower, projector, steps) for tower in ("siglip", "siglip2_naflex") for projector in PROJECTORS]
    found += [*of_stages(steps), *of_models(steps)]
    return [*found, Case("demo", [["demo", "--out", "demo"], caption("demo/model")])] if demo else found


def projected(tower: str, projector: Any, steps: int) -> Case:
    kind = projector if isinstance(projector, str) else projector["kind"]
    return case(f"{tower}-{kind}", model(tower, "gemma3", projector=projector), steps=steps)


def of_stages(steps: int) -> Iterator[Case]:
    """What a stage and the data can be told."""
    siglip, naflex = model("siglip", "gemma"), model("siglip2_naflex", "gemma2")
    yield case("bf16", siglip, both={"precision": "bf16"}, steps=steps)
    yield case("batch-tokens", siglip, full={"accumulate": 1, "batch_tokens": 60}, steps=steps)
    yield case("batch-tokens-naflex", naflex, full={"accumulate": 1, "batch_tokens": 60}, steps=steps)
    yield case("cached-features", siglip, frozen={"cache_features": True}, steps=steps)
    yield case("cached-features-naflex", naflex, frozen={"cache_features": True}, steps=steps)
    yield case("augment", siglip, both={"augment": ["crop", "hflip", "brightness"]}, steps=steps)
    yield case("cosine", siglip, both={"schedule": "cosine", "weight_decay": 0.1}, steps=steps)
    linear = {"schedule": "linear", "final": 0.2, "clip_norm": None}
    rsqrt = {"schedule": "rsqrt", "timescale": 5.0, "warmup": 3, "betas": [0.8, 0.9]}
    yield case("linear-rsqrt", siglip, frozen=linear, full=rsqrt, steps=steps)
    yield case("cut-texts", siglip, both={"max_text_length": 14}, steps=steps)
    yield case("patch-budgets", naflex, data={"max_num_patches": [4, 9, 16]}, steps=steps)
    mixture = [{"path": f"{INPUTS}/train.jsonl"}, {"path": f"{INPUTS}/val.jsonl", "repeat": 2.5}]
    yield case("mixture", siglip, data={"train": mixture}, seed=3, steps=steps)
    asked = {"data": f"{INPUTS}/val.jsonl", "metrics": ["exact_match", "cider"], "max_new_tokens": 8}
    scored: dict[str, Any] = {"evaluate": asked, "evaluate_every": 5, "validate_every": 4}
    yield case("held-out", siglip, data={"val": f"{INPUTS}/val.jsonl"}, **scored, steps=steps)
    longer = [*counts(steps), f"stages.1.steps={steps + 5}"]
    more = ["train", "--config", "run.yaml", "--resume", "--accept-changes", "--set", *longer]
    yield case("resume", siglip, after=[more], checkpoint_every=4, steps=steps)


def of_models(steps: int) -> Iterator[Case]:
    """How a model is built, changed, exported and taken apart."""
    yield case("layers", model("siglip", "gemma", layer=[-1, -2]), steps=steps)
    yield case("softcap-in-loss", model("siglip", "gemma2", softcap_in_loss=True), steps=steps)
    yield case("image-size", model("siglip", "gemma3"), full={"image_size": 56, "projector": "pool"}, steps=steps)
    wide = {"encoder_kind": "siglip2_naflex", "image": {"max_num_patches": 12}}
    yield case("to-naflex", model("siglip", "gemma"), full=wide, steps=steps)
    for decoder in ("gemma", "gemma2"):
        mixed = ["--encoder", "exported", "--decoder", "run/model", "--projector", "mlp", "--image-size", "42"]
        built = [
            ["new", "--encoder", "run/model", "--decoder", "run/model", "--out", "new", "--seed", "5"],
            ["export", "new", "--to", "paligemma", "--out", "exported"],
            ["new", *mixed, "--out", "mixed"],
            ["new", "--from", "run/model", "--image-size", "56", "--out", "larger"],
            [*caption("larger"), "--num-beams", "2"],
            ["train", "--config", "run.yaml", "--set", "out=again", "model={path: mixed}", *counts(steps)],
        ]
        yield case(f"parts-{decoder}", model("siglip", decoder), after=built, steps=steps)


def model(encoder: str, decoder: str, **changes: Any) -> dict[str, Any]:
    """The `model` of a run: new weights, the tokenizer of the inputs."""
    budget = {"image": {"max_num_patches": 16}} if encoder == "siglip2_naflex" else {}
    parts = {"encoder": ENCODERS[encoder], "decoder": DECODERS[decoder], "tokenizer": f"{INPUTS}/gemma.model"}
    return {**parts, "projector": "linear", **budget, **changes}


def case(
    name: str,
    model: dict[str, Any],
    *,
    steps: int,
    frozen: dict[str, Any] | None = None,
    full: dict[str, Any] | None = None,
    both: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    after: list[list[str]] | None = None,
    **run: Any,
) -> Case:
    """A frozen stage with the `token` reduction, a full one with `example` and two micro-batches, then captions."""
    some = {part: rate for part, rate in SOME.items() if part != "projector" or model["projector"] != "identity"}
    common = {"schedule": "constant", "steps": 1, **(both or {})}
    stages = [
        {"name": "align", "module": "frozen_encoder", "train": some, "batch_size": 4} | common | (frozen or {}),
        {"name": "tune", "module": "full", "train": {"encoder": 3e-3, **some}, "batch_size": 8, "accumulate": 2}
        | {"loss_reduction": "example", **common}
        | (full or {}),
    ]
    whole = {"out": "run", "model": model, "data": {"train": f"{INPUTS}/train.jsonl", **(data or {})}, "stages": stages}
    text = yaml.safe_dump({**whole, "accelerator": "cpu", **run}, sort_keys=False)
    commands = [["train", "--config", "run.yaml", "--set", *counts(steps)], *(after or []), caption("run/model")]
    return Case(name, commands, {"run.yaml": text})


def counts(steps: int) -> list[str]:
    return [f"stages.0.steps={steps}", f"stages.1.steps={steps}"]


def caption(folder: str) -> list[str]:
    pictures = [f"{INPUTS}/images/{number:02d}.png" for number in range(4)]
    return ["caption", *pictures, "--model", folder, "--json", "--device", "cpu", "--max-new-tokens", "16"]


# --- the inputs of all runs -------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> None:
    """Pictures of one shape each, texts about them (captions, questions, boxes; one, two or no images), a tokenizer."""
    (folder / "images").mkdir(parents=True)
    lines = [line for number in range(20) for line in _scene(folder, number)]
    lines += [{"image": [], "prefix": "answer en how many?", "suffix": str(number)} for number in range(3)]
    _tokenizer(folder / "gemma.model", [line[key] for line in lines for key in ("prefix", "suffix")])
    for line in lines:
        line["images"] = line.pop("image")
    for name, part in (("train", lines[8:]), ("val", lines[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))


def _scene(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """Picture `number`, and three lines about it."""
    color, shape = list(COLORS)[number % 4], ("square", "circle", "triangle")[number % 3]
    width, height = 28 + 7 * (number % 5), 28 + 5 * (number % 7)
    left, top, side = 2 + number % 9, 3 + number % 6, 14
    picture = Image.new("RGB", (width, height), (250 - 9 * number, 240, 200 + 2 * number))
    draw, box = ImageDraw.Draw(picture), (left, top, left + side, top + side)
    if shape == "triangle":
        draw.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], COLORS[color])
    else:
        (draw.rectangle if shape == "square" else draw.ellipse)(box, COLORS[color])
    name = f"images/{number:02d}.png"
    picture.save(folder / name)
    places = [top / height, left / width, (top + side) / height, (left + side) / width]
    found = "".join(f"<loc{round(1023 * place):04d}>" for place in places)
    yield {"image": [name], "prefix": "caption en", "suffix": f"a {color} {shape}"}
    yield {"image": [name], "prefix": f"detect {shape}", "suffix": f"{found} {shape}"}
    before = [f"images/{number - 1:02d}.png"] if number % 4 == 3 else []
    yield {"image": [*before, name], "prefix": "answer en what color is the shape?", "suffix": color}


def _tokenizer(path: Path, texts: list[str]) -> None:
    """A sentencepiece model laid out as Gemma's."""
    names: dict[str, Any] = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"}
    ids: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    kept: dict[str, Any] = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
    kept |= {"add_dummy_prefix": False, "normalization_rule_name": "identity", "split_digits": True}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,  # as a file it would hold its own path
        model_type="bpe",
        vocab_size=360,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["<mask>", "\n", "\n\n", "\t"],
        num_threads=1,
        minloglevel=2,
        **{**names, **ids, **kept},
    )
    path.write_bytes(model.getvalue())
