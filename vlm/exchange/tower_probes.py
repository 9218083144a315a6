"""Running both sides of a tower's export, the tower and what its library opens, on the same images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)

from vlm.checkpoints.files import read_json
from vlm.exchange.samples import Outputs, add, evaluating, pictures
from vlm.exchange.theirs import tower_backend
from vlm.images.transforms import ImageTransform


def tower_in_float32(tower: Any, dtype: torch.dtype) -> nn.Module:
    """The tower that the written file holds, in float32: its weights rounded to `dtype`. The tower itself where that
    changes nothing, else a copy."""
    attention = tower_backend(tower)
    if is_float32(tower) and dtype == torch.float32 and tower.config._attn_implementation == attention:
        return cast(nn.Module, tower)
    config = copy.deepcopy(tower.config)
    copied: nn.Module = type(tower)._from_config(config, attn_implementation=attention, dtype=torch.float32)
    copied.load_state_dict({name: tensor.to(dtype).float() for name, tensor in tower.state_dict().items()})
    return copied.to(next(tower.parameters()).device)


def is_float32(module: nn.Module) -> bool:
    """All parameters are."""
    return all(parameter.dtype == torch.float32 for parameter in module.parameters())


def tower_inputs(transform: ImageTransform) -> Outputs:
    """Pixels that this library's transform makes of the pictures."""
    return {"pixels": [transform([picture]).pixel_values[0] for picture in pictures()]}


def written_tower_inputs(folder: Path) -> Outputs:
    """The same from transformers' own image processor; of NaFlex only the real patches. Nothing where the directory is
    another library's."""
    if not (folder / "preprocessor_config.json").exists():
        return {}
    kind = read_json(folder / "preprocessor_config.json")["image_processor_type"]
    classes: dict[str, Any] = {
        "CLIPImageProcessor": CLIPImageProcessorPil,
        "SiglipImageProcessor": SiglipImageProcessorPil,
        "Siglip2ImageProcessor": Siglip2ImageProcessorPil,
    }
    preprocess = classes[kind].from_pretrained(str(folder), local_files_only=True)
    out: Outputs = {}
    for picture in pictures():
        made = preprocess(images=[picture], return_tensors="pt")
        real = made["pixel_attention_mask"][0].bool() if "pixel_attention_mask" in made else slice(None)
        add(out, "pixels", made["pixel_values"][0][real])
    return out


def run_tower(tower: nn.Module, transform: ImageTransform, dtype: torch.dtype) -> Outputs:
    """Features of a tower, its weights rounded to `dtype`; NaFlex images come one by one, without padding."""
    device = next(tower.parameters()).device
    tower = tower_in_float32(tower, dtype)
    with evaluating(tower):
        return {"tower features": [tower(**inputs).features.cpu() for inputs in _pixels(transform, device)]}


def run_written_tower(model: nn.Module, features: Callable[..., Tensor], transform: ImageTransform) -> Outputs:
    """The same from the library's own tower, on the same pixels; `features` are read off it."""
    device = next(model.parameters()).device
    with evaluating(model):
        return {"tower features": [features(model, **inputs).cpu() for inputs in _pixels(transform, device)]}


def _pixels(transform: ImageTransform, device: torch.device) -> Iterator[dict[str, Tensor]]:
    for picture in pictures():
        pixels = transform([picture])._asdict()
        yield {name: value.to(device) for name, value in pixels.items() if isinstance(value, Tensor)}
