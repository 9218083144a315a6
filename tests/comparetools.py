"""A world for comparison tests: tiny towers of two kinds and a decoder on disk, pictures, test items, labelled images,
and the comparison's YAML."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml
from PIL import Image

COLORS = ("red", "green", "blue", "white")


def save_tower(kind: str, folder: Path, seed: int = 0) -> None:
    """A random tower, alone, as a checkpoint."""
    from safetensors.torch import save_file
    from torch import random

    from vlm.model.parts import encoder_spec

    module = encoder_spec(kind)
    config = module.tiny()
    with random.fork_rng():
        random.manual_seed(seed)
        tower = module.encoder._from_config(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    weights = {module.prefixes[0] + name: tensor.contiguous() for name, tensor in tower.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_decoder(folder: Path) -> None:
    """A tiny Gemma with its tokenizer."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    from vlm.build import presets
    from vlm.text import tokenizer

    words = tokenizer.build(presets.TINY_CORPUS * 20, vocab_size=400)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GemmaForCausalLM(GemmaConfig(**presets.tiny_decoder("gemma", vocab_size=448).to_dict()))
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def write_data(folder: Path, train: int = 16, test: int = 12) -> None:
    """Plain pictures of several sizes; two items to each test picture; labelled ones."""
    (folder / "images").mkdir(parents=True)
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "test": [], "labelled": [], "one_class": []}
    for number in range(train + test):
        color = COLORS[number % 4]
        image = f"images/{number}.png"
        Image.new("RGB", (28 + 4 * (number % 3), 28), color).save(folder / image)
        kind = "train" if number < train else "test"
        lines[kind].append({"id": f"{kind}{number}", "image": image, "prefix": "caption en", "suffix": f"a {color}"})
        if kind == "test":
            question = {"image": image, "prefix": "answer en what color is the square?", "suffix": color}
            lines[kind].append({"id": f"question{number}", **question})
        if color == COLORS[0]:
            lines["one_class"].append({"image": image, "label": color})
        lines["labelled"].append({"id": str(number), "image": image, "label": color})
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@cache
def world() -> Path:
    """A folder with `a`, `b` (towers), `gemma`, `data` and `compare.yaml`, made once per session."""
    folder = Path(mkdtemp(prefix="vlm-compare-tests-"))
    save_tower("siglip", folder / "a")
    save_tower("dinov2", folder / "b", seed=1)
    save_decoder(folder / "gemma")
    write_data(folder / "data")
    (folder / "compare.yaml").write_text(yaml.safe_dump(settings(), sort_keys=False))
    return folder


def settings(**changes: Any) -> dict[str, Any]:
    """What the YAML file holds."""
    stages = [
        {"name": "align", "module": "frozen_encoder", "train": {"projector": 1e-2}, "steps": 4, "batch_size": 4},
        {
            "name": "tune",
            "module": "full",
            "train": {"encoder": 1e-3, "projector": 1e-3, "decoder": 1e-3},
            "steps": 6,
            "batch_size": 4,
        },
    ]
    return {
        "seeds": [0, 1],
        "encoders": {"a": "a", "b": {"encoder": "b"}},
        "tasks": {"words": {"data": "data/test.jsonl", "max_new_tokens": 3, "batch_size": 24}},
        "probes": {"train": "data/labelled.jsonl", "test": "data/labelled.jsonl", "k": 3},
        "speed_images": 4,
        "run": {
            "model": {"decoder": "gemma"},
            "data": {"train": "data/train.jsonl"},
            "stages": stages,
            "accelerator": "cpu",
            "checkpoint_every": 2,
        },
        **changes,
    }
