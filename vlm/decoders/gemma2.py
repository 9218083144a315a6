"""Gemma 2, the decoder of PaliGemma 2: soft-caps on attention scores and logits, and a sliding window in every other
layer.

Papers: Gemma 2 (arXiv 2408.00118), PaliGemma 2 (arXiv 2412.03555). Reference code: big_vision `models/ppp/gemma.py`,
which has no window: transformers' 4096 would hide image rows from the text at 896 px.
"""

from __future__ import annotations

from typing import Any

from transformers import Gemma2Config, Gemma2Model

from vlm.decoders.contract import SMALL, Facts, Spec, all_full, usable_backends


def facts(config: Any) -> Facts:
    """Layer types, window and soft-caps are settings."""
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
    title="Gemma 2",
    config=Gemma2Config,
    model=Gemma2Model,
    blocks=("Gemma2DecoderLayer",),
    facts=facts,
    final_softcap_setting="final_logit_softcapping",
    small={**SMALL, "query_pre_attn_scalar": 8, "sliding_window": 8},
    in_paligemma=True,
    window_in_paligemma=False,
    drop_window=all_full,
)
