"""Configuration and processor of a model directory, by the kind that its configuration states."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vlm.checkpoints import configs
from vlm.checkpoints.files import read_json
from vlm.checkpoints.preprocessing import open_tokenizer, own_transform, paligemma_transform
from vlm.errors import CheckpointError, ConfigError
from vlm.images.transforms import ImageTransform
from vlm.model import decoder
from vlm.model.config import VLMConfig
from vlm.model.processor import CONFIG_NAME as PROCESSOR_CONFIG
from vlm.model.processor import Processor

logger = logging.getLogger(__name__)
LONGEST_TEXT = 1024
"""Text tokens beside an image that a model is expected to see; decides whether a sliding window would matter."""


def _own(folder: Path, values: dict[str, Any]) -> tuple[VLMConfig, Processor]:
    config = configs.own_config(values, str(folder / "config.json"))
    transform, stored = own_transform(folder), read_json(folder / PROCESSOR_CONFIG)
    # A file from before the processor knew its projector means the model's.
    return config, _processor(folder, transform, stored.get("projector", config.projector_config))


def _paligemma(folder: Path, values: dict[str, Any]) -> tuple[VLMConfig, Processor]:
    config = configs.paligemma_config(values, str(folder / "config.json"))
    processor = _processor(folder, paligemma_transform(folder, config.vision_config))
    if config.image_token_id is None:
        config.image_token_id = processor.image_token_id
    note_sliding_window(config, processor)
    return config, processor


def _processor(
    folder: Path, transform: ImageTransform | dict[str, Any], projector: dict[str, Any] | None = None
) -> Processor:
    tokenizer = open_tokenizer(folder)
    try:
        return Processor(tokenizer, transform, projector)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error


READERS = {VLMConfig.model_type: _own, "paligemma": _paligemma}
"""How a directory is read, by the `model_type` of its configuration."""


def note_sliding_window(config: VLMConfig, processor: Processor) -> None:
    """Say so where following the original (no sliding window in PaliGemma 2) changes results."""
    facts = decoder.facts(config.text_config)
    if decoder.spec(config.text_config).window_in_paligemma or facts.window is None or facts.windowed:
        return
    tokens = processor.image_transform.max_patches
    if tokens + LONGEST_TEXT > facts.window:
        logger.info(
            "%d image tokens: all layers see the whole sequence, as in the original PaliGemma 2; transformers would"
            " hide what is more than %d tokens back in every other layer",
            tokens,
            facts.window,
        )
