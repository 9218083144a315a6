"""Gemma 1, the decoder of PaliGemma 1.

Paper: arXiv 2403.08295. Reference code: google/gemma_pytorch; the modules are transformers'.
"""

from __future__ import annotations

from typing import Any

from transformers import GemmaConfig, GemmaModel

from vlm.decoders.contract import FULL, Facts, Spec, usable_backends


def facts(config: Any) -> Facts:
    """Full attention in every layer. Gemma 1 has no soft-caps, but a configuration may state them."""
    cap = getattr(config, "attn_logit_softcapping", None)
    return Facts(
        embedding_scale=config.hidden_size**0.5,
        attention_width=config.num_attention_heads * config.head_dim,
        context=config.max_position_embeddings or None,
        layer_types=(FULL,) * config.num_hidden_layers,
        attention_softcap=cap,
        final_softcap=getattr(config, "final_logit_softcapping", None),
        backends=usable_backends(cap),
        by_layer_type=False,
    )


SPEC = Spec(
    title="Gemma",
    config=GemmaConfig,
    model=GemmaModel,
    blocks=("GemmaDecoderLayer",),
    facts=facts,
    final_softcap_setting="final_logit_softcapping",
    in_paligemma=True,
)
