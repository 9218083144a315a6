"""`vlm.save`: a model directory that is the old one or the new one, whole, at every instant.

Everything is written beside its place and put there in one step. What could not be opened again is refused before: a
model that is no `VLM` (one with adapters around it), parameters under other names, values that are no numbers,
quantised ones, an output embedding that is not the input embedding, a configuration that the files cannot hold.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoints import configs, identity, manifest
from vlm.checkpoints.files import INDEX, read_json
from vlm.checkpoints.live import State
from vlm.checkpoints.loader import empty
from vlm.checkpoints.names import HEAD
from vlm.checkpoints.pairs import check_pair
from vlm.checkpoints.placement import EMBEDDING
from vlm.checkpoints.readers import READERS
from vlm.checkpoints.shards import widest, write_shards
from vlm.checkpoints.source import FLOATS, SHOWN, expected_shapes
from vlm.checkpoints.tower_head import HEAD_FILE, write_head
from vlm.checkpoints.weights import ADAPTER_NAMES
from vlm.errors import CheckpointError, ConfigError
from vlm.files import disk_errors, publishing, rust_disk_errors
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM, VLMModel
from vlm.model.processor import Processor, not_a_processors
from vlm.settings import parse_size
from vlm.words import listed

OWN_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    HEAD_FILE,
    manifest.NAME,
    "preprocessor_config.json",
)
"""What a model directory is made of beside a processor's files; these go when a model is saved over it, others stay."""
WRAPPED = ("_orig_mod", "module")
"""Where torch.compile and torch's wrappers for several processes keep the model that they wrap."""


def save(
    model: VLM,
    processor: Processor,
    path: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    allow_nonfinite: bool = False,
) -> Path:
    """Write a model directory that `load` and transformers' Auto classes open bit for bit, each tensor in its dtype.

    A model that is there already is replaced in one step; a kill leaves the old or the new one. Files that are no part
    of a model stay. Offloaded weights are read one shard at a time.

    Args:
        max_shard_size: of a safetensors file, such as `5GB`.
        allow_nonfinite: write weights that hold NaN or infinity; `load` opens them with the same setting only.

    Returns:
        the directory.

    Raises:
        ConfigError: not a `VLM` and a `Processor`, or no size.
        CheckpointError: what was written could not be opened again as the same model. What is at `path` is untouched.
        DiskError: the disk refuses; what is at `path` is untouched.
    """
    folder = Path(path)
    check(model, processor, str(path))
    parse_size(max_shard_size)
    with disk_errors(folder), publishing(folder, keep=_stays) as staging:
        write(model, processor, staging, str(path), max_shard_size, allow_nonfinite)
    return folder


def write(
    model: VLM,
    processor: Processor,
    folder: Path,
    name: str,
    max_shard_size: str | int = "5GB",
    allow_nonfinite: bool = False,
) -> None:
    """Write all files of a model directory into an empty one, the manifest last.

    Args:
        name: of the directory, for messages.
    """
    state = State(model)
    with rust_disk_errors():
        _write_configs(model, state, folder, name)
        processor.write(folder)
        _check_reopened(model, processor, folder, name)
        kept = {key: tensor for key, tensor in state.headers.items() if key != HEAD}
        write_shards(folder, kept, None, max_shard_size, read=state.__getitem__, allow_nonfinite=allow_nonfinite)
        write_head(folder, model.tower_head)
        manifest.write(folder)


def _stays(name: str) -> bool:
    return not_a_processors(name) and not any(fnmatch(name, pattern) for pattern in OWN_FILES)


def _write_configs(model: VLM, state: State, folder: Path, name: str) -> None:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [VLM.__name__]
    # For readers that know one dtype only: none of the tensors loses anything in it.
    config.dtype = widest(tensor.dtype for tensor in state.headers.values())
    config.save_pretrained(folder)
    try:
        model.generation_config.save_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(
            f"{name}: model.generation_config contradicts itself ({' '.join(str(error).split())[:300]}); mend it, or"
            f" set model.generation_config = transformers.GenerationConfig()"
        ) from error


def _check_reopened(model: VLM, processor: Processor, folder: Path, name: str) -> None:
    """Read configuration and processor back: they must say what the model in memory does."""
    values = read_json(folder / "config.json")
    try:
        config, again = READERS[VLMConfig.model_type](folder, values)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{name}: not saved, it could not be opened again: {error}") from error
    changed = [
        what
        for what, one, two in (
            ("the configuration", identity.of_config(config), identity.of_config(model.config)),
            ("the image transform", again.image_transform, processor.image_transform),
            ("the vocabulary", again.tokenizer.get_vocab(), processor.tokenizer.get_vocab()),
            ("the end token", again.tokenizer.eos_token_id, processor.tokenizer.eos_token_id),
        )
        if one != two
    ]
    if changed:
        raise CheckpointError(
            f"{name}: not saved, it would be another model when it is opened again: {' and '.join(changed)} would"
            f" differ; take settings back that configuration and tokenizer files cannot hold"
        )


# --- what is refused before anything is written -----------------------------------------------------------------------


def check(model: VLM, processor: Processor, name: str) -> None:
    """Refuse what a directory could not give back.

    Args:
        name: of the directory, for messages.

    Raises:
        ConfigError: not a `VLM` and a `Processor`. CheckpointError: names the tensors or numbers.
    """
    _check_class(model, name)
    if not isinstance(processor, Processor):
        raise ConfigError(f"{name}: the processor is a {type(processor).__name__}, expected a vlm.Processor")
    check_pair(name, model.config, processor)
    state = State(model)
    _check_values(state.headers, name)
    state.check()
    wanted: Mapping[str, tuple[int, ...]] = configs.guarded(
        lambda: expected_shapes(empty(VLM, copy.deepcopy(model.config))), f"{name}: the model's configuration"
    )
    _check_names({key: tuple(value.shape) for key, value in state.headers.items() if key != HEAD}, wanted, name)
    _check_tied(state, name)


def _check_class(model: Any, name: str) -> None:
    kind = type(model).__name__
    if isinstance(model, VLM):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ConfigError(
                f"{name}: the model has adapters (LoRA) that are not merged; take them out of it, or open them with"
                f" peft, merge them (merge_and_unload) and save the result"
            )
        return
    if hasattr(model, "merge_and_unload"):
        raise ConfigError(
            f"{name}: a {kind} is a model with adapters (LoRA) around it; merge them first:"
            f" vlm.save(model.merge_and_unload(), processor, {name!r}), or save the adapters alone:"
            f" model.save_pretrained({name!r})"
        )
    for attribute in WRAPPED:
        if isinstance(getattr(model, attribute, None), VLM):
            raise ConfigError(f"{name}: a {kind} wraps the model; save model.{attribute}")
    if isinstance(model, VLMModel):
        raise ConfigError(f"{name}: a {kind} is a model without its output layer; save the vlm.VLM that it belongs to")
    raise ConfigError(f"{name}: the model is a {kind}, expected a vlm.VLM; `vlm import` converts published models")


def _check_values(headers: Mapping[str, Tensor], name: str) -> None:
    odd = [
        f"{key} {str(tensor.dtype).removeprefix('torch.')}"
        for key, tensor in sorted(headers.items())
        if tensor.dtype not in FLOATS.values() or type(tensor) not in (Tensor, torch.nn.Parameter)
    ]
    if odd:
        raise CheckpointError(
            f"{name}: {len(odd)} tensors are no plain float32, bfloat16 or float16 and could not be opened again:"
            f" {listed(odd, SHOWN)}; save the model before it is quantised or sharded, or convert it (float64:"
            f" model.float())"
        )


def _check_names(got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], name: str) -> None:
    problems = {
        "are not there": sorted(set(wanted) - set(got)),
        "are no part of it": sorted(set(got) - set(wanted)),
        "have another shape": [f"{key} {got[key]}" for key in sorted(got) if wanted.get(key, got[key]) != got[key]],
    }
    adapters = sorted(key for key in got if ADAPTER_NAMES.search(key))
    if adapters:
        raise CheckpointError(
            f"{name}: the model has adapters (LoRA) that are not merged: {', '.join(adapters[:3])} and others; save"
            f" what merge_and_unload() returns, or the adapters alone with peft"
        )
    found = [f"{len(names)} {what}: {listed(names, SHOWN)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"{name}: the model's tensors are not those of its configuration, and could not be opened again:"
            f" {'; '.join(found)}; something wraps or replaces parts of the model, or its configuration was changed:"
            f" undo it first"
        )


def _check_tied(state: State, name: str) -> None:
    """One embedding is written for input and output."""
    head, table = state.headers.get(HEAD), state.headers[EMBEDDING]
    if head is None or head is table or (not head.is_meta and head.data_ptr() == table.data_ptr()):
        return
    if not torch.equal(state[HEAD].to("cpu"), state[EMBEDDING].to("cpu")):
        raise CheckpointError(
            f"{name}: lm_head.weight is not the input embedding, as Gemma's is, and a directory holds one for both;"
            f" tie them again (model.tie_weights()) if the output embedding may go"
        )
