"""The package's SigLIP with both towers: one embedding for a picture, one for what people type about it.

The vision tower goes on from the demo's SigLIP (`vlm.demo.towers`), the text tower is new. The loss is the sigmoid loss
(arXiv 2303.15343, algorithm 1, t' = log 10 and b = -10 at the start) with z = 1 wherever the text is true of the
picture, not only where it was written for it: the world is small, and "a red star" is true of many pictures. So a
probability is that of the text being true. Pictures come in groups that differ in one change, each with texts of its
own: what differs in one word, one relation or one number is in every batch.

Text as SigLIP 2 reads it: lower case, no BOS, EOS, padding on the right to the whole context, no mask.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from vlm.demo import queries, scenes, towers
from vlm.demo.learning import MOST_THINGS, Words, complete, fit, pad, save
from vlm.demo.queries import Query, Said
from vlm.files import publishing
from vlm.text import tokenizer as tokenizers

CONTEXT = 32
"""Text positions: three things with size and place, and EOS."""
TEXTS = 2
"""For each picture."""


_MIXED = (*scenes.CHANGES, scenes.MIX, scenes.MIX)


NAMES = [Query(f"a {colour} {shape}", (Said(None, colour, shape),)) for colour, shape in scenes.PAIRS]


@dataclass(frozen=True)
class Part:
    """A part of the training: `steps` of batches of `groups` of pictures, in each of which all but one differ from that
    one in one of `changes`. `names`: the texts are "a red circle" and the like, all of them, and no others."""

    steps: int
    groups: int
    alike: int
    changes: tuple[str, ...] = scenes.CHANGES
    names: bool = False


PARTS = (
    Part(700, 64, 2),
    Part(900, 10, 8, _MIXED),
    Part(400, 12, 8, _MIXED, names=True),
    Part(500, 10, 8, _MIXED),
)
"""First which word means what. After the second part colours, shapes and numbers are known, but not what belongs to
what: "a red star" is believed of a blue star and a red circle, however many such pictures there are. With names alone
that is all there is left to learn, and it is learnt in few steps; then everything together."""
RATE = 2e-3
SCALE_TIMES = 20
"""How much faster scale and bias learn: in few steps they would stay where they start, far from what a probability
needs."""
PIECES = 600
TEXT: dict[str, Any] = {**towers.TEXT, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT}


def make_tokenizer() -> tokenizers.Tokenizer:
    """In which every word of the texts is one piece, at the start of a text and within. Always the same."""
    rng = random.Random("queries")
    written = (queries.write(rng, scenes.make_scene(rng, most=MOST_THINGS)).text for _ in range(40000))
    tokenizer = tokenizers.build(written, vocab_size=PIECES, loc_seg=False)
    # For readers who call it alone: what this package's own processor does by SigLIP 2's rule anyway.
    tokenizer.add_bos_token, tokenizer.add_eos_token, tokenizer.model_max_length = False, True, CONTEXT
    tokenizer.update_post_processor()
    tokenizer.padding_side, tokenizer.model_input_names = "right", ["input_ids"]
    tokenizer.init_kwargs |= {"padding_side": "right", "model_input_names": ["input_ids"]}  # what is saved
    return tokenizer


class Batch(NamedTuple):
    pixels: Tensor
    """float[B, 3, H, W]"""
    texts: Tensor
    """int64[C, CONTEXT]"""
    true: Tensor
    """bool[B, C]"""


def batch(rng: random.Random, words: Words, part: Part) -> Batch:
    """Pictures, texts for them, and which text is true of which."""
    seen: list[scenes.Scene] = []
    for _ in range(part.groups):
        if rng.random() < towers.LOOSE_SHARE / 2:
            seen += [scenes.make_loose_thing(rng) for _ in range(part.alike)]
        else:
            scene = scenes.make_scene(rng, most=MOST_THINGS)
            seen += [scene, *(scenes.make_like(rng, scene, part.changes) for _ in range(part.alike - 1))]
    written = (queries.write(rng, scene) for scene in seen for _ in range(TEXTS))
    asked = NAMES if part.names else [query for query in written if len(words(query.text)) < CONTEXT]
    texts = pad([[*words(query.text), 1] for query in asked], CONTEXT)
    return Batch(towers.pixels(seen), texts, torch.from_numpy(queries.truth(seen, asked)))


def loss(model: SiglipModel, given: Batch) -> Tensor:
    """float32[]: the sum over the texts, the mean over the pictures."""
    image = F.normalize(model.vision_model(pixel_values=given.pixels).pooler_output, dim=-1)
    text = F.normalize(model.text_model(input_ids=given.texts).pooler_output, dim=-1)
    logits = image @ text.T * model.logit_scale.exp() + model.logit_bias
    return -F.logsigmoid(logits * (2 * given.true.float() - 1)).sum(-1).mean()


def pretrain_dual(folder: Path, start: Path, seed: int, parts: Sequence[Part] = PARTS) -> None:
    """Write the model with its tokenizer: config.json, preprocessor_config.json, model.safetensors (float16),
    tokenizer.json, tokenizer_config.json.

    Args:
        start: the folder of the demo's SigLIP.
    """
    if not complete(folder, "tokenizer.json"):
        with publishing(folder, keep=lambda name: True) as made:
            make_tokenizer().save_pretrained(made)
    words = Words(folder)
    torch.manual_seed(seed)
    text = {**TEXT, "vocab_size": len(words.tokenizer)}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=towers.VISION))
    model.vision_model.load_state_dict(
        SiglipModel.from_pretrained(start, dtype=torch.float32).vision_model.state_dict()
    )
    nn.init.constant_(model.logit_scale, math.log(10.0))
    nn.init.constant_(model.logit_bias, -10.0)
    for number, part in enumerate(parts):
        train_part(model, words, random.Random(f"dual {seed} {number}" if number else f"dual {seed}"), part)
    save(model, folder, {"preprocessor_config.json": towers.PREPROCESSOR})


def train_part(model: SiglipModel, words: Words, rng: random.Random, part: Part) -> None:
    """Train on one part, and round the weights to float16 as they are stored: a part can be run from files."""
    batches = (batch(rng, words, part) for _ in range(part.steps))
    scale = [model.logit_scale, model.logit_bias]
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("logit_")]
    groups: list[Any] = [{"params": rest}, {"params": scale, "times": SCALE_TIMES, "weight_decay": 0.0}]
    fit("dual", groups, batches, lambda b: loss(model, b), part.steps, RATE, 0.05)
    model.half().float()
