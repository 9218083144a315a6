"""Parameter names: in memory ("live"), on the Hub, and what other versions of transformers have written in between.

Live names are those of transformers' PaliGemma in memory. The Hub's PaliGemma checkpoints, and the servers that read
them, use

    language_model.model.*         for    model.language_model.*
    language_model.lm_head.*              lm_head.*
    multi_modal_projector.*               model.multi_modal_projector.*
    vision_tower.vision_model.*           model.vision_tower.*

transformers 5 writes a freshly built model with `vision_tower.*`, and any model in memory order with a leading
`model.`; all of these are read.
"""

from __future__ import annotations

DECODER, PROJECTOR, TOWER = "model.language_model.", "model.multi_modal_projector.", "model.vision_tower."
HEAD, EMBEDDING = "lm_head.weight", DECODER + "embed_tokens.weight"
"""The output embedding and the input embedding: one tensor, as in every Gemma."""
_HUB = {DECODER: "language_model.model.", PROJECTOR: "multi_modal_projector.", TOWER: "vision_tower.vision_model."}
# Tried in order: the first prefix that fits gives the live one.
_READ = (
    ("language_model.model.", DECODER),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", DECODER),
    ("multi_modal_projector.", PROJECTOR),
    ("vision_tower.vision_model.", TOWER),
    ("vision_tower.", TOWER),
)


def to_live(name: str) -> str:
    """The live name of a checkpoint's parameter; a name of no known layout is returned as it is."""
    bare = name.removeprefix("model.")
    for written, live in _READ:
        if bare.startswith(written):
            return live + bare.removeprefix(written)
    return name


def to_hub(name: str) -> str:
    """The name that a live parameter has in PaliGemma checkpoints on the Hub.

    Raises:
        KeyError: not a live name.
    """
    if name == HEAD:
        return "language_model.lm_head.weight"
    for live, written in _HUB.items():
        if name.startswith(live):
            return written + name.removeprefix(live)
    raise KeyError(name)
