"""Google's own checkpoints: big_vision `.npz` files of PaliGemma 1 and 2, SigLIP and SigLIP 2 (FixRes and NaFlex).

Layers stored one by one or stacked (scanned), query/key/value fused or not, float32, float16, or bfloat16 (which numpy
stores as two raw bytes). Sizes are read from the arrays; what they do not show (soft-caps, the query scale) is Gemma
2's published value unless big_vision's own model settings are given.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import SiglipTextConfig
from transformers.configuration_utils import PreTrainedConfig

from vlm.checkpoints.big_vision_names import Rule, rules, to_array
from vlm.checkpoints.configs import guarded
from vlm.checkpoints.files import check_regular
from vlm.checkpoints.loader import Placement, Source, load_model
from vlm.config import VLMConfig, decoder_config, part
from vlm.errors import CheckpointError, ConfigError, nearest
from vlm.model import VLM
from vlm.processor import Processor
from vlm.tokenizer import Tokenizer, image_token_id
from vlm.transforms import ImageTransform

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
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
DTYPE_NAMES = {"V2": "BF16", "float32": "F32", "float16": "F16"}


@contextmanager
def open_npz(path: str | Path) -> Iterator[Arrays]:
    """The arrays of a `.npz`, read when they are asked for, without the leading `params/` of their names.

    Raises:
        CheckpointError: not a regular file, not an archive of arrays, or arrays that would need pickle.
    """
    check_regular(Path(path))
    with _reading(str(path)):
        archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise CheckpointError(f"{path}: a single array, expected an .npz archive of big_vision")
    with archive:
        yield _Archive(archive, str(path))


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What zipfile and numpy raise for a damaged archive becomes a CheckpointError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, NotImplementedError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a complete .npz file ({error}); copy it again") from error


class _Archive(Mapping[str, np.ndarray]):
    """Arrays by their name without `params/`; the shapes come from the headers alone."""

    def __init__(self, archive: Any, path: str) -> None:
        self._archive, self._path = archive, path
        self._names = {name.removeprefix("params/"): name for name in archive.files}
        if len(self._names) != len(archive.files):
            raise CheckpointError(f"{path}: the same array with and without params/ in its name")

    def __getitem__(self, name: str) -> np.ndarray:
        with _reading(self._path):
            return cast(np.ndarray, self._archive[self._names[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, dtype name) of an array, without its data."""
        with _reading(self._path), self._archive.zip.open(self._names[name] + ".npy") as file:
            version = np.lib.format.read_magic(file)
            read: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read:
                raise CheckpointError(f"{self._path}: {name} is in an unknown .npy version {version}")
            shape, _, dtype = read[version](file)
        return shape, _dtype_name(dtype, name, self._path)


def _dtype_name(dtype: np.dtype, name: str, path: str) -> str:
    text = dtype.str.lstrip("|<=") if dtype.kind == "V" else dtype.name
    if text not in DTYPE_NAMES:
        raise CheckpointError(f"{path}: array {name} is of type {dtype}, expected float32, float16 or bfloat16")
    return DTYPE_NAMES[text]


def headers(arrays: Arrays, origin: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(shapes, dtype names) of all arrays by big_vision name."""
    if isinstance(arrays, _Archive):
        found = {name: arrays.header(name) for name in arrays}
    else:
        found = {name: (tuple(a.shape), _dtype_name(a.dtype, name, origin)) for name, a in arrays.items()}
    return {name: shape for name, (shape, _) in found.items()}, {name: dtype for name, (_, dtype) in found.items()}


# --- PaliGemma --------------------------------------------------------------------------------------------------------


def paligemma(
    arrays: Arrays,
    tokenizer: Tokenizer,
    *,
    origin: str = "big_vision parameters",
    llm: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    placement: Placement | None = None,
    allow_nonfinite: bool = False,
) -> tuple[VLM, Processor]:
    """A PaliGemma from big_vision's arrays.

    Args:
        arrays: big_vision name (without `params/`) -> array.
        tokenizer: the tokenizer that belongs to it, with an `<image>` token.
        origin: where the arrays come from, for messages.
        llm, image_size: as `paligemma_config`.

    Returns:
        (model, processor). Images are resized as in big_vision: bilinear with antialias, cut to 8 bit.

    Raises:
        CheckpointError: arrays that are missing, unexpected, mis-shaped or not finite.
    """
    model = paligemma_model(
        arrays,
        image_token_id(tokenizer),
        origin=origin,
        llm=llm,
        image_size=image_size,
        placement=placement,
        allow_nonfinite=allow_nonfinite,
    )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config.text_config, name, getattr(tokenizer, name))
    vision = model.config.vision_config
    return model, Processor(tokenizer, original_transform(vision.image_size, vision.patch_size))


def original_transform(image_size: int, patch_size: int) -> ImageTransform:
    """Resizing as big_vision's transfers do: bilinear with antialias, cut to 8 bit, values in [-1, 1]."""
    return ImageTransform(
        mode="squash", image_size=image_size, patch_size=patch_size, resample="bilinear", rounding="down"
    )


def paligemma_model(
    arrays: Arrays,
    image_token: int,
    *,
    origin: str = "big_vision parameters",
    llm: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    placement: Placement | None = None,
    allow_nonfinite: bool = False,
) -> VLM:
    """The model alone; `image_token` is the id of the `<image>` placeholder. Arguments as `paligemma`."""
    shapes, dtypes = headers(arrays, origin)
    config = paligemma_config(shapes, image_token, origin=origin, llm=llm, image_size=image_size)
    source = array_source(arrays, shapes, dtypes, rules(shapes, two_towers=False, origin=origin), origin)
    source = _with_placeholder_rows(source, config.text_config.vocab_size)
    return load_model(config, source, placement, allow_nonfinite=allow_nonfinite)


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
    caps = settings.get("attn_logits_softcap"), settings.get("final_logits_softcap")
    per_head = settings.get("query_pre_attn_norm", _published_norm(width, heads, head_dim)) == "rsqrt_emb_per_head"
    if not second:
        if any(caps) or settings.get("query_pre_attn_norm", "rsqrt_head_dim") != "rsqrt_head_dim":
            raise CheckpointError(f"{origin}: soft-caps or a query scale without Gemma 2's norms; no decoder has that")
        return decoder_config(values)
    return decoder_config(
        {
            **values,
            "attn_logit_softcapping": 50.0 if caps[0] is None else caps[0] or None,
            "final_logit_softcapping": 30.0 if caps[1] is None else caps[1] or None,
            "query_pre_attn_scalar": width // heads if per_head else head_dim,
            "layer_types": ["full_attention"] * depth,  # the original has no sliding window
        }
    )


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


def _with_placeholder_rows(source: Source, vocab: int) -> Source:
    """Rows for `<image>` and up to a multiple of 64, which the original does not have: the mean embedding, as in
    transformers' conversion (there with a little noise). No image or text token ever reads them."""
    name = "model.language_model.embed_tokens.weight"
    rows, width = source.shapes[name]
    if rows >= vocab:
        return source

    def read(wanted: str) -> Tensor:
        tensor = source.read(wanted)
        if wanted != name:
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(vocab - rows, -1)])

    return Source(source.origin, {**source.shapes, name: (vocab, width)}, source.dtypes, read)


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
        return part("vlm.encoders", "siglip").Config(**values, image_size=image_size or side)
    values |= {"patch_size": math.isqrt(kernel[0] // 3), "num_patches": positions[0] * positions[1]}
    return part("vlm.encoders", "siglip2_naflex").Config(**values)


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


# --- reading ----------------------------------------------------------------------------------------------------------


def array_source(
    arrays: Arrays, shapes: Shapes, dtypes: Mapping[str, str], found: Mapping[str, Rule], origin: str
) -> Source:
    """The arrays as parameters, listed array by array. One array is held at a time: stacked layers are read once when
    parameters are read in the order of `shapes`."""
    places: dict[str, str] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    thirds: dict[str, list[str]] = {}
    for name, rule in found.items():
        for parameter in rule.names:
            whole, _, third = parameter.partition("#")
            if third:
                thirds.setdefault(whole, []).append(parameter)
            if parameter in places:
                raise CheckpointError(f"{origin}: {name} and {places[parameter]} both hold {parameter}")
            places[parameter], sizes[parameter] = name, rule.shape()
    held: dict[str, Tensor] = {}

    def single(parameter: str) -> Tensor:
        name = places[parameter]
        if name not in held:
            held.clear()
            held[name] = to_array(arrays[name])
        return found[name].part(held[name], found[name].names.index(parameter))

    def read(parameter: str) -> Tensor:
        if parameter in thirds:
            return torch.cat([single(f"{parameter}#{i}") for i in range(3)])
        return single(parameter)

    whole_shapes = {name: shape for name, shape in sizes.items() if "#" not in name}
    for name, parts in thirds.items():
        if len(parts) == 3:
            first = sizes[f"{name}#0"]
            whole_shapes[name] = (3 * first[0], *first[1:])
    return Source(
        origin, whole_shapes, {n: dtypes[places.get(n, places.get(n + "#0", ""))] for n in whole_shapes}, read
    )


def encode(tensors: Mapping[str, Tensor], shapes: Shapes, *, two_towers: bool) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, as big_vision's arrays: the inverse of reading them.

    Args:
        tensors: live name -> tensor.
        shapes: big_vision name -> shape of the arrays wanted, as a checkpoint has them.
        two_towers: the names are those of transformers' SiglipModel.

    Returns:
        big_vision name -> float32 array.
    """
    rebuilt = rebuild(tensors, shapes, two_towers=two_towers)
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in rebuilt}


def rebuild(tensors: Mapping[str, Tensor], shapes: Shapes, *, two_towers: bool) -> Iterator[tuple[str, Tensor]]:
    """As `encode`, one (big_vision name, tensor in the parameters' dtype) after the other.

    Raises:
        CheckpointError: a parameter that an array needs is not there.
    """
    tensors = dict(tensors)
    for name in [n for n in tensors if ".in_proj_" in n]:
        tensors |= {f"{name}#{i}": piece for i, piece in enumerate(tensors[name].chunk(3))}
    for name, rule in rules(shapes, two_towers=two_towers, origin="big_vision shapes").items():
        absent = [parameter for parameter in rule.names if parameter not in tensors]
        if absent:
            raise CheckpointError(f"array {name} needs {absent[0]}, which the model does not have")
        yield name, rule.join(tensors, tuple(shapes[name]))
