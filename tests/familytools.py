"""Tiny models with two towers of each family, with their processors; weights large enough to be told apart."""

from __future__ import annotations

from typing import Any

import torch
from coretools import shake
from transformers import CLIPConfig, CLIPTokenizer, Siglip2Config, SiglipConfig

from vlm.model.dual import DualTower
from vlm.model.parts import encoder_spec
from vlm.siglip.processor import DualProcessor
from vlm.siglip.rules import RULES
from vlm.text.tokenizer import build

CORPUS = ["a red square left of a blue circle", "two dogs", "a photo of a small cat on a wooden chair in the snow"]
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONTEXT = 64
FAMILIES = ("siglip", "siglip2", "naflex", "clip")


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with a few merges."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + number) for number in range(256 - len(letters))]
    merges = [("a", "</w>"), ("r", "e"), ("re", "d</w>"), ("d", "o"), ("c", "a")]
    merges = [(one, two) for one, two in merges if two != "</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    pairs: Any = merges
    return CLIPTokenizer(vocab=vocabulary, merges=pairs)


def gemma_tokenizer(*, sticky: bool) -> Any:
    """A Gemma tokenizer; sticky: its padding is the end token, as in SigLIP."""
    tokenizer = build([*CORPUS, *(text.upper() for text in CORPUS)] * 5, vocab_size=400)
    if sticky:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dual_config(family: str) -> Any:
    """A configuration of transformers."""
    if family == "clip":
        vision = {**TEXT, "image_size": 28, "patch_size": 14}
        text = {**TEXT, "vocab_size": 518, "max_position_embeddings": CONTEXT, "bos_token_id": 516, "eos_token_id": 517}
        return CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
    kind, config = ("siglip2_naflex", Siglip2Config) if family == "naflex" else ("siglip", SiglipConfig)
    vision = encoder_spec(kind).tiny().to_dict()
    vision.pop("vision_use_head")
    text = {**TEXT, "vocab_size": 420, "max_position_embeddings": CONTEXT, "projection_size": 32}
    text |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    made: Any = config
    return made(vision_config=vision, text_config=text)


def dual(family: str) -> tuple[DualTower, DualProcessor]:
    """A model and its processor, as a checkpoint of the family would give them."""
    torch.manual_seed(0)
    model = DualTower(dual_config(family), "siglip2" if family == "naflex" else family)
    shake(model, 0.2)
    with torch.no_grad():
        model.model.logit_scale.fill_(2.0)
        if model.objective.biased:
            model.model.logit_bias.fill_(-3.0)
    tokenizer = clip_tokenizer() if family == "clip" else gemma_tokenizer(sticky=family == "siglip")
    settings: dict[str, Any] = {"max_num_patches": 16} if family == "naflex" else {}
    transform = encoder_spec(model.kind).transform(model.config.vision_config, **settings)
    return model.eval(), DualProcessor(transform, tokenizer, RULES[model.family], model.context)
