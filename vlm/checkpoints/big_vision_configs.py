"""Configurations of big_vision's models, from the shapes of their arrays.

What the arrays do not show (soft-caps, the query scale) is Gemma 2's published value, unless big_vision's own model
settings are given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

from transformers import SiglipTextConfig
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints.big_vision_names import Shapes
from vlm.checkpoints.checks import guarded
from vlm.errors import CheckpointError, ConfigError, nearest
from vlm.model import decoder
from vlm.model.config import VLMConfig
from vlm.model.parts import encoder_spec

VOCABULARY_MULTIPLE = 64
EMBEDDING = "llm/embedder/input_embedding"
LLM_SETTINGS = {
    "width": None,
    "depth": None,
    "mlp_dim": None,
    "num_heads": None,
    "num_kv_heads": None,
    "head_dim": None,
    "vocab_size": None,
    "norm_eps": 1e-6,
    "attn_logits_softcap": None,
    "final_logits_softcap": None,
    "query_pre_attn_norm": None,
    "post_norms": None,
}
"""Settings of big_vision's Gemma that decide what it computes; the others (scan, remat, dropout, ...) do not."""


def paligemma_config(
    shapes: Shapes,
    image_token: int,
    *,
    origin: str = "big_vision parameters",
    llm: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> VLMConfig:
    """Configuration of a PaliGemma from the shapes of its arrays.

    Args:
        shapes: big_vision name -> shape.
        image_token: id of the `<image>` placeholder; the vocabulary grows to hold it, to a multiple of 64.
        llm: big_vision's settings of Gemma (`attn_logits_softcap`, `final_logits_softcap`, `query_pre_attn_norm`, ...);
            by default the published ones: Gemma 1 has no caps; Gemma 2 caps attention at 50 and logits at 30 and scales
            queries by head_dim^-0.5, the 27B by (width / heads)^-0.5.
        image_size: side in pixels; by default that of the position grid.

    Raises:
        CheckpointError: arrays without which no size can be known, or settings that contradict them.
    """
    rows = _shape(shapes, EMBEDDING, origin)[0]
    vocab = rows if image_token < rows else -(-(image_token + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return cast(
        VLMConfig,
        guarded(
            lambda: VLMConfig(
                encoder="siglip",
                vision_config=vision_config(shapes, origin=origin, image_size=image_size, pooling=False),
                projector_config={"kind": "linear"},
                text_config=_gemma_config(shapes, vocab, llm or {}, origin),
                image_token_id=image_token,
            ),
            origin,
        ),
    )


def _gemma_config(shapes: Shapes, vocab: int, llm: Mapping[str, Any], origin: str) -> PreTrainedConfig:
    rows, width = _shape(shapes, EMBEDDING, origin)
    depth, base = _layers(shapes, r"llm/layers/(?:(\d+)/)?attn/attn_vec_einsum/w", 4, origin)
    heads, head_dim, _ = _last(shapes, base + "attn/attn_vec_einsum/w", 3, origin)
    fused = base + "attn/qkv_einsum/w" in shapes
    kv_heads = heads if fused else _last(shapes, base + "attn/kv_einsum/w", 4, origin)[1]
    mlp = _last(shapes, base + "mlp/linear", 2, origin)[0]
    second = base + "post_ffw_norm/scale" in shapes
    sizes = {
        "width": width,
        "depth": depth,
        "mlp_dim": mlp,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": rows,
        "post_norms": second,
    }
    settings = _checked(llm, sizes, origin)
    values: dict[str, Any] = {
        "model_type": "gemma2" if second else "gemma",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": settings.get("norm_eps", 1e-6),
    }
    if second:
        return decoder.read_config({**values, **_gemma2_settings(settings, sizes)})
    _check_gemma1(settings, origin)
    return decoder.read_config(values)


def _check_gemma1(settings: Mapping[str, Any], origin: str) -> None:
    caps = settings.get("attn_logits_softcap"), settings.get("final_logits_softcap")
    if any(caps) or settings.get("query_pre_attn_norm", "rsqrt_head_dim") != "rsqrt_head_dim":
        raise CheckpointError(f"{origin}: soft-caps or a query scale without Gemma 2's norms; no decoder has that")


def _gemma2_settings(settings: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What the arrays do not show; a cap of 0 is none."""
    caps = settings.get("attn_logits_softcap"), settings.get("final_logits_softcap")
    width, heads, head_dim = sizes["width"], sizes["num_heads"], sizes["head_dim"]
    norm = settings.get("query_pre_attn_norm", _published_norm(width, heads, head_dim))
    return {
        "attn_logit_softcapping": 50.0 if caps[0] is None else caps[0] or None,
        "final_logit_softcapping": 30.0 if caps[1] is None else caps[1] or None,
        "query_pre_attn_scalar": width // heads if norm == "rsqrt_emb_per_head" else head_dim,
        "layer_types": ["full_attention"] * sizes["depth"],  # the original has no sliding window
    }


def _published_norm(width: int, heads: int, head_dim: int) -> str:
    """How the published Gemma of this size scales its queries: only the 27B does it by width."""
    return "rsqrt_emb_per_head" if (width, heads, head_dim) == (4608, 32, 128) else "rsqrt_head_dim"


def _checked(llm: Mapping[str, Any], sizes: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The settings that matter, after comparing stated sizes with the arrays."""
    norm = llm.get("query_pre_attn_norm")
    known = ("rsqrt_head_dim", "rsqrt_emb_per_head")
    if norm is not None and norm not in known:
        raise ConfigError(f"query_pre_attn_norm is {norm!r}{nearest(str(norm), known)}, known: {', '.join(known)}")
    for key, value in sizes.items():
        if key in llm and llm[key] != value:
            raise CheckpointError(f"{origin}: llm.{key} is {llm[key]!r}, the arrays have {value!r}")
    return {key: llm[key] for key in LLM_SETTINGS if llm.get(key) is not None}


# --- towers -----------------------------------------------------------------------------------------------------------


def vision_config(
    shapes: Shapes, *, origin: str, image_size: int | None = None, pooling: bool | None = None
) -> PreTrainedConfig:
    """Configuration of the vision tower: SigLIP (a convolution over patches) or NaFlex (a linear layer on patches).

    Args:
        pooling: keep the MAP head; None keeps it when the arrays have one.
    """
    kernel = _shape(shapes, "img/embedding/kernel", origin)
    positions = _shape(shapes, "img/pos_embedding", origin)
    depth, base = _layers(shapes, r"img/Transformer/encoderblock(?:_(\d+))?/MlpBlock_0/Dense_0/kernel", 3, origin)
    width, heads, _ = _last(shapes, base + "MultiHeadDotProductAttention_0/query/kernel", 3, origin)
    has_head = any(name.startswith("img/MAPHead_0/") for name in shapes)
    values: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": _last(shapes, base + "MlpBlock_0/Dense_0/kernel", 2, origin)[1],
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "vision_use_head": has_head if pooling is None else pooling,
    }
    if len(kernel) == 4:
        values["patch_size"] = kernel[0]
        side = math.isqrt(positions[1]) * kernel[0]
        if image_size is not None and image_size // kernel[0] * kernel[0] != side:
            raise CheckpointError(f"{origin}: image_size {image_size} does not give the position grid of {side} px")
        return encoder_spec("siglip").config(**values, image_size=image_size or side)
    values |= {"patch_size": math.isqrt(kernel[0] // 3), "num_patches": positions[0] * positions[1]}
    return encoder_spec("siglip2_naflex").config(**values)


def text_config(shapes: Shapes, origin: str) -> SiglipTextConfig:
    """Configuration of SigLIP's text tower."""
    vocab, width = _shape(shapes, "txt/Embed_0/embedding", origin)
    depth, base = _layers(shapes, r"txt/Encoder_0/encoderblock(?:_(\d+))?/MlpBlock_0/Dense_0/kernel", 3, origin)
    _, heads, _ = _last(shapes, base + "MultiHeadDotProductAttention_0/query/kernel", 3, origin)
    return SiglipTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=_last(shapes, base + "MlpBlock_0/Dense_0/kernel", 2, origin)[1],
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=_shape(shapes, "txt/pos_embedding", origin)[1],
        projection_size=shapes.get("txt/head/kernel", (width, width))[1],
        bos_token_id=None,
        eos_token_id=1,
    )


def _shape(shapes: Shapes, name: str, origin: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"{origin}: no array {name}; not a checkpoint of this kind")
    return tuple(shapes[name])


def _last(shapes: Shapes, name: str, count: int, origin: str) -> tuple[int, ...]:
    """The last `count` sizes of an array that may be stacked over layers."""
    shape = _shape(shapes, name, origin)
    if len(shape) not in (count, count + 1):
        raise CheckpointError(f"{origin}: {name} has shape {shape}, expected {count} axes (and one for stacked layers)")
    return shape[-count:]


def _layers(shapes: Shapes, pattern: str, stacked_axes: int, origin: str) -> tuple[int, str]:
    """(number of layers, name of a block up to its last slash) of a transformer, stacked or not.

    Args:
        pattern: of one array per block, with the layer's number as its group.
        stacked_axes: axes of that array when all layers are stacked in it.
    """
    found = {name: match[1] for name in shapes if (match := re.fullmatch(pattern, name))}
    if not found:
        raise CheckpointError(f"{origin}: no array fits {pattern}; not a checkpoint of this kind")
    first = min(found)
    base = re.sub(r"(attn/attn_vec_einsum/w|MlpBlock_0/Dense_0/kernel)$", "", first)
    if found[first] is None:
        shape = shapes[first]
        if len(shape) != stacked_axes or len(found) > 1:
            raise CheckpointError(
                f"{origin}: {first} has shape {shape}, expected layers stacked on {stacked_axes} axes"
            )
        return shape[0], base
    numbers = {int(number) for number in found.values()}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{origin}: blocks are numbered {sorted(numbers)}, expected 0 to {len(numbers) - 1}")
    return len(numbers), base
