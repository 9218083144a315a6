"""The checks in their order. A check is a function from the `Subject` to a `Finding`; a new one is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm.check import attention, decoding, embeddings, images, labels, padding, roundtrip, stage, texts, tower
from vlm.check.report import Finding
from vlm.check.subject import Subject


@dataclass(frozen=True)
class Check:
    """A check: its name on the command line, what should hold, the function that finds out, and whether it runs the
    vision tower (it says nothing where that one does not keep its contract)."""

    name: str
    title: str
    function: Callable[[Subject], Finding]
    runs_tower: bool = True


CHECKS: tuple[Check, ...] = (
    Check("tower", "the vision tower returns what its contract says", tower.contract, runs_tower=False),
    Check("patch-order", "features are in the order of the patches", tower.order),
    Check("tower-gradients", "a gradient reaches the pixels and every weight of the tower", tower.gradients),
    Check("future", "no token sees a later token of the suffix", attention.future),
    Check("prefix", "image and prefix attend to each other in both directions", attention.prefix),
    Check("image", "an image moves the logits of its own sample only", attention.image),
    Check("pad-content", "what lies under the padding is irrelevant", padding.content),
    Check("pad-side", "padding left and right give the same logits", padding.side),
    Check("batch-mates", "a sample's logits do not depend on the rest of its batch", padding.mates),
    Check("cache", "decoding with a cache equals decoding without", decoding.cache),
    Check("backends", "sdpa and eager attention agree", decoding.backends),
    Check("embedding-scale", "text enters the decoder times sqrt(width), image tokens unscaled", embeddings.scale),
    Check("tied-weights", "input and output embedding are one tensor", embeddings.tied, runs_tower=False),
    Check("special-text", "special tokens typed by a user stay text", texts.special, runs_tower=False),
    Check("image-tokens", "placeholders and image tokens are equal in number", images.tokens),
    Check("image-range", "pixels arrive in the tower's range and size", images.pixel_range, runs_tower=False),
    Check("stage", "the last stage trained what its manifest says, and nothing else", stage.manifest, runs_tower=False),
    Check("labels", "suffix and EOS are supervised, nothing else", labels.labels, runs_tower=False),
    Check("round-trip", "saved and loaded, the model is the same bit for bit", roundtrip.saved),
    Check("export", "exported to PaliGemma's format and loaded, the model is the same", roundtrip.exported),
)
