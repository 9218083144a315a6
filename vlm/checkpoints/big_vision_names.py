"""How big_vision's arrays become parameters, and back: names, axes, fused and scanned arrays.

Every rule is data: which axes of the array count parameters (scanned layers, fused query/key/value), and how the
remaining axes are ordered and merged. The same rule read backwards turns parameters, or their gradients, into
big_vision's arrays. Source: big_vision `models/vit.py`, `models/ppp/gemma.py`,
`models/proj/image_text/{two_towers,text_transformer,naflex_vit}.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm.checkpoints.names import DECODER, PROJECTOR, TOWER
from vlm.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
"""big_vision name (without `params/`) -> shape."""
Groups = tuple[tuple[int, ...], ...]
"""For each axis of the parameter the axes of the array that it merges."""
VECTOR: Groups = ((0,),)
TABLE: Groups = ((0,), (1,))
MATRIX: Groups = ((1,), (0,))  # [in, out] -> [out, in]
HEADS_IN: Groups = ((1, 2), (0,))  # [width, heads, head_dim] -> [heads * head_dim, width]
HEADS_BIAS: Groups = ((0, 1),)  # [heads, head_dim] -> [heads * head_dim]
HEADS_OUT: Groups = ((2,), (0, 1))  # [heads, head_dim, width] -> [width, heads * head_dim]
EINSUM_IN: Groups = ((0, 2), (1,))  # [heads, width, head_dim] -> [heads * head_dim, width]
CONVOLUTION: Groups = ((3,), (2,), (0,), (1,))  # [row, column, channel, out] -> [out, channel, row, column]
POSITIONS: Groups = ((0, 1), (2,))  # [1, n, width] or [a, a, width] -> [n, width]
PROBE: Groups = ((0,), (1,), (2,))
_ATTENTION = "MultiHeadDotProductAttention_0"
_NORM_AND_MLP = {
    "MlpBlock_0/Dense_0/kernel": (("mlp.fc1.weight",), MATRIX),
    "MlpBlock_0/Dense_0/bias": (("mlp.fc1.bias",), VECTOR),
    "MlpBlock_0/Dense_1/kernel": (("mlp.fc2.weight",), MATRIX),
    "MlpBlock_0/Dense_1/bias": (("mlp.fc2.bias",), VECTOR),
}
BLOCK = {
    **_NORM_AND_MLP,
    **{
        f"LayerNorm_{i}/{theirs}": ((f"layer_norm{i + 1}.{ours}",), VECTOR)
        for i in (0, 1)
        for theirs, ours in (("scale", "weight"), ("bias", "bias"))
    },
    **{
        f"{_ATTENTION}/{name}/{kind}": ((f"self_attn.{name[0]}_proj.{leaf}",), groups)
        for name in ("query", "key", "value")
        for kind, leaf, groups in (("kernel", "weight", HEADS_IN), ("bias", "bias", HEADS_BIAS))
    },
    f"{_ATTENTION}/out/kernel": (("self_attn.out_proj.weight",), HEADS_OUT),
    f"{_ATTENTION}/out/bias": (("self_attn.out_proj.bias",), VECTOR),
}
"""A block of a vision or text transformer, under `layers.N.`."""
# transformers keeps query, key and value of the pooling head in one matrix; `#0`, `#1`, `#2` are its thirds.
POOLING = {
    **_NORM_AND_MLP,
    "probe": (("probe",), PROBE),
    "LayerNorm_0/scale": (("layernorm.weight",), VECTOR),
    "LayerNorm_0/bias": (("layernorm.bias",), VECTOR),
    **{
        f"{_ATTENTION}/{name}/{kind}": ((f"attention.in_proj_{leaf}#{i}",), groups)
        for i, name in enumerate(("query", "key", "value"))
        for kind, leaf, groups in (("kernel", "weight", HEADS_IN), ("bias", "bias", HEADS_BIAS))
    },
    f"{_ATTENTION}/out/kernel": (("attention.out_proj.weight",), HEADS_OUT),
    f"{_ATTENTION}/out/bias": (("attention.out_proj.bias",), VECTOR),
}
"""The MAP head, under `head.`."""
TRANSFORMER_ENDS = {"encoder_norm/scale": "weight", "encoder_norm/bias": "bias"}
_GEMMA = {
    "attn/q_einsum/w": (("self_attn.q_proj.weight",), EINSUM_IN),
    "attn/kv_einsum/w": (("self_attn.k_proj.weight", "self_attn.v_proj.weight"), EINSUM_IN),
    "attn/qkv_einsum/w": (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        EINSUM_IN,
    ),
    "attn/attn_vec_einsum/w": (("self_attn.o_proj.weight",), HEADS_OUT),
    "mlp/gating_einsum": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), MATRIX),
    "mlp/linear": (("mlp.down_proj.weight",), MATRIX),
    "pre_attention_norm/scale": (("input_layernorm.weight",), VECTOR),
}
GEMMA1 = {**_GEMMA, "pre_ffw_norm/scale": (("post_attention_layernorm.weight",), VECTOR)}
GEMMA2 = {
    **_GEMMA,
    "post_attention_norm/scale": (("post_attention_layernorm.weight",), VECTOR),
    "pre_ffw_norm/scale": (("pre_feedforward_layernorm.weight",), VECTOR),
    "post_ffw_norm/scale": (("post_feedforward_layernorm.weight",), VECTOR),
}
Table = Mapping[str, tuple[tuple[str, ...], Groups]]


@dataclass(frozen=True)
class Rule:
    """One array and the parameters it holds.

    Attributes:
        names: parameters, in the order of the leading axes.
        piece: shape of the array of one parameter.
        groups: how its axes are merged.
    """

    names: tuple[str, ...]
    piece: tuple[int, ...]
    groups: Groups

    def shape(self) -> tuple[int, ...]:
        """Shape of each parameter."""
        return tuple(math.prod(self.piece[axis] for axis in group) for group in self.groups)

    def part(self, array: Tensor, index: int) -> Tensor:
        """One parameter of the array, contiguous: that of `names[index]`."""
        order = [axis for group in self.groups for axis in group]
        piece = array.reshape(len(self.names), *self.piece)[index]
        return piece.permute(order).reshape(self.shape()).contiguous()

    def join(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The inverse of `part` over all names; `shape` is that of the whole array."""
        order = [axis for group in self.groups for axis in group]
        permuted = [self.piece[axis] for axis in order]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        pieces = [tensors[name].reshape(permuted).permute(inverse) for name in self.names]
        return torch.stack(pieces).reshape(shape)


def rules(shapes: Shapes, *, two_towers: bool, origin: str) -> dict[str, Rule]:
    """A rule for every array of a checkpoint.

    Args:
        shapes: big_vision name -> shape.
        two_towers: parameters get the names of transformers' SiglipModel, else those of `vlm.VLM`.

    Raises:
        CheckpointError: arrays that no rule knows, or whose axes do not fit their rule, with the list.
    """
    gemma = GEMMA2 if any(name.endswith("post_ffw_norm/scale") for name in shapes) else GEMMA1
    found: dict[str, Rule] = {}
    unknown = []
    for name, shape in shapes.items():
        rule = _rule(name, shape, gemma, two_towers)
        if rule is None:
            unknown.append(f"{name} {shape}")
        else:
            found[name] = rule
    if unknown:
        shown = ", ".join(sorted(unknown)[:8])
        raise CheckpointError(
            f"{origin}: {len(unknown)} arrays that are not of a {'SigLIP' if two_towers else 'PaliGemma'} checkpoint of"
            f" big_vision: {shown}"
        )
    return found


def _rule(name: str, shape: tuple[int, ...], gemma: Table, two_towers: bool) -> Rule | None:
    tower, _, rest = name.partition("/")
    if tower == "img":
        prefix = "vision_model." if two_towers else TOWER
        if rest.startswith("head/") and not two_towers:
            return _linear(rest.removeprefix("head/"), PROJECTOR + "linear.", shape)
        return _image(rest, shape, prefix)
    if tower == "txt" and two_towers:
        return _text(rest, shape)
    if tower == "llm" and not two_towers:
        return _decoder(rest, shape, gemma)
    if name in ("t", "b") and two_towers:
        return _fit(({"t": "logit_scale", "b": "logit_bias"}[name],), shape, VECTOR, 0)
    return None


def _image(rest: str, shape: tuple[int, ...], prefix: str) -> Rule | None:
    if rest == "embedding/kernel":
        groups = CONVOLUTION if len(shape) == 4 else MATRIX
        return _fit((prefix + "embeddings.patch_embedding.weight",), shape, groups, 0)
    if rest == "embedding/bias":
        return _fit((prefix + "embeddings.patch_embedding.bias",), shape, VECTOR, 0)
    if rest == "pos_embedding":
        return _fit((prefix + "embeddings.position_embedding.weight",), shape, POSITIONS, 0)
    if rest.startswith("MAPHead_0/"):
        return _from_table(POOLING, rest.removeprefix("MAPHead_0/"), shape, prefix + "head.", None)
    if rest.startswith("Transformer/"):
        return _transformer(rest.removeprefix("Transformer/"), shape, prefix, "post_layernorm.")
    return None


def _text(rest: str, shape: tuple[int, ...]) -> Rule | None:
    prefix = "text_model."
    if rest == "Embed_0/embedding":
        return _fit((prefix + "embeddings.token_embedding.weight",), shape, TABLE, 0)
    if rest == "pos_embedding":
        return _fit((prefix + "embeddings.position_embedding.weight",), shape, POSITIONS, 0)
    if rest.startswith("head/"):
        return _linear(rest.removeprefix("head/"), prefix + "head.", shape)
    if rest.startswith("Encoder_0/"):
        return _transformer(rest.removeprefix("Encoder_0/"), shape, prefix, "final_layer_norm.")
    return None


def _transformer(rest: str, shape: tuple[int, ...], prefix: str, final_norm: str) -> Rule | None:
    if rest in TRANSFORMER_ENDS:
        return _fit((prefix + final_norm + TRANSFORMER_ENDS[rest],), shape, VECTOR, 0)
    block, _, inner = rest.partition("/")
    match = re.fullmatch(r"encoderblock(?:_(\d+))?", block)
    return _from_table(BLOCK, inner, shape, prefix + "encoder.layers.", match[1] or "all") if match else None


def _decoder(rest: str, shape: tuple[int, ...], gemma: Table) -> Rule | None:
    if rest == "embedder/input_embedding":
        return _fit((DECODER + "embed_tokens.weight",), shape, TABLE, 0)
    if rest == "final_norm/scale":
        return _fit((DECODER + "norm.weight",), shape, VECTOR, 0)
    match = re.fullmatch(r"layers/(?:(\d+)/)?(.+)", rest)
    return _from_table(gemma, match[2], shape, DECODER + "layers.", match[1] or "all") if match else None


def _linear(leaf: str, prefix: str, shape: tuple[int, ...]) -> Rule | None:
    if leaf == "kernel":
        return _fit((prefix + "weight",), shape, MATRIX, 0)
    return _fit((prefix + "bias",), shape, VECTOR, 0) if leaf == "bias" else None


def _from_table(table: Table, inner: str, shape: tuple[int, ...], prefix: str, layer: str | None) -> Rule | None:
    """Rule of an array inside a block; `layer` is its number, `all` when the layers are stacked, None outside
    layers."""
    if inner not in table or not shape:
        return None
    leaves, groups = table[inner]
    if layer is None:
        stacked, bases = 0, [prefix]
    elif layer == "all":
        stacked, bases = 1, [f"{prefix}{i}." for i in range(shape[0])]
    else:
        stacked, bases = 0, [f"{prefix}{int(layer)}."]
    names = tuple(base + leaf for base in bases for leaf in leaves)
    return _fit(names, shape, groups, stacked + (len(leaves) > 1))


def _fit(names: tuple[str, ...], shape: tuple[int, ...], groups: Groups, leading: int) -> Rule | None:
    """The rule, if the array has its leading axes (one index per name) and its other axes."""
    piece = shape[leading:]
    if len(piece) != sum(map(len, groups)) or math.prod(shape[:leading]) != len(names):
        return None
    return Rule(names, piece, groups)


def to_array(array: np.ndarray) -> Tensor:
    """A numpy array as a tensor; numpy has no bfloat16 and stores it as two raw bytes.

    Raises:
        CheckpointError: another type.
    """
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16)).view(torch.bfloat16)
    if array.dtype not in (np.float32, np.float16):
        raise CheckpointError(f"an array is of type {array.dtype}, expected float32, float16 or bfloat16")
    return torch.from_numpy(np.ascontiguousarray(array))
