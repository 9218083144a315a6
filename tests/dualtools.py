"""Tiny checkpoints with two towers and the tokenizers of their families, made as the originals were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
from coretools import shake
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel, SiglipTokenizer

from vlm.encoders.siglip import SPEC as SIGLIP
from vlm.encoders.siglip2_naflex import SPEC as NAFLEX
from vlm.text.tokenizer import from_sentencepiece

CORPUS = ["a photo of a red cat", "two big dogs, one small bird!", "the quick brown fox", "café été ÜBER 12 34"] * 30
FAMILIES = ("siglip", "siglip2", "naflex")


def pieces(folder: Path, family: str) -> Path:
    """A sentencepiece model as the family's original is: a unigram one with T5's settings, or Gemma's."""
    folder.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {"hard_vocab_limit": False, "minloglevel": 2, "vocab_size": 350, "num_threads": 1}
    own: dict[str, Any]
    if family == "siglip":
        own = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    else:
        own = {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1}
        own |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "bos_id": 2, "unk_id": 3}
        own |= {"eos_piece": "<eos>", "bos_piece": "<bos>", "user_defined_symbols": ["<mask>", "\n"]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.lower() for text in CORPUS), model_prefix=str(folder / "spiece"), **common, **own
    )
    return folder / "spiece.model"


def tokenizer(model: Path, family: str, **settings: Any) -> Any:
    """transformers' own tokenizer of a sentencepiece model; SigLIP 2's FixRes directories have a plain Gemma one."""
    if family == "siglip":
        return SiglipTokenizer(str(model), model_input_names=["input_ids"], **settings)
    found = from_sentencepiece(model)
    found.padding_side, found.model_input_names, found.add_eos_token = "right", ["input_ids"], True
    for name, value in settings.items():
        setattr(found, name, value)
    return found


def checkpoint(folder: Path, family: str, *, context: int = 12, vocabulary: int | None = None) -> Any:
    """A directory of transformers with both towers and an image processor, without a tokenizer; returns its model."""
    naflex = family == "naflex"
    vision = (NAFLEX if naflex else SIGLIP).tiny().to_dict()
    vision.pop("vision_use_head")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {
        "vocab_size": vocabulary or (60 if family == "siglip" else 350),
        "max_position_embeddings": context,
        "projection_size": 32,
    }
    text |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}
    classes: Any = (Siglip2Config, Siglip2Model) if naflex else (SiglipConfig, SiglipModel)
    model = classes[1](classes[0](vision_config=vision, text_config=text))
    shake(model)
    model.eval().save_pretrained(folder)
    return model
