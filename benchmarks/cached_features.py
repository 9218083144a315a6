"""Time of a training step with a frozen tower: run at every step, or its features read from the disk.

    python benchmarks/cached_features.py
    python benchmarks/cached_features.py --encoder siglip2_naflex --accelerator gpu --precision bf16

A tower of base size (12 layers of width 768, patch 16, random weights) at 224 px, or with a budget of 196 patches, and
a tiny decoder; `--images` pictures with `--questions` questions each. Both runs take the same steps, through
`vlm.train`. Per step the median of CPU time (on a GPU: of wall time), without the first step. The table goes to
stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import vlm
import vlm.train
from vlm.build.presets import tiny
from vlm.encoders import siglip, siglip2_naflex
from vlm.model.forward import VLM
from vlm.settings import from_dict
from vlm.train.features.encode import Encoding
from vlm.train.stage import Hooks

TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def make_start(encoder: str, folder: Path) -> Path:
    """A model directory with random weights."""
    small, processor = tiny(encoder, "gemma")
    values = small.config.to_dict()
    values["vision_config"] |= {**TOWER, "patch_size": 16, "image_size": 224, "num_patches": 196}
    config = type(small.config).from_dict(values)
    torch.manual_seed(0)
    vision: Any = config.vision_config
    if encoder == "siglip":
        processor.image_transform = siglip.transform(vision)
    else:
        processor.image_transform = siglip2_naflex.transform(vision, max_num_patches=196)
    return vlm.save(VLM(config), processor, folder)


def make_data(folder: Path, images: int, questions: int) -> Path:
    """Pictures of noise of about 320 x 240 px, and a training file."""
    folder.mkdir()
    source = np.random.default_rng(0)
    lines = []
    for i in range(images):
        size = (int(source.integers(160, 320)), int(source.integers(160, 420)), 3)
        Image.fromarray(source.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.jpg")
        lines += [{"image": f"{i}.jpg", "prefix": f"what is {q}?", "suffix": "a red square"} for q in range(questions)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


def measure(options: argparse.Namespace, folder: Path, cache: bool) -> dict[str, Any]:
    """Seconds per step, and of the encoding before the first."""
    clock = time.perf_counter if options.accelerator == "gpu" else time.process_time
    marks: list[float] = []
    encoding: list[float] = []
    end, encode = Hooks.on_train_batch_end, Encoding.run

    def marked(self: Hooks, *arguments: Any) -> None:
        end(self, *arguments)
        marks.append(clock())

    def timed(self: Encoding) -> Any:
        began = clock()
        store = encode(self)
        encoding.append(clock() - began)
        return store

    stage = {
        **{"name": "align", "module": "frozen_encoder", "train": {"projector": 1e-3, "decoder": 1e-3}},
        **{
            "steps": options.steps,
            "batch_size": options.batch,
            "precision": options.precision,
            "cache_features": cache,
        },
    }
    values = {
        **{"out": folder / str(cache), "model": {"path": folder / "start"}, "stages": [stage]},
        **{"data": {"train": folder / "data" / "train.jsonl"}, "accelerator": options.accelerator, "devices": 1},
        "workers": options.workers,
    }
    with patch.object(Hooks, "on_train_batch_end", marked), patch.object(Encoding, "run", timed):
        vlm.train.run(from_dict(vlm.train.RunConfig, values))
    steps = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    return {
        "step_s": statistics.median(steps),
        "least_s": min(steps),
        "most_s": max(steps),
        "encoding_s": sum(encoding),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=["siglip", "siglip2_naflex"], default="siglip")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_start(options.encoder, folder / "start")
        make_data(folder / "data", options.images, options.questions)
        for cache in (False, True):
            results["cached" if cache else "tower"] = measure(options, folder, cache)
            told = "".join(
                line + "\n"
                for line in (folder / str(cache) / "train.log").read_text().splitlines()
                if "features" in line or "encodes" in line
            )
            print(told, end="", file=sys.stderr)
    for kind, result in results.items():
        print(
            f"{kind:<8} {1e3 * result['step_s']:9.1f} ms a step, {result['encoding_s']:.1f} s before", file=sys.stderr
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
