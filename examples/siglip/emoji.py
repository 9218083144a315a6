"""Search and zero-shot classification in several languages, on real pictures: emoji drawn by two artists.

    python examples/siglip/emoji.py emoji.zip --out emoji

The archive holds 1,906 concepts, each drawn by two hands (Noto, Twemoji) and named in twelve languages. A small SigLIP
with new weights learns from one hand's drawings and their names, in a plain training loop of one's own: minutes on two
cores. Then the other hand's drawings, which it has never seen, are searched by text in every language and classified
into groups whose names it was never told. What it writes is a checkpoint like any other:

    vlm search vectors "a red apple" "perro" --model emoji/model

A released SigLIP 2 knows 109 languages and needs no training: give it with --model instead.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import SiglipConfig

from vlm import siglip
from vlm.images import ImageTransform, load_image
from vlm.text.tokenizer import build as build_tokenizer

LANGUAGES = ("en", "de", "es", "fr", "it", "pt", "ru", "ja", "zh", "ar", "hi", "sw")
SIZE, PATCH, CONTEXT = 64, 8, 24
GROUPS = {
    "Smileys & Emotion": "a face",
    "People & Body": "a person",
    "Animals & Nature": "an animal",
    "Food & Drink": "food",
    "Travel & Places": "a vehicle or a building",
    "Activities": "a game or a sport",
    "Objects": "an object",
    "Symbols": "a sign",
    "Flags": "a flag",
}
"""The groups of the data, and what a person would call them."""


def unpack(archive: Path, folder: Path) -> list[dict[str, Any]]:
    """The records, their images below `folder`."""
    with zipfile.ZipFile(archive) as source:
        source.extractall(folder)
    lines = (folder / "emoji.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def new_model(texts: Sequence[str]) -> tuple[siglip.DualTower, siglip.DualProcessor]:
    """A small SigLIP with new weights; it reads text as SigLIP 2 does, with a vocabulary made of `texts`."""
    tokenizer = build_tokenizer([text.lower() for text in texts], vocab_size=4000, loc_seg=False)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    config = SiglipConfig(
        vision_config={**shape, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH},
        text_config={
            **shape,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT,
            "projection_size": 128,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
    )
    model = siglip.DualTower(config, family="siglip2")
    # transformers begins both at 0; the paper's values are these.
    torch.nn.init.constant_(model.model.logit_scale, math.log(10))
    torch.nn.init.constant_(model.model.logit_bias, -10.0)
    transform = ImageTransform(mode="squash", image_size=SIZE, patch_size=PATCH, resample="bilinear")
    return model, siglip.DualProcessor(transform, tokenizer, siglip.RULES["siglip2"], CONTEXT)


def texts_of(record: dict[str, Any]) -> list[str]:
    """Its names, and its keywords three at a time."""
    names = [record["names"][language] for language in LANGUAGES]
    return names + [" ".join(record["keywords"][language][:3]) for language in LANGUAGES]


def train(
    model: siglip.DualTower,
    processor: siglip.DualProcessor,
    records: Sequence[dict[str, Any]],
    folder: Path,
    *,
    steps: int,
    batch: int = 128,
) -> None:
    """The sigmoid loss on pairs of a drawing and one of its texts, each in a language drawn anew."""
    rng = random.Random(0)
    opened = [load_image(folder / record["images"]["noto"]) for record in records]
    pixels = torch.cat([processor.images([image])["pixel_values"] for image in opened])
    ids = [processor.texts(texts_of(record)).input_ids for record in records]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        chosen = rng.sample(range(len(records)), min(batch, len(records)))
        shown = moved(pixels[chosen], rng)
        read = torch.stack([rng.choice(list(ids[number])) for number in chosen])
        loss = model.loss(model.encode_image(shown), model.encode_text(read))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def moved(pixels: Tensor, rng: random.Random) -> Tensor:
    """Drawings shifted by a few pixels, brighter or darker: the other hand draws neither here nor in these colours."""
    shift = (rng.randint(-4, 4), rng.randint(-4, 4))
    gain = 1 + 0.2 * torch.randn(len(pixels), 3, 1, 1)
    return (pixels.roll(shift, (2, 3)) * gain + 0.1 * torch.randn(len(pixels), 3, 1, 1)).clamp(-1, 1)


def embed(
    model: siglip.DualTower, processor: siglip.DualProcessor, records: Sequence[dict[str, Any]], folder: Path, hand: str
) -> Tensor:
    """float32[N, D] of one hand's drawings."""
    images = [(record["id"], folder / record["images"][hand]) for record in records]
    return torch.cat([found.vectors for found in siglip.encode_images(model, processor, images)])


def recall(scores: Tensor, k: int) -> float:
    """Share of the rows whose own column is among their k highest."""
    own = scores.diagonal()[:, None]
    return float(((scores > own).sum(1) < k).float().mean())


def report(
    model: siglip.DualTower, processor: siglip.DualProcessor, records: Sequence[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """Search by name in every language, and the groups as zero-shot classes, on the drawings of the other hand."""
    images = embed(model, processor, records, folder, "twemoji")
    found: dict[str, Any] = {"drawings": len(records), "R@1": {}, "R@5": {}}
    for language in LANGUAGES:
        texts = siglip.encode_texts(model, processor, [record["names"][language] for record in records]).vectors
        scores = texts @ images.T
        found["R@1"][language], found["R@5"][language] = recall(scores, 1), recall(scores, 5)
    classes = siglip.encode_texts(model, processor, list(GROUPS.values())).vectors
    chosen = (images @ classes.T).argmax(1).tolist()
    groups = list(GROUPS)
    right = [groups[number] == record["group"] for number, record in zip(chosen, records, strict=True)]
    return {**found, "group accuracy": sum(right) / len(right), "group chance": 1 / len(groups)}


def show(title: str, found: dict[str, Any]) -> None:
    """Print what `report` found."""
    print(f"\n{title}: {found['drawings']} drawings of the other hand; chance R@1 {1 / found['drawings']:.2%}")
    for language in LANGUAGES:
        print(f"  {language}   R@1 {found['R@1'][language]:6.1%}   R@5 {found['R@5'][language]:6.1%}")
    print(f"  zero-shot groups {found['group accuracy']:.1%} (chance {found['group chance']:.1%})")


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train or open a model, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--out", type=Path, default=Path("emoji"))
    parser.add_argument("--model", help="a released SigLIP instead of a new one")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--most", type=int, help="so many concepts only")
    given = parser.parse_args(words)
    torch.manual_seed(0)
    records = unpack(given.archive, given.out)[: given.most]
    seen = [record for record in records if record["split"] == "train"]
    unseen = [record for record in records if record["split"] == "test"]
    if given.model:
        model, processor = siglip.load(given.model)
    else:
        model, processor = new_model([text for record in seen for text in texts_of(record)])
        train(model, processor, seen, given.out, steps=given.steps)
        siglip.save(model.eval(), processor, given.out / "model")
        model, processor = siglip.load(given.out / "model")
    found = {"seen": report(model, processor, seen, given.out), "unseen": report(model, processor, unseen, given.out)}
    show("concepts whose other drawing was trained on", found["seen"])
    show("concepts never seen", found["unseen"])
    return found


if __name__ == "__main__":
    main()
