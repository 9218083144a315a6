"""Configurations out of checkpoint files: checked and bounded before anything is built from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlm.checkpoints.checks import NOTES, check_numbers, check_text, guarded
from vlm.errors import CheckpointError, ConfigError
from vlm.model import decoder
from vlm.model.config import VLMConfig
from vlm.model.parts import encoder_spec


def check_layers(config: VLMConfig, names: Iterable[str], origin: str) -> None:
    """Compare the numbers of layers with the tensors' names, before layers are built.

    Raises:
        CheckpointError: they differ.
    """
    listed = list(names)
    for prefix, part_config in (
        ("model.language_model.layers.", config.text_config),
        ("model.vision_tower.encoder.layers.", config.vision_config),
    ):
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        found = {int(match[1]) for name in listed if (match := pattern.match(name))}
        if found and found != set(range(part_config.num_hidden_layers)):
            raise CheckpointError(
                f"{origin}: config.json says {part_config.num_hidden_layers} layers in {prefix.rsplit('.', 2)[0]}, the"
                f" weights have layers {min(found)} to {max(found)} ({len(found)}); the two do not belong together"
            )


LARGEST_PROJECTOR_SETTING = 4096
"""Depths, counts of queries and the like; a wrong number must not build layers for hours."""


def own_config(values: Mapping[str, Any], where: str) -> VLMConfig:
    """`VLMConfig` of a directory that this library wrote.

    Raises:
        CheckpointError: values that are missing, of a wrong type or out of range.
    """
    check_numbers({"num_labels": values.get("num_labels")}, where)
    for key in ("text_config", "vision_config"):
        check_numbers(values.get(key), f"{where}: {key}")
        if not isinstance(values[key].get("dtype"), str | None):
            raise CheckpointError(
                f"{where}: {key}.dtype is {values[key]['dtype']!r}, expected a name such as 'float32'"
            )
    members = values["vision_config"].get("members")
    for number, member in enumerate(members if isinstance(members, list) else ()):
        if isinstance(member, dict):  # what else there may be is refused by the configuration itself
            check_numbers(member.get("config"), f"{where}: vision_config.members[{number}].config")
    check_text(values["text_config"], f"{where}: text_config")
    projector = values.get("projector_config") or {}
    for key, value in projector.items() if isinstance(projector, dict) else ():
        if isinstance(value, int) and value > LARGEST_PROJECTOR_SETTING:
            raise CheckpointError(f"{where}: projector_config.{key} is {value}, at most {LARGEST_PROJECTOR_SETTING}")
    for key in ("softcap_in_loss", "softcap_in_generation"):
        if not isinstance(values.get(key, False), bool):
            raise CheckpointError(f"{where}: {key} is {values[key]!r}, expected true or false")
    if "image_token_id" not in values:
        raise CheckpointError(f"{where}: no image_token_id; write the tokenizer's id of <image>")
    return guarded(lambda: VLMConfig.from_dict(dict(values)), where)


def paligemma_config(values: Mapping[str, Any], where: str) -> VLMConfig:
    """`VLMConfig` of a PaliGemma 1 or 2 `config.json`.

    transformers' own defaults for what a file leaves out are not used where they are wrong: a missing vision_config is
    the published So400m/14 (intermediate_size 4304, not 4096), a missing image_token_index is left to the tokenizer
    (not 256000, which is `<loc0000>`). Gemma 2 gets no sliding window: the original has none, and at 896 px
    transformers' window of 4096 would hide image rows from the text (big_vision `models/ppp/gemma.py`). An export
    of a model that uses the window says so and keeps it.

    Raises:
        CheckpointError: values that are missing, of a wrong type or out of range.
    """
    text, vision = values.get("text_config"), values.get("vision_config")
    if text is None:
        raise CheckpointError(f"{where}: no text_config; a PaliGemma configuration names its Gemma decoder there")
    vision = {**SO400M, "image_size": 224} if vision is None else vision
    check_numbers({"num_labels": values.get("num_labels")}, where)
    check_numbers(text, f"{where}: text_config")
    check_text(text, f"{where}: text_config")
    check_numbers(vision, f"{where}: vision_config")
    return guarded(lambda: _paligemma(dict(values), dict(text), dict(vision)), where)


SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
"""SigLIP So400m/14 (big_vision `models/vit.py`), the tower of every published PaliGemma."""
WINDOW_IN_USE = "vlm_sliding_window"
"""Set in an exported configuration whose model does use Gemma 2's window; no published file has it."""


def _paligemma(values: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> VLMConfig:
    if vision.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise ConfigError(f"vision_config.model_type is {vision['model_type']!r}, PaliGemma has 'siglip_vision_model'")
    for key in (*NOTES, "model_type", "num_image_tokens", "projection_dim", "projector_hidden_act"):
        vision.pop(key, None)
    for key in (*NOTES, "num_image_tokens", "use_bidirectional_attention"):
        text.pop(key, None)
    if text.get("layer_types") is None:
        text.pop("layer_types", None)
    text.setdefault("model_type", "gemma")
    # The file's top level repeats some of the decoder's ids; the decoder's own win.
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if key in values:
            text.setdefault(key, values[key])
    text_config = decoder.read_config(text)
    spec = decoder.spec(text_config)
    if not spec.window_in_paligemma and values.get(WINDOW_IN_USE) is not True:
        spec.drop_window(text_config, None)
    return VLMConfig(
        encoder="siglip",
        vision_config=encoder_spec("siglip").config(**{**vision, "vision_use_head": False}),
        projector_config={"kind": "linear"},
        text_config=text_config,
        image_token_id=values.get("image_token_index", values.get("image_token_id")),
        dtype=_dtype_name(values.get("dtype", values.get("torch_dtype"))),
    )


def _dtype_name(value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"dtype is {value!r}, expected a name such as 'bfloat16'")
    return value
