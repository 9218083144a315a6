"""Padding and time of a training step on images of mixed sizes: equal micro-batches against a budget of tokens.

    python benchmarks/token_budget.py
    python benchmarks/token_budget.py --device cuda --policy fill --steps 10

Sizes of images are drawn as in `naflex.py`, answers have 5 to 60 words. A step is forward and backward of a model
(tower 384 wide, decoder 512, `--layers` each) over the same images, cut once into `--accumulate` equal micro-batches in
the order drawn, once by the budget that equals the largest of those, so that both need the same memory. They take
turns, and the ratio is the median over the steps of (equal / budget): above 1 is faster. The table goes to stderr, JSON
to stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

import torch
from naflex import PATCH, draw
from PIL import Image

from vlm.build.presets import tiny
from vlm.data.budget import cut, padding
from vlm.encoders.siglip2_naflex import Config, transform
from vlm.model.batch import Batch
from vlm.model.forward import VLM
from vlm.model.processor import Processor

TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
DECODER = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "head_dim": 64,
}


def build(options: argparse.Namespace) -> tuple[VLM, Processor]:
    """The model with random weights, and its processor."""
    small, processor = tiny("siglip2_naflex", "gemma")
    values = small.config.to_dict()
    depth = {"num_hidden_layers": options.layers}
    values["vision_config"] |= {**TOWER, **depth, "patch_size": PATCH, "num_patches": 256}
    values["text_config"] |= {**DECODER, **depth}
    torch.manual_seed(0)
    model = VLM(type(small.config).from_dict(values)).train().to(options.device)
    vision: Any = Config(**TOWER, patch_size=PATCH)
    processor.image_transform = transform(vision, max_num_patches=options.patches, naflex=options.policy)
    return model, processor


def samples(step: int, options: argparse.Namespace) -> tuple[list[Image.Image], list[str]]:
    """Pictures and answers of one optimizer step."""
    source = random.Random(step)
    images = [Image.new("RGB", (width, height), (90, 120, 30)) for height, width in draw(options.batch, step)]
    return images, [" ".join(["a"] * source.randint(5, 60)) for _ in images]


def run(model: VLM, batches: list[Batch]) -> float:
    """Seconds of forward and backward over the micro-batches of a step."""
    on_gpu = model.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    model.zero_grad()
    began = clock()
    for batch in batches:
        model(**batch.to(model.device)).loss_sum.backward()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began


def measure(model: VLM, processor: Processor, options: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps; the first warms up."""
    rows = []
    for step in range(options.steps + 1):
        images, answers = samples(step, options)
        prompts = ["caption en"] * len(images)
        lengths = processor.lengths([[image.size] for image in images], prompts, answers)
        rows_each = len(images) // options.accumulate
        equal = [list(range(first, first + rows_each)) for first in range(0, len(images), rows_each)]
        budget = max(rows_each * max(lengths[i] for i in places) for places in equal)
        plans = {"equal": equal, "budget": cut(lengths, budget)}
        row: dict[str, float] = {"batch_tokens": budget}
        for name in sorted(plans, reverse=bool(step % 2)):
            batches = [
                processor([images[i] for i in places], [prompts[i] for i in places], [answers[i] for i in places])
                for places in plans[name]
            ]
            row[f"{name}_seconds_per_image"] = run(model, batches) / len(images)
            row[f"{name}_padding"] = padding(lengths, plans[name]).share
            row[f"{name}_micro_batches"] = len(batches)
        row["ratio"] = row["equal_seconds_per_image"] / row["budget_seconds_per_image"]
        rows.append(row)
    middle = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    ratios = [row["ratio"] for row in rows[1:]]
    return {**middle, "least": min(ratios), "most": max(ratios)}


def main() -> None:
    """Print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--policy", choices=("fill", "native"), default="native")
    parser.add_argument("--patches", type=int, default=256, help="patch budget of an image (256)")
    parser.add_argument("--batch", type=int, default=32, help="images per step (32)")
    parser.add_argument("--accumulate", type=int, default=4, help="equal micro-batches per step (4)")
    parser.add_argument("--layers", type=int, default=6, help="of tower and decoder (6)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed (5)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(*build(options), options)
    for name, value in found.items():
        print(f"{name:28} {value:.4g}", file=sys.stderr)
    print(json.dumps({**vars(options), **found}))


if __name__ == "__main__":
    main()
