"""Model and processor that belong together."""

from __future__ import annotations

from typing import Any

from vlm.errors import CheckpointError
from vlm.images.transforms import ImageTransform
from vlm.model.config import VLMConfig
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor
from vlm.model.projecting import full_settings


def check_pair(path: str, config: VLMConfig, processor: Processor) -> None:
    """Model and processor must agree on the placeholder, the vocabulary, the image size and the projector.

    Raises:
        CheckpointError: names the number that differs.
    """
    tokenizer = processor.tokenizer
    if processor.image_token_id != config.image_token_id:
        raise CheckpointError(
            f"{path}: <image> is id {processor.image_token_id} in the tokenizer, image_token_id"
            f" {config.image_token_id} in config.json; use the"
            " tokenizer that belongs to the model"
        )
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.text_config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has id {highest}, the embedding only {config.text_config.vocab_size} rows; use"
            f" the tokenizer that belongs to the model"
        )
    transform = processor.image_transform
    _check_sizes(path, config.encoder, config.vision_config, transform)
    _check_members(path, config, transform)
    if transform.any_aspect != encoder_spec(config.encoder).any_aspect:
        raise CheckpointError(f"{path}: image mode {transform.mode!r} does not fit encoder {config.encoder!r}")
    if full_settings(processor.projector) != full_settings(config.projector_config):
        raise CheckpointError(
            f"{path}: the model's projector is {config.projector_config}, the processor counts image tokens for"
            f" {processor.projector}; make it with Processor(tokenizer, image_transform, model.config.projector_config)"
        )


def _check_sizes(path: str, kind: str, vision: Any, transform: ImageTransform) -> None:
    sizes = {"patch_size": vision.patch_size, "image_size": encoder_spec(kind).image_size(vision)}
    for name, wanted in sizes.items():
        got = getattr(transform, name)
        if wanted is not None and got is not None and wanted != got:
            raise CheckpointError(
                f"{path}: the tower has {name} {wanted}, the processor's image_transform {got}; they must be equal"
            )


def _check_members(path: str, config: VLMConfig, transform: ImageTransform) -> None:
    """A fused tower's members, one by one, and the grid of the features."""
    spec = encoder_spec(config.encoder)
    towers, members = spec.members(config.vision_config), transform.members
    if len(towers) != len(members):
        raise CheckpointError(
            f"{path}: the tower has {len(towers)} fused members, the processor's image_transform {len(members)}; they"
            f" must be equal"
        )
    for (kind, tower), member in zip(towers, members, strict=True):
        _check_sizes(path, kind, tower, member)
    if towers and spec.grid(config.vision_config) != transform.grid(0, 0):
        raise CheckpointError(
            f"{path}: the tower has the grid {spec.grid(config.vision_config)}, the processor's image_transform"
            f" {transform.grid(0, 0)}; they must be equal"
        )
