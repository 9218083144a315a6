"""What makes one model differ from another: weights, configuration and processor, each as a digest.

Everything that keeps results, goes on with them or compares them asks here, so that no part of a model is forgotten in
one place and counted in another. Where a model lies, who saved it with which version, and how many files it has are no
part of it: a directory that was moved, or saved again, is the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from vlm.checkpoints.digests import canonical, of_module, of_tensors, of_tokenizer, of_values
from vlm.checkpoints.files import INDEX, read_json
from vlm.checkpoints.places import HUB_FILES
from vlm.data import content
from vlm.encoders.contract import RUNNING
from vlm.model.dtypes import dtype_name
from vlm.model.projecting import full_settings

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

    from vlm.images.transforms import ImageTransform
    from vlm.model.forward import VLM
    from vlm.model.processor import Processor

RECORDS = ("manifest.json", "training.json", "parity.json", "generation_config.json", INDEX)
"""Files of a checkpoint that are about it; nothing is read from them."""
GIVEN_BY_THE_PROCESSOR = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Of a model's generation settings: `vlm.generation` sets them itself for every text."""


def of_model(model: VLM, processor: Processor) -> dict[str, Any]:
    """What decides the texts and scores of a model beside the settings of the call, as JSON values.

    The attention backends are told apart too: they change the last bits of every number.

    Returns:
        `weights_sha256`, `config_sha256`, `processor_sha256`; `dtype` and `attention` in words; `generation`, what the
        model's own generation settings hold that a call leaves open.
    """
    return {
        "weights_sha256": of_weights(model),
        "config_sha256": of_config(model.config),
        "processor_sha256": of_processor(processor),
        "dtype": ", ".join(sorted({dtype_name(parameter.dtype) for parameter in model.parameters()})),
        "attention": {
            "vision_tower": model.config.vision_config._attn_implementation,
            "decoder": model.config.text_config._attn_implementation,
        },
        "generation": _generation_settings(model),
    }


def of_parts(model: VLM, transform: ImageTransform) -> dict[str, str]:
    """Tower, projector and decoder, each with its own weights and settings: part -> sha256.

    Args:
        transform: what images become before they enter the tower; a tower with another one sees other pixels.
    """
    config, parts = model.config, model.parts()
    softcaps = [config.softcap_in_loss, config.softcap_in_generation]
    settings = {
        "encoder": [*tower_settings(model), transform.to_dict()],
        "projector": full_settings(config.projector_config),
        "decoder": [canonical(config.text_config.to_dict()), config.image_token_id, softcaps],
    }
    return {name: of_values([of_module(parts[name]), value]) for name, value in settings.items()}


def tower_settings(model: VLM) -> list[Any]:
    """What features depend on beside the tower's weights and the image transform, as JSON values."""
    return [model.config.encoder, canonical(model.config.vision_config.to_dict())]


def of_config(config: PreTrainedConfig) -> str:
    """sha256 over every setting of an architecture, without notes of whoever saved it."""
    values = canonical(config.to_dict())
    projector = values.get("projector_config")
    if isinstance(projector, dict):  # a setting left out is its default
        values["projector_config"] = full_settings(projector)
    return of_values(values)


def of_processor(processor: Processor) -> str:
    """sha256 over the tokenizer, every number of the image transform, and the rule for image tokens."""
    return of_values(
        [of_tokenizer(processor.tokenizer), processor.image_transform.to_dict(), full_settings(processor.projector)]
    )


def of_checkpoint(path: Path) -> str:
    """sha256 over what a checkpoint on the disk (a directory, or a file) holds, without opening it as a model: bytes of
    weights and tokenizers, and configurations without their notes."""
    if not path.is_dir():
        return content.of_file(path)
    names = sorted(file.name for pattern in HUB_FILES for file in path.glob(pattern) if file.name not in RECORDS)
    files = {name: content.of_file(path / name) for name in names if name != "config.json"}
    settings = canonical(read_json(path / "config.json")) if "config.json" in names else None
    return of_values([settings, files])


def of_weights(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and saved buffers, in the order of their names."""
    return of_tensors(_saved(model))


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name, brought from where they are offloaded one module at a time."""
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not tensor.is_meta:
            yield name, tensor
            continue
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        with align_module_device(module, torch.device("cpu")):
            yield name, getattr(module, leaf)


def _generation_settings(model: VLM) -> dict[str, Any]:
    """transformers fills what a call leaves open from the model's own generation settings."""
    own = getattr(model, "generation_config", None)
    if own is None:
        return {}
    ignored = (*GIVEN_BY_THE_PROCESSOR, *RUNNING, "_from_model_config", "use_cache", "max_length")
    settings: dict[str, Any] = canonical(own.to_diff_dict())
    return {key: value for key, value in settings.items() if key not in ignored}
