"""What the common mistakes around SigLIP cost, measured on the package's own model and 300 held-out drawn scenes.

    vlm demo --task search --out scenes
    python benchmarks/siglip_mistakes.py scenes

Each way of reading texts is compared with the right one: the mean cosine between the two embeddings of a text (1 is no
change), and how many of 300 pictures are named right by their number of shapes. A table on stderr, JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm import siglip
from vlm.words import columns

LABELS = ("one shape", "two shapes", "three shapes")
Reads = Callable[[list[str]], Tensor]


def ways(model: Any, processor: Any) -> dict[str, Reads]:
    """Name -> texts to embeddings float32[N, D], the right way first."""
    tokenizer, context = processor.tokenizer, processor.context
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    text_model = model.model.text_model

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text.lower(), add_special_tokens=False)["input_ids"]
        return [*ids[: context - 1], end]

    def embedded(rows: list[list[int]], mask: Tensor | None = None) -> Tensor:
        found = text_model(input_ids=torch.tensor(rows), attention_mask=mask).pooler_output
        return normalize(found.float(), dim=-1)

    def right(texts: list[str]) -> Tensor:
        return siglip.encode_texts(model, processor, texts).vectors

    def padded_to_the_longest(texts: list[str]) -> Tensor:
        rows = [tokens(text) for text in texts]
        longest = max(map(len, rows))
        return embedded([row + [pad] * (longest - len(row)) for row in rows])

    def on_the_left(texts: list[str]) -> Tensor:
        return embedded([[pad] * (context - len(row)) + row for row in map(tokens, texts)])

    def masked(texts: list[str]) -> Tensor:
        rows = [row + [pad] * (context - len(row)) for row in map(tokens, texts)]
        return embedded(rows, torch.tensor([[int(token != pad) for token in row] for row in rows]))

    def capitals(texts: list[str]) -> Tensor:
        rows = [tokenizer(text.title(), add_special_tokens=False)["input_ids"][: context - 1] + [end] for text in texts]
        return embedded([row + [pad] * (context - len(row)) for row in rows])

    return {
        "right": right,
        "capitals not lower-cased": capitals,
        "padded to the longest text": padded_to_the_longest,
        "padded on the left": on_the_left,
        "attention mask given": masked,
    }


def measure(folder: Path) -> dict[str, Any]:
    """Every way of reading the labels, and of reading the logits."""
    model, processor = siglip.load("demo-siglip", dtype="float32")
    scenes = [json.loads(line) for line in (folder / "number.jsonl").read_text(encoding="utf-8").splitlines()]
    images = torch.cat(
        [
            found.vectors
            for found in siglip.encode_images(
                model, processor, [(i, folder / s["image"]) for i, s in enumerate(scenes)]
            )
        ]
    )
    truth = torch.tensor([LABELS.index(scene["label"]) for scene in scenes])
    found: dict[str, Any] = {}
    with torch.no_grad():
        wanted = None
        for name, read in ways(model, processor).items():
            vectors = read(list(LABELS))
            wanted = vectors if wanted is None else wanted
            right = (images @ vectors.T).argmax(1) == truth
            found[name] = {"cosine": float((vectors * wanted).sum(1).mean()), "accuracy": float(right.float().mean())}
        logits = model.logits(images, wanted)
        own = logits[torch.arange(len(truth)), truth]
        forgotten = torch.sigmoid(logits - model.bias)
        others = torch.ones_like(logits, dtype=torch.bool).scatter(1, truth[:, None], False)
        found["probabilities"] = {
            "of the right label": float(torch.sigmoid(own).mean()),
            "of a wrong label": float(torch.sigmoid(logits)[others].mean()),
            "of a wrong label, bias forgotten": float(forgotten[others].mean()),
            "cosine 0.1 at this scale and bias": float(torch.sigmoid(0.1 * model.scale + model.bias)),
            "cosine 0.1, bias forgotten": float(torch.sigmoid(0.1 * model.scale)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenes", type=Path, help="the folder of `vlm demo --task search`")
    found = measure(parser.parse_args().scenes)
    rows = [("texts read", "cosine with the right one", "pictures named right")]
    rows += [(n, f"{v['cosine']:.3f}", f"{v['accuracy']:.1%}") for n, v in found.items() if n != "probabilities"]
    print(columns(rows), file=sys.stderr)
    for name, value in found["probabilities"].items():
        print(f"probability {name}: {value:.4f}", file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
