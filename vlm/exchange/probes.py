"""Running an export's two sides, the model and what transformers opens, on the same images and prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    GenerationConfig,
    PaliGemmaForConditionalGeneration,
    Siglip2ImageProcessorPil,
    Siglip2VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from vlm.checkpoints.files import read_json
from vlm.checkpoints.loader import load_model
from vlm.checkpoints.placement import Placement
from vlm.checkpoints.source import Source, expected_shapes
from vlm.errors import CheckpointError, ConfigError
from vlm.images.transforms import ImageTransform
from vlm.model import decoder
from vlm.model.forward import VLM
from vlm.model.processor import Processor

NEW_TOKENS = 16
"""Greedy tokens per sample."""
Outputs = dict[str, list[Tensor]]
"""Quantity -> one tensor per sample."""
ID_TENSORS = ("input_ids", "token_type_ids", "labels")
BACKENDS = ("sdpa", "eager")
TOWERS = (
    *(SiglipVisionModel, Siglip2VisionModel, CLIPVisionModel, CLIPVisionModelWithProjection),
    *(Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel),
)
READERS: dict[str, Any] = {kind.__name__: kind for kind in (PaliGemmaForConditionalGeneration, *TOWERS)}
"""transformers' classes by the name that config.json gives."""
SAMPLES = [
    ("caption en", "a red circle on a slope", (320, 240)),
    ("answer en how many squares are there?", "12", (96, 200)),
    ("detect circle ; square", "<loc0100><loc0200><loc0500><loc1023> circle", (64, 64)),
]
"""(prompt, suffix for the loss, width and height of the picture)."""


def pictures() -> list[Image.Image]:
    """One picture per sample, always the same: a slope with a disc, stripes with noise, a chequerboard in colour."""
    drawn = []
    for index, (_, _, (width, height)) in enumerate(SAMPLES):
        y, x = np.mgrid[0:height, 0:width]
        noise = np.random.default_rng(index).integers(0, 60, (height, width, 3))
        slope = np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], axis=-1)
        disc = ((x - width / 2) ** 2 + (y - height / 3) ** 2 < (min(width, height) / 4) ** 2)[..., None]
        cells = ((x // 8 + y // (8 + index)) % 2)[..., None] * np.array([200, 90, 40])
        values = [np.where(disc, [220, 30, 30], slope), 0.5 * cells + noise, cells + 30][index]
        drawn.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return drawn


def backends(config: Any) -> dict[str, str]:
    """The attention code both sides run on: the model's own, or eager for kernels that do not exist in float32."""
    own = {name: getattr(config, name)._attn_implementation for name in ("vision_config", "text_config")}
    return {name: kind if kind in BACKENDS else "eager" for name, kind in own.items()}


def in_float32(model: VLM, dtype: torch.dtype) -> VLM:
    """The model that the written file holds, in float32: its weights rounded to `dtype`. The model itself where that
    changes nothing, else a copy."""
    parts = (model.config.vision_config, model.config.text_config)
    runs = {part._attn_implementation for part in parts} <= set(BACKENDS)
    if _is_float32(model) and dtype == torch.float32 and runs:
        return model
    state = model.state_dict()
    shapes = expected_shapes(model)
    source = Source(
        "this model", shapes, dict.fromkeys(shapes, "F32"), lambda name: state[name].detach().to(dtype, copy=True)
    )
    config = copy.deepcopy(model.config)
    for name, kind in backends(config).items():
        getattr(config, name)._attn_implementation = kind
    return load_model(VLM, config, source, Placement(dtype=torch.float32, device=model.device))


def tower_in_float32(tower: Any, dtype: torch.dtype) -> nn.Module:
    """The same for a vision tower alone, so that a decoder is not copied for it."""
    attention = tower_backend(tower)
    if _is_float32(tower) and dtype == torch.float32 and tower.config._attn_implementation == attention:
        return cast(nn.Module, tower)
    config = copy.deepcopy(tower.config)
    copied: nn.Module = type(tower)._from_config(config, attn_implementation=attention, dtype=torch.float32)
    copied.load_state_dict({name: tensor.to(dtype).float() for name, tensor in tower.state_dict().items()})
    return copied.to(next(tower.parameters()).device)


def tower_backend(tower: Any) -> str:
    """The attention code a tower and its written twin run on, as `backends`."""
    own = str(tower.config._attn_implementation)
    return own if own in BACKENDS else "eager"


def _is_float32(module: nn.Module) -> bool:
    return all(parameter.dtype == torch.float32 for parameter in module.parameters())


def check_in_memory(model: nn.Module) -> None:
    """Raise `ConfigError` if weights are offloaded or on the meta device."""
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise ConfigError(
            f"{len(absent)} weights of the model are not in memory ({absent[0]}, ...); open it without device_map or"
            f" offloading to export it"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


# --- PaliGemma --------------------------------------------------------------------------------------------------------


def paligemma_inputs(processor: Processor) -> Outputs:
    """Pixels and ids that this library's processor makes of the samples."""
    out: Outputs = {}
    for picture, (prompt, suffix, _) in zip(pictures(), SAMPLES, strict=True):
        batch = processor([picture], [prompt], [suffix])
        _add(out, "pixels", batch["pixel_values"])
        _add(out, "prompt ids", torch.cat([batch[name] for name in ID_TENSORS]))
    return out


def written_paligemma_inputs(folder: Path) -> Outputs:
    """The same from transformers' own processor, opened from the written directory."""
    theirs: Any = AutoProcessor.from_pretrained(
        str(folder), backend="pil", local_files_only=True, trust_remote_code=False
    )
    out: Outputs = {}
    for picture, (prompt, suffix, _) in zip(pictures(), SAMPLES, strict=True):
        made = theirs(images=picture, text=f"<image>{prompt}", suffix=suffix, return_tensors="pt")
        _add(out, "pixels", made["pixel_values"])
        _add(out, "prompt ids", torch.cat([made[name] for name in ID_TENSORS]))
    return out


def run_paligemma(source: VLM, processor: Processor, dtype: torch.dtype = torch.float32) -> Outputs:
    """Every quantity of the model itself, its weights rounded to `dtype`, in the order of `SAMPLES`."""
    model = in_float32(source, dtype)
    out: Outputs = {}
    config = model.config
    with evaluating(model):
        for batch, question in paligemma_batches(processor, model.device):
            labels = batch.pop("labels")
            encoded = model.encode(batch["pixel_values"])
            _add(out, "tower features", encoded.features)
            _add(out, "projected features", model.model.project(encoded)[0])
            inputs: Any = {**batch, "use_cache": False, "logits_to_keep": labels.shape[1] - encoded.features.shape[1]}
            capped = decoder.facts(config.text_config).final_softcap is not None
            if capped and config.softcap_in_generation:
                _add(out, "logits with soft-cap", model(**inputs).logits)
            # transformers trains with it from 5.23 on, this library does not.
            with decoder.without_final_softcap(config.text_config):
                _add(out, "logits", model(**inputs).logits)
                _add(out, "loss", model(**batch, labels=labels).loss[None])
            _add(out, "greedy tokens", _greedy(model, question, processor))
    return out


def run_written_paligemma(model: Any, processor: Processor) -> Outputs:
    """The same from transformers' PaliGemma, on the same inputs."""
    out: Outputs = {}
    with evaluating(model):
        for batch, question in paligemma_batches(processor, model.device):
            # transformers' PaliGemma counts positions itself, from 1.
            batch.pop("position_ids"), question.pop("position_ids")
            labels = batch.pop("labels")
            features = model.model.vision_tower(batch["pixel_values"]).last_hidden_state
            _add(out, "tower features", features)
            _add(out, "projected features", model.get_image_features(batch["pixel_values"]).pooler_output.flatten(0, 1))
            inputs = {**batch, "use_cache": False, "logits_to_keep": labels.shape[1] - features.shape[1]}
            with decoder.without_final_softcap(model.config.text_config):
                logits = model(**inputs).logits
            _add(out, "logits", logits)
            # As its forward does, but for the text only: with an image of 4096 tokens, logits of all take gigabytes.
            loss = model.loss_function(logits, labels[:, -logits.shape[1] :], model.config.text_config.vocab_size)
            _add(out, "loss", loss[None])
            if decoder.facts(model.config.text_config).final_softcap is not None:
                _add(out, "logits with soft-cap", model(**inputs).logits)
            _add(out, "greedy tokens", _greedy(model, question, processor))
    with_cap = out.get("logits with soft-cap", [])
    if with_cap and all(torch.equal(a, b) for a, b in zip(with_cap, out["logits"], strict=True)):
        del out["logits with soft-cap"]  # transformers 5.17 leaves it out of PaliGemma
    return out


def paligemma_batches(
    processor: Processor, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For each sample the tensors of a training batch and of a prompt."""
    for picture, (prompt, suffix, _) in zip(pictures(), SAMPLES, strict=True):
        batch, question = processor([picture], [prompt], [suffix]).to(device), processor([picture], [prompt]).to(device)
        yield {name: batch[name] for name in batch.keys()}, {name: question[name] for name in question.keys()}


def _greedy(model: Any, question: dict[str, Tensor], processor: Processor) -> Tensor:
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        suppress_tokens=[processor.image_token_id],
    )
    generated: Tensor = model.generate(**question, generation_config=settings)
    return generated[:, question["input_ids"].shape[1] :]


# --- a tower alone ----------------------------------------------------------------------------------------------------


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
        _add(out, "pixels", made["pixel_values"][0][real])
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


# --- opening ----------------------------------------------------------------------------------------------------------


def opened(folder: Path, attention: Any = None, *, empty: bool = False) -> Any:
    """The written model opened by transformers' class in float32, every tensor accounted for.

    Args:
        attention: backend, or backends by part, as transformers takes them.
        empty: on the meta device: names and shapes are compared, no weight is read.

    Raises:
        CheckpointError: it cannot be opened, or tensors are missing, unexpected or mis-shaped.
    """
    kind = READERS[read_json(folder / "config.json")["architectures"][0]]
    if isinstance(attention, dict) and kind is not PaliGemmaForConditionalGeneration:
        attention = attention["vision_config"]
    settings: dict[str, Any] = {"device_map": "meta"} if empty else {"attn_implementation": attention}
    try:
        model, info = kind.from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed below with the others
            **settings,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {kind.__name__} cannot open what was written: {error}") from error
    problems = {key: sorted(str(name) for name in names) for key, names in info.items() if names}
    if problems:
        found = "; ".join(f"{key.replace('_', ' ')}: {', '.join(names[:5])}" for key, names in problems.items())
        raise CheckpointError(f"{folder}: {kind.__name__} does not find every tensor in its place: {found}")
    return model


def _add(out: Outputs, name: str, value: Tensor) -> None:
    out.setdefault(name, []).append(value.detach().cpu())
