"""Pictures a second of `vlm embed`, beside a plain loop over transformers on the same tower, and what the tower allows.

    python benchmarks/embed.py
    python benchmarks/embed.py --pictures 1000 --layers 12 --device cuda --threads 16

JPEGs of 640x480 px (noise over gradients) go through a random SigLIP tower of base width, the ways in turns:

    vlm embed    as the command does it: files -> decoding ahead -> tower -> a folder of vectors that survives a kill
    plain loop   files -> Image.open -> transformers' processor -> get_image_features, one batch after the other
    tower alone  pixels that are in memory already: the most that any input could give
    input alone  decoding and resizing without a tower, as `vlm embed` has it: the most that any tower could take

On a CPU all share its cores: the tower gets `--threads`, decoding `--decoders`. The vectors of the first two are
compared. The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, SiglipConfig, SiglipImageProcessor, SiglipModel

from vlm.data.collection import entries_of, gathered
from vlm.siglip import VectorStore, VectorWriter, embedding, load, space
from vlm.siglip.encode import read_ahead
from vlm.words import columns

WAYS = ("vlm embed", "plain loop", "tower alone", "input alone")


def draw(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """JPEGs like photographs to a decoder: smooth parts and noise, about 60 kB each."""
    random = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    names = []
    for number in range(count):
        mixed = np.stack([np.roll(plane, number * 7, axis=1) for plane in (x, y, (x + y) / 2)], axis=-1)
        pixels = np.clip(mixed + random.normal(0, 8, mixed.shape), 0, 255).astype(np.uint8)
        names.append(str(folder / f"{number:05d}.jpg"))
        Image.fromarray(pixels).save(names[-1], quality=85)
    return names


def tower(folder: Path, layers: int) -> Path:
    """A random SigLIP of base width, patch 16, 224 px."""
    torch.manual_seed(0)
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {**wide, "num_hidden_layers": layers, "image_size": 224, "patch_size": 16}
    text = {"hidden_size": 768, "intermediate_size": 64, "num_attention_heads": 12, "num_hidden_layers": 1}
    SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 100})).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)
    return folder


class Bench:
    """The four ways over the same files."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._options, self._folder = options, folder
        place = tower(folder / "tower", options.layers)
        self._model, self._processor = load(place, device=options.device)
        self._theirs = SiglipModel.from_pretrained(place).eval().to(options.device)
        self._their_processor = AutoImageProcessor.from_pretrained(place)
        self._space = space.of(self._model, self._processor)
        self.vectors: dict[str, list[Tensor]] = {way: [] for way in WAYS}

    def embed(self, files: Sequence[str]) -> None:
        entries, problems = gathered(entries_of(files))
        with VectorWriter(self._folder / "vectors", self._space, "images") as writer:
            plan = embedding.plan(entries, files, writer)
            how = {"batch_size": self._options.batch_size, "decoders": self._options.decoders}
            embedding.carry_out(plan, problems, writer, embedding.of_images(self._model, self._processor, **how))

    @torch.no_grad()
    def plain(self, files: Sequence[str]) -> None:
        for batch in self._batches(files):
            images = [Image.open(file).convert("RGB") for file in batch]
            inputs = self._their_processor(images=images, return_tensors="pt").to(self._options.device)
            features = self._theirs.get_image_features(**inputs).pooler_output
            self.vectors["plain loop"].append(torch.nn.functional.normalize(features, dim=-1).cpu())

    def decoded(self, files: Sequence[str]) -> list[dict[str, Tensor]]:
        images = [(file, file) for file in files]
        size = self._options.batch_size
        return [inputs for _, inputs, _ in read_ahead(self._processor, images, batch_size=size)]

    @torch.no_grad()
    def bound(self, batches: Sequence[dict[str, Tensor]]) -> None:
        for inputs in batches:
            self._model.encode_image(**{name: value.to(self._options.device) for name, value in inputs.items()}).cpu()

    def read(self, files: Sequence[str]) -> None:
        how = {"batch_size": self._options.batch_size, "decoders": self._options.decoders}
        for _ in read_ahead(self._processor, [(file, file) for file in files], **how):
            pass

    def _batches(self, files: Sequence[str]) -> list[Sequence[str]]:
        size = self._options.batch_size
        return [files[start : start + size] for start in range(0, len(files), size)]


def timed(call: Callable[[Any], None], given: Any) -> tuple[float, float]:
    """Seconds on the clock, and of this process on all cores."""
    clock, cores = time.perf_counter(), time.process_time()
    call(given)
    return time.perf_counter() - clock, time.process_time() - cores


def measure(bench: Bench, files: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Way -> [seconds, core seconds], each round with another part of the files and another way first."""
    calls = dict(zip(WAYS, (bench.embed, bench.plain, bench.bound, bench.read), strict=True))
    total = {way: [0.0, 0.0] for way in WAYS}
    part = len(files) // rounds
    for number in range(rounds):
        chunk = files[number * part : (number + 1) * part]
        pixels = bench.decoded(chunk)
        first = number % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            clock, cores = timed(calls[way], pixels if way == "tower alone" else chunk)
            total[way][0] += clock
            total[way][1] += cores
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1), help="of the tower")
    parser.add_argument("--decoders", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "p").mkdir()
        count = options.pictures // (options.rounds * options.batch_size) * options.rounds * options.batch_size
        files = draw(folder / "p", count + options.batch_size, (640, 480))
        bench = Bench(folder, options)
        warm = files[count:]
        for call, given in ((bench.plain, warm), (bench.bound, bench.decoded(warm))):
            call(given)
        bench.vectors["plain loop"].clear()
        total = measure(bench, files[:count], options.rounds)
        ours, theirs = torch.cat(VectorStore.open(folder / "vectors").shards), torch.cat(bench.vectors["plain loop"])
        apart = float((ours - theirs).abs().max())
        kilobytes = sum(os.path.getsize(file) for file in files) / len(files) / 1000
    rates = {way: count / seconds for way, (seconds, _) in total.items()}
    rows = [["", "pictures/s", "core s/picture", "of the tower alone"]]
    for way in WAYS:
        share = f"{rates[way] / rates['tower alone']:.0%}"
        rows.append([way, f"{rates[way]:.1f}", f"{total[way][1] / count:.4f}", share])
    print(columns(rows), file=sys.stderr)
    print(f"largest difference between vectors of `vlm embed` and of the plain loop: {apart:.1e}", file=sys.stderr)
    result = {"pictures": count, "kilobytes_each": round(kilobytes, 1), **vars(options), "per_second": rates}
    print(
        json.dumps(
            {**result, "core_seconds": {way: cores / count for way, (_, cores) in total.items()}, "apart": apart}
        )
    )


if __name__ == "__main__":
    main()
