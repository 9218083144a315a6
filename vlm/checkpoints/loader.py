"""Fill a model from tensors, strictly: nothing missing, nothing left over, nothing drawn at random.

The model is built without memory (meta device) and compared with the tensors' names, shapes and dtypes first. Then one
tensor at a time is read, converted, checked for NaN and infinity and put in its place, so the peak is one copy of the
model and one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.utils import offload_weight, save_offload_index
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from vlm.checkpoints.checks import guarded
from vlm.checkpoints.names import EMBEDDING, HEAD
from vlm.checkpoints.placement import Placement, device_map, device_of
from vlm.checkpoints.shards import widest
from vlm.checkpoints.source import FLOATS, Source, check_fit, expected_shapes, finite, put
from vlm.errors import CheckpointError, ConfigError
from vlm.model import decoder

M = TypeVar("M", bound=PreTrainedModel)
READ_PAST_MODULES = ["MultiheadAttention", "Attention", "EvaAttention", "BeitAttention"]
"""Classes of torch, open_clip and timm that read matrices of modules inside them without calling these: offloaded, they
are brought in whole."""


def load_model(
    kind: type[M],
    config: PreTrainedConfig,
    source: Source,
    placement: Placement | None = None,
    *,
    allow_nonfinite: bool = False,
    before_reading: Callable[[], None] = lambda: None,
) -> M:
    """Build the model of a configuration and fill it from a source; in eval mode, tied, embedding scale probed.

    Args:
        kind: the model's class, `VLM`; its parameters have the names of `vlm.checkpoints.names`.
        before_reading: called when names, shapes and dtypes are known to fit and no weight is read yet.

    Raises:
        CheckpointError: missing, unexpected, mis-shaped, quantised or non-finite tensors, with the lists; an output
            embedding that is not the tied one.
    """
    placement = placement or Placement()
    model: M = guarded(lambda: empty(kind, config), f"{source.origin}: config.json")
    check_fit(source, expected_shapes(model))
    before_reading()
    if placement.dtype is None:
        _take_dtypes(model, source)
    devices = device_map(model, placement)
    _fill(model, source, placement, devices, allow_nonfinite)
    model.tie_weights()  # again: `put` has replaced the embedding, and the output embedding still is the old one
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


def empty(kind: type[M], config: PreTrainedConfig) -> M:
    """The model of a configuration with parameters that take no memory; buffers are real, because nothing fills them
    later: they are computed when a module is built."""
    with init_empty_weights(include_buffers=False):
        model = kind(config)
    model.tie_weights()
    return model


def _take_dtypes(model: PreTrainedModel, source: Source) -> None:
    """Give the parameters, which have no memory yet, the dtypes of the file: what they take is planned by it."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        dtype = FLOATS.get(source.dtypes.get(name, ""))
        if tensor.is_meta and dtype is not None and tensor.dtype != dtype:
            put(model, name, torch.empty_like(tensor, dtype=dtype))
    model.tie_weights()  # an untied head would count twice where devices are planned


def _fill(
    model: PreTrainedModel, source: Source, placement: Placement, devices: dict[str, Any] | None, allow_nonfinite: bool
) -> None:
    offloaded: dict[str, Any] = {}
    buffers = {name for name, _ in model.named_buffers()}  # accelerate keeps them in memory: running means of norms
    for name in progress(source.shapes, f"Loading {Path(source.origin).name}"):
        if name == HEAD:
            continue
        tensor = _converted(finite(source.read(name), name, source.origin, allow_nonfinite), placement)
        device = placement.device if devices is None else device_of(name, devices)
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


def _check_stored_head(model: nn.Module, source: Source, placement: Placement) -> None:
    """A checkpoint may hold the output embedding too; it must be the input embedding."""
    embedding: Tensor = model.get_parameter(EMBEDDING)
    if embedding.is_meta:  # offloaded
        embedding = _converted(source.read(EMBEDDING), placement)
    if not torch.equal(source.read(HEAD).to(embedding), embedding):
        raise CheckpointError(
            f"{source.origin}: lm_head.weight differs from embed_tokens.weight; Gemma's output embedding is the input"
            f" embedding, this checkpoint was trained or saved untied and cannot be opened as it is"
        )


def check_tied(model: nn.Module, origin: str) -> None:
    """Raise `CheckpointError` unless output and input embedding are one tensor."""
    if model.get_parameter(HEAD) is not model.get_parameter(EMBEDDING):
        raise CheckpointError(
            f"{origin}: the output embedding is not tied to the input embedding, as Gemma's is; set"
            " tie_word_embeddings to true in config.json and in its text_config"
        )


@torch.no_grad()
def check_embedding_scale(model: PreTrainedModel) -> None:
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
