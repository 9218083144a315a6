"""Time of the NaFlex tower against transformers' Siglip2VisionModel on padded input, policy by policy.

    python benchmarks/naflex.py
    python benchmarks/naflex.py --device cuda --dtype bfloat16 --size so400m --batch 32 --repeats 20

Sizes of images are drawn: areas log-normal around 640 x 480 (sigma 1.1), a third upright. Both towers have the same
random weights and take turns on the same batches, padded to the budget as transformers' processor pads (`--pad
longest`: to the longest image of the batch, as ours does); the ratio is the median over the batches of (theirs / ours):
above 1 is faster. The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Siglip2VisionModel

from vlm.encoders.siglip2_naflex import Config, Encoder
from vlm.images.transforms import Policy, naflex_grid

SIZES: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "so400m": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
PATCH = 16
CASES: tuple[tuple[Policy, int], ...] = (("fill", 256), ("fill", 1024), ("native", 256), ("native", 1024))


def draw(count: int, seed: int) -> list[tuple[int, int]]:
    """(height, width) of `count` images."""
    source, sizes = random.Random(seed), []
    for _ in range(count):
        area, ratio = 640 * 480 * math.exp(source.gauss(0, 1.1)), source.choice((4 / 3, 4 / 3, 3 / 2, 16 / 9, 1.0))
        long, short = math.sqrt(area * ratio), math.sqrt(area / ratio)
        width, height = (short, long) if source.random() < 1 / 3 else (long, short)
        sizes.append((max(1, round(height)), max(1, round(width))))
    return sizes


def batch(sizes: list[tuple[int, int]], policy: Policy, budget: int, options: argparse.Namespace) -> dict[str, Tensor]:
    """A padded batch of noise: what a processor gives for images of these sizes."""
    shapes = torch.tensor([naflex_grid(height, width, PATCH, budget, policy) for height, width in sizes])
    lengths = shapes.prod(1)
    padded = budget if options.pad == "budget" else int(lengths.max())
    mask = (torch.arange(padded) < lengths[:, None]).long()
    values = (torch.randn(*mask.shape, 3 * PATCH**2) * mask[..., None]).to(getattr(torch, options.dtype))
    tensors = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {name: tensor.to(options.device) for name, tensor in tensors.items()}


@torch.no_grad()
def seconds(tower: torch.nn.Module, inputs: dict[str, Tensor], device: str) -> float:
    """Of one forward: of the whole device on a GPU, of this process on a CPU (others may be using the machine)."""
    if device == "cpu":
        began = time.process_time()
        tower(**inputs)
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    tower(**inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(ours: Encoder, theirs: Any, policy: Policy, budget: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: medians over `repeats` batches of `batch` images."""
    rows = []
    for repeat in range(options.repeats + 1):
        inputs = batch(draw(options.batch, repeat), policy, budget, options)
        pair = {}
        for name, tower in sorted({"ours": ours, "theirs": theirs}.items(), reverse=bool(repeat % 2)):
            pair[name] = seconds(tower, inputs, options.device) / options.batch
        real = inputs["pixel_attention_mask"].float()
        rows.append({**pair, "patches": float(real.sum(1).mean()), "padding": 1 - float(real.mean())})
    rows = rows[1:]  # the first warms up
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    ratios = sorted(row["theirs"] / row["ours"] for row in rows)
    return {
        "policy": policy,
        "budget": budget,
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        **middle,
    }


def main() -> None:
    """Print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--batch", type=int, default=4, help="images per batch (4)")
    parser.add_argument("--repeats", type=int, default=5, help="batches per row (5)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (1)")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--pad", choices=("budget", "longest"), default="budget")
    parser.add_argument("--policy", choices=("fill", "native"), help="only this one")
    parser.add_argument("--budget", type=int, choices=(256, 1024), help="only this one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = Config(**SIZES[options.size], patch_size=PATCH, num_patches=256, vision_use_head=False)
    config._attn_implementation = options.attention
    ours, theirs = Encoder(config).eval(), Siglip2VisionModel._from_config(config).eval()
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = (tower.to(options.device, getattr(torch, options.dtype)) for tower in (ours, theirs))
    print(f"{'policy':8}{'budget':>7}{'patches':>9}{'padding':>9}{'theirs':>11}{'ours':>11}   ratio", file=sys.stderr)
    results = []
    for policy, budget in CASES:
        if policy != (options.policy or policy) or budget != (options.budget or budget):
            continue
        row = measure(ours, theirs, policy, budget, options)
        results.append(row)
        times = f"{row['theirs'] * 1e3:8.1f} ms{row['ours'] * 1e3:8.1f} ms"
        spread = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        line = f"{policy:8}{budget:7}{row['patches']:9.0f}{row['padding']:9.1%}{times}   {spread}"
        print(line, file=sys.stderr, flush=True)
    report = {"options": vars(options), "torch": torch.__version__, "load": os.getloadavg(), "rows": results}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
