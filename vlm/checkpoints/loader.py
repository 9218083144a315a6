"""Fill a model from tensors, strictly: nothing missing, nothing left over, nothing drawn at random.

The model is built without memory (meta device) and compared with the tensors' names, shapes and dtypes first. Then one
tensor at a time is read, converted, checked for NaN and infinity and put in its place, so the peak is one copy of the
model and one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory, offload_weight, save_offload_index
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from vlm.checkpoints.configs import guarded
from vlm.checkpoints.files import FLOATS
from vlm.checkpoints.names import HEAD, to_live
from vlm.checkpoints.shards import widest
from vlm.errors import CheckpointError, ConfigError
from vlm.model import decoder
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM
from vlm.words import listed

EMBEDDING = "model.language_model.embed_tokens.weight"
BUFFERS = re.compile(r".*(position_ids|rotary_emb\.inv_freq|embed_tokens\.embed_scale)$")
"""Constants that older versions of transformers stored with the weights; the model computes them itself."""
SHOWN = 8
READ_PAST_MODULES = ["MultiheadAttention", "Attention", "EvaAttention", "BeitAttention"]
"""Classes of torch, open_clip and timm that read matrices of modules inside them without calling these: offloaded, they
are brought in whole."""


@dataclass(frozen=True)
class Source:
    """Tensors to load: what is known of each before it is read, and how to read it.

    Attributes:
        origin: the path, for messages.
        shapes: live name -> shape.
        dtypes: live name -> the file's dtype name, such as `BF16`.
        read: live name -> the tensor in its stored dtype, in memory that nobody else holds.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read: Callable[[str], Tensor]


@dataclass(frozen=True)
class Placement:
    """Where a model goes.

    Attributes:
        dtype: of all parameters; None keeps each tensor's own.
        device: a single device.
        device_map: `auto`, or part name -> device (`cpu`, `disk`, a GPU number), as accelerate understands it.
        offload_folder: where `disk` parts are written.
        max_memory: device -> bytes or `"10GB"`, for `auto`.
    """

    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    device_map: str | Mapping[str, Any] | None = None
    offload_folder: str | Path | None = None
    max_memory: Mapping[Any, Any] | None = None


def live_source(origin: str, stored: Mapping[str, Any], read: Callable[[str], Tensor]) -> Source:
    """A source whose tensors get their live names; stored constants are left out.

    Args:
        stored: name in the file -> object with `shape` and `dtype`.

    Raises:
        CheckpointError: two tensors are the same parameter under two names.
    """
    names: dict[str, str] = {}
    for name in stored:
        if BUFFERS.fullmatch(name):
            continue
        live = to_live(name)
        if live in names:
            raise CheckpointError(f"{origin}: {name} and {names[live]} are the same parameter; delete one of the two")
        names[live] = name
    return Source(
        origin,
        {live: tuple(stored[name].shape) for live, name in names.items()},
        {live: stored[name].dtype for live, name in names.items()},
        lambda live: read(names[live]),
    )


def load_model(
    config: VLMConfig,
    source: Source,
    placement: Placement | None = None,
    *,
    allow_nonfinite: bool = False,
    before_reading: Callable[[], None] = lambda: None,
) -> VLM:
    """Build the model of a configuration and fill it from a source; in eval mode, tied, embedding scale probed.

    Args:
        before_reading: called when names, shapes and dtypes are known to fit and no weight is read yet.

    Raises:
        CheckpointError: missing, unexpected, mis-shaped, quantised or non-finite tensors, with the lists; an output
            embedding that is not the tied one.
    """
    placement = placement or Placement()
    model: VLM = guarded(lambda: empty(config), f"{source.origin}: config.json")
    check_fit(source, expected_shapes(model))
    before_reading()
    if placement.dtype is None:
        _take_dtypes(model, source)
    devices = _device_map(model, placement)
    _fill(model, source, placement, devices, allow_nonfinite)
    model.tie_weights()
    check_tied(model, source.origin)
    kept = [FLOATS[dtype] for name, dtype in source.dtypes.items() if name != HEAD]
    model.config.dtype = placement.dtype or widest(kept)
    ids = {key: getattr(config.text_config, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**ids)
    if devices is not None:
        folder = None if placement.offload_folder is None else str(placement.offload_folder)
        skip: Any = model._skip_keys_device_placement
        dispatch_model(
            model,
            device_map=devices,
            offload_dir=folder,
            skip_keys=skip,
            force_hooks=True,
            preload_module_classes=READ_PAST_MODULES,
        )
    check_embedding_scale(model)
    return model.eval()


def empty(config: VLMConfig) -> VLM:
    """The model of a configuration with parameters that take no memory; buffers are real."""
    with init_empty_weights(include_buffers=False):
        model = VLM(config)
    model.tie_weights()
    return model


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a checkpoint has to hold: every parameter and saved buffer, tied ones once."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if isinstance(model, VLM):
        shapes.pop(HEAD, None)
    return shapes


def check_fit(source: Source, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names, shapes and dtypes, before anything is read.

    Raises:
        CheckpointError: with the lists of missing, unexpected, mis-shaped and wrong-dtype tensors.
    """
    got = set(source.shapes) - ({HEAD} if HEAD not in wanted else set())
    problems = {
        "missing": sorted(set(wanted) - got),
        "unexpected": sorted(got - set(wanted)),
        "mis-shaped": [
            f"{name} {source.shapes[name]} for {shape}"
            for name, shape in sorted(wanted.items())
            if name in got and source.shapes[name] != shape
        ],
        "not float32, bfloat16 or float16": [
            f"{name} {dtype}" for name, dtype in sorted(source.dtypes.items()) if dtype not in FLOATS
        ],
    }
    found = [f"{len(names)} {what}: {shown(names)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{source.origin}: the weights do not fit the configuration: {'; '.join(found)}")


def shown(names: list[str]) -> str:
    """The first names, and how many follow."""
    return listed(names, SHOWN)


def _take_dtypes(model: VLM, source: Source) -> None:
    """Give the parameters, which have no memory yet, the dtypes of the file: what they take is planned by it."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        dtype = FLOATS.get(source.dtypes.get(name, ""))
        if tensor.is_meta and dtype is not None and tensor.dtype != dtype:
            put(model, name, torch.empty_like(tensor, dtype=dtype))
    model.tie_weights()


def _fill(
    model: VLM, source: Source, placement: Placement, devices: dict[str, Any] | None, allow_nonfinite: bool
) -> None:
    offloaded: dict[str, Any] = {}
    buffers = {name for name, _ in model.named_buffers()}  # accelerate keeps them in memory: running means of norms
    for name in progress(source.shapes, f"Loading {Path(source.origin).name}"):
        if name == HEAD:
            continue
        tensor = _converted(finite(source.read(name), name, source.origin, allow_nonfinite), placement)
        device = placement.device if devices is None else _device_of(name, devices)
        if device == "disk" and name in buffers:
            device = "cpu"
        if device == "disk":
            offload_weight(tensor, name, str(placement.offload_folder), index=offloaded)
        else:
            put(model, name, tensor.to(device))
    if HEAD in source.shapes:
        _check_stored_head(model, source, placement)
    if EMBEDDING in offloaded:  # accelerate looks for the tied name too
        tensor = _converted(source.read(EMBEDDING), placement)
        offload_weight(tensor, HEAD, str(placement.offload_folder), index=offloaded)
    if offloaded:
        save_offload_index(offloaded, str(placement.offload_folder))


def _converted(tensor: Tensor, placement: Placement) -> Tensor:
    return tensor if placement.dtype is None else tensor.to(placement.dtype)


def _check_stored_head(model: VLM, source: Source, placement: Placement) -> None:
    """A checkpoint may hold the output embedding too; it must be the input embedding."""
    embedding = model.model.language_model.embed_tokens.weight
    if embedding.is_meta:  # offloaded
        embedding = _converted(source.read(EMBEDDING), placement)
    if not torch.equal(source.read(HEAD).to(embedding), embedding):
        raise CheckpointError(
            f"{source.origin}: lm_head.weight differs from embed_tokens.weight; Gemma's output embedding is the input"
            f" embedding, this checkpoint was trained or saved untied and cannot be opened as it is"
        )


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter (or buffer) of this name, without a copy."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        setattr(module, leaf, tensor)


def finite(tensor: Tensor, name: str, origin: str, allow: bool) -> Tensor:
    """The tensor, if it holds no NaN and no infinity.

    Raises:
        CheckpointError: names the tensor.
    """
    if not allow and tensor.numel():
        lowest, highest = tensor.aminmax()  # NaN is passed on; no mask of the tensor's size is made
        if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
            raise CheckpointError(
                f"{origin}: tensor {name} holds NaN or infinity; the file is damaged or the training had diverged; take"
                f" an earlier checkpoint, or open it with --allow-nonfinite (allow_nonfinite=True)"
            )
    return tensor


def check_tied(model: VLM, origin: str) -> None:
    """Raise `CheckpointError` unless output and input embedding are one tensor."""
    if model.lm_head.weight is not model.model.language_model.embed_tokens.weight:
        raise CheckpointError(
            f"{origin}: the output embedding is not tied to the input embedding, as Gemma's is; set"
            " tie_word_embeddings to true in config.json and in its text_config"
        )


@torch.no_grad()
def check_embedding_scale(model: VLM) -> None:
    """Probe that the installed transformers multiplies embeddings by sqrt(D) inside the embedding layer.

    Versions before 5.4 multiplied in the decoder instead, image tokens included; running on such a version would be
    wrong by a factor of sqrt(D) in silence.

    Raises:
        ConfigError: the embedding layer does not scale.
    """
    layer: Any = model.get_input_embeddings()
    weight = layer.weight
    if weight.is_meta:  # offloaded; its scale was built with it
        scale = float(layer.embed_scale)
    else:
        row = int(weight.detach().abs().amax(dim=1).argmax())
        column = int(weight[row].abs().argmax())
        index = torch.tensor([[row]], device=weight.device)
        scale = float(layer(index)[0, 0, column].float() / weight[row, column].float())
    wanted = decoder.facts(model.config.text_config).embedding_scale
    if abs(scale / wanted - 1) > 0.02:  # bfloat16 has 8 bits
        import transformers

        raise ConfigError(
            f"transformers {transformers.__version__} scales token embeddings by {scale:.3g} instead of"
            f" sqrt(hidden_size) = {wanted:.3g}; install transformers>=5.17,<5.25"
        )


def progress(names: Mapping[str, Any], title: str) -> Iterator[str]:
    """The names, with a progress bar on stderr where transformers would show one."""
    bar = transformers_logging.tqdm(list(names), desc=title, unit="tensor", leave=False, delay=2)
    yield from bar


# --- several devices --------------------------------------------------------------------------------------------------


def _device_map(model: VLM, placement: Placement) -> dict[str, Any] | None:
    """Part name -> device for `placement.device_map`; None when all goes to one device."""
    asked = placement.device_map
    if asked is None:
        return None
    if isinstance(asked, str):
        if asked != "auto":
            raise ConfigError(f"device_map is {asked!r}, expected 'auto' or a map from part names to devices")
        if not torch.cuda.is_available() and placement.max_memory is None:
            return None  # everything fits nowhere else
        blocks = list(model._no_split_modules or [])
        memory: Any = get_balanced_memory(
            model, dict(placement.max_memory) if placement.max_memory else None, blocks, placement.dtype
        )
        devices = dict(infer_auto_device_map(model, memory, blocks, dtype=placement.dtype))
    else:
        devices = dict(asked)
    if "disk" in devices.values():
        if placement.offload_folder is None:
            raise ConfigError("parts of the model go to disk, but there is no folder for them; pass offload_folder=")
        Path(placement.offload_folder).mkdir(parents=True, exist_ok=True)
    for name in expected_shapes(model):
        _device_of(name, devices)
    _place_head(devices, asked)
    return _without_overlap(model, devices)


def _without_overlap(model: VLM, devices: dict[str, Any]) -> dict[str, Any]:
    """The same map with names of which none lies inside another: accelerate would move the whole of the outer one."""
    if not any(_inside(one, other) for one in devices for other in devices):
        return devices
    parted: dict[str, Any] = {}

    def place(name: str, module: nn.Module) -> None:
        own = [f"{name}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False)]
        if not any(_inside(key, name) for key in devices):
            parted[name] = _device_of(name, devices)
            return
        for leaf in own:
            parted[leaf] = _device_of(leaf, devices)
        for child, inner in module.named_children():
            place(f"{name}.{child}".lstrip("."), inner)

    place("", model)
    return parted


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(outer + "."))


def _place_head(devices: dict[str, Any], asked: str | Mapping[str, Any]) -> None:
    """The output embedding is the input embedding: one tensor, on one device.

    Raises:
        ConfigError: a map that puts them on two.
    """
    module, table = HEAD.rpartition(".")[0], _device_of(EMBEDDING, devices)
    try:
        head = _device_of(HEAD, devices)
    except ConfigError:  # a map need not name what it has placed already
        devices[module] = table
        return
    if _canonical(head) == _canonical(table):
        return
    if not isinstance(asked, str):
        raise ConfigError(
            f"device_map puts {module} on {head!r} and {EMBEDDING.rpartition('.')[0]} on {table!r}; they are one"
            f" tensor (Gemma's output embedding is its input embedding): give both the same device"
        )
    devices.pop(HEAD, None)
    devices[module] = table


def _canonical(device: Any) -> str:
    if isinstance(device, str) and device == "disk":
        return device
    place = torch.device(device)
    return str(torch.device(place.type, place.index or 0)) if place.type != "cpu" else "cpu"


def _device_of(name: str, devices: Mapping[str, Any]) -> Any:
    prefix = name
    while prefix not in devices:
        if not prefix:
            raise ConfigError(f"device_map has no device for {name}; add it or one of its parents ('' is the whole)")
        prefix = prefix.rpartition(".")[0]
    return devices[prefix]
