"""What a model with two towers consists of: parts, text rule, image transform, and how a cosine becomes a
probability."""

from __future__ import annotations

import math
from typing import Any

from vlm.model.dual import DualTower
from vlm.siglip.open_clip_texts import OpenClipProcessor
from vlm.siglip.processor import DualProcessor
from vlm.siglip.tokens import contradictions, notes
from vlm.words import aligned, megabytes

TOWERS = {"vision_model": "image tower", "visual": "image tower", "logit": "scale and bias"}
"""Start of a parameter's name -> its part; whatever else there is belongs to the text tower."""
HEADS = {
    "vision_model.head": "image head",
    "text_model.head": "text head",
    "visual_projection": "image head",
    "text_projection": "text head",
}
"""What makes one embedding of a tower's output: attention pooling and projections."""
PARTS = ("image tower", "image head", "text tower", "text head", "scale and bias")
EXAMPLE = "A Photo of a Cat."
COSINE = 0.1
"""Of an image and its text in a released SigLIP, roughly."""


def describe(model: DualTower, processor: DualProcessor) -> dict[str, Any]:
    """Facts about a model with two towers, as JSON values."""
    parts = {name: {"parameters": 0, "bytes": 0} for name in PARTS}
    for name, parameter in model.model.named_parameters():
        own = parts[part_of(name)]
        own["parameters"] += parameter.numel()
        own["bytes"] += parameter.numel() * parameter.element_size()
    total = sum(own["parameters"] for own in parts.values())
    heads = sum(own["parameters"] for name, own in parts.items() if name in HEADS.values())
    return {
        "kind": model.kind,
        "family": model.family,
        "parts": parts,
        "parameters": total,
        "parameters_without_heads": total - heads,
        "bytes": sum(own["bytes"] for own in parts.values()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "embedding": model.embedding_size,
        "image": processor.transform.describe(),
        "text": _text(processor),
        "logits": _logits(model),
    }


def part_of(name: str) -> str:
    """Part that a parameter belongs to, by its name in the library's model."""
    for table in (HEADS, TOWERS):
        for start, part in table.items():
            if name.startswith(start):
                return part
    return "text tower"


def _text(processor: DualProcessor) -> dict[str, Any]:
    rule, rows = processor.rule, processor.vocabulary or 0
    facts: dict[str, Any] = {
        "rule": rule.title,
        "case": rule.case,
        "punctuation": rule.punctuation,
        "tokens": rule.tokens,
        "context": processor.context,
        "mask": rule.mask,
        "pooled": rule.pooled,
        "vocabulary": rows,
        "example": [EXAMPLE, rule.clean(EXAMPLE)],
        "contradictions": [],
        "notes": ["no tokenizer: images only"],
    }
    if isinstance(processor, OpenClipProcessor):
        facts["notes"] = ["as open_clip has it, held against the rule when it was opened"]
    elif processor.tokenizer is not None:
        facts["contradictions"] = contradictions(processor.tokenizer, rule, processor.context, rows)
        facts["notes"] = notes(processor.tokenizer, rule)
    return facts


def _logits(model: DualTower) -> dict[str, Any]:
    """A cosine of 0.1 among two texts, the other at 0, so that a softmax has something to choose from."""
    scale = model.scale.item()
    bias = None if model.bias is None else model.bias.item()
    facts = {"objective": model.trained_with, "scale": scale, "bias": bias, "cosine": COSINE}
    if bias is None:
        return {**facts, "probability": _sigmoid(scale * COSINE)}
    return {**facts, "probability": _sigmoid(scale * COSINE + bias), "without_bias": _sigmoid(scale * COSINE)}


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def table(facts: dict[str, Any]) -> str:
    """The facts as aligned text."""
    rows = [("part", "parameters", "size")]
    rows += [(name, f"{own['parameters']:,}", megabytes(own["bytes"])) for name, own in facts["parts"].items()]
    rows.append(("total", f"{facts['parameters']:,}", megabytes(facts["bytes"])))
    rows.append(("without heads", f"{facts['parameters_without_heads']:,}", ""))
    text, logits = facts["text"], facts["logits"]
    told = [
        ("family", f"{facts['family']} ({facts['kind']}), embeddings of {facts['embedding']}, {facts['dtype']}"),
        ("image", facts["image"]),
        ("text", f"{text['rule']}: {text['case']} case, punctuation {text['punctuation']}"),
        ("", f"{text['tokens']}, {text['context']} positions, mask {text['mask']}, vocabulary {text['vocabulary']:,}"),
        ("", f"embedding: {text['pooled']}"),
        ("", "{!r} is read as {!r}".format(*text["example"])),
        *(("", f"tokenizer {note}") for note in text["notes"]),
        *(("", f"contradiction: {one}") for one in text["contradictions"]),
        ("logit", _formula(logits)),
    ]
    return "\n".join([*aligned(rows, left=(0,)), "", *aligned(told)])


def _formula(logits: dict[str, Any]) -> str:
    scale, bias, cosine = logits["scale"], logits["bias"], logits["cosine"]
    if bias is None:
        return (
            f"{scale:.4g} x cosine, softmax over the texts: {logits['probability']:.3g} where one text has cosine"
            f" {cosine:g} and the only other 0"
        )
    return (
        f"{scale:.4g} x cosine {bias:+.4g}, sigmoid: cosine {cosine:g} is {logits['probability']:.3g}"
        f" (with the bias forgotten {logits['without_bias']:.5g})"
    )
