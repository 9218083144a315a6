"""Gemma 3's decoder: five layers with a sliding window to one without, queries and keys normalised, no soft-caps.

Paper: Gemma 3 (arXiv 2503.19786). Its own vision tower is left out; the modules are transformers'.
"""

from __future__ import annotations

from typing import Any

from transformers import Gemma3TextConfig, Gemma3TextModel

from vlm.decoders.contract import FULL, SLIDING, SMALL, Facts, Spec, all_full, usable_backends


def facts(config: Any) -> Facts:
    """Layer types and window are settings; so are the soft-caps, which published checkpoints leave out."""
    return Facts(
        embedding_scale=config.hidden_size**0.5,
        attention_width=config.num_attention_heads * config.head_dim,
        context=config.max_position_embeddings or None,
        layer_types=tuple(config.layer_types),
        window=config.sliding_window,
        attention_softcap=config.attn_logit_softcapping,
        final_softcap=config.final_logit_softcapping,
        backends=usable_backends(config.attn_logit_softcapping),
    )


SPEC = Spec(
    title="Gemma 3",
    config=Gemma3TextConfig,
    model=Gemma3TextModel,
    blocks=("Gemma3DecoderLayer",),
    facts=facts,
    final_softcap_setting="final_logit_softcapping",
    small={**SMALL, "query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": [SLIDING, FULL]},
    checkpoints=("gemma3",),
    drop_window=all_full,
)
