"""Running an export's two sides, the model and what transformers opens, on the same images and prompts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    GenerationConfig,
)

from vlm.checkpoints.loader import load_model
from vlm.checkpoints.placement import Placement
from vlm.checkpoints.source import Source, expected_shapes
from vlm.errors import ConfigError
from vlm.exchange.samples import NEW_TOKENS, SAMPLES, Outputs, add, evaluating, pictures
from vlm.exchange.theirs import BACKENDS, backends
from vlm.exchange.tower_probes import is_float32
from vlm.model import decoder
from vlm.model.forward import VLM
from vlm.model.processor import Processor

ID_TENSORS = ("input_ids", "token_type_ids", "labels")


def in_float32(model: VLM, dtype: torch.dtype) -> VLM:
    """The model that the written file holds, in float32: its weights rounded to `dtype`. The model itself where that
    changes nothing, else a copy."""
    parts = (model.config.vision_config, model.config.text_config)
    runs = {part._attn_implementation for part in parts} <= set(BACKENDS)
    if is_float32(model) and dtype == torch.float32 and runs:
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


def check_in_memory(model: nn.Module) -> None:
    """Raise `ConfigError` if weights are offloaded or on the meta device."""
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise ConfigError(
            f"{len(absent)} weights of the model are not in memory ({absent[0]}, ...); open it without device_map or"
            f" offloading to export it"
        )


def paligemma_inputs(processor: Processor) -> Outputs:
    """Pixels and ids that this library's processor makes of the samples."""
    out: Outputs = {}
    for picture, (prompt, suffix, _) in zip(pictures(), SAMPLES, strict=True):
        batch = processor([picture], [prompt], [suffix])
        add(out, "pixels", batch["pixel_values"])
        add(out, "prompt ids", torch.cat([batch[name] for name in ID_TENSORS]))
    return out


def written_paligemma_inputs(folder: Path) -> Outputs:
    """The same from transformers' own processor, opened from the written directory."""
    theirs: Any = AutoProcessor.from_pretrained(
        str(folder), backend="pil", local_files_only=True, trust_remote_code=False
    )
    out: Outputs = {}
    for picture, (prompt, suffix, _) in zip(pictures(), SAMPLES, strict=True):
        made = theirs(images=picture, text=f"<image>{prompt}", suffix=suffix, return_tensors="pt")
        add(out, "pixels", made["pixel_values"])
        add(out, "prompt ids", torch.cat([made[name] for name in ID_TENSORS]))
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
            add(out, "tower features", encoded.features)
            add(out, "projected features", model.model.project(encoded)[0])
            inputs: Any = {**batch, "use_cache": False, "logits_to_keep": labels.shape[1] - encoded.features.shape[1]}
            capped = decoder.facts(config.text_config).final_softcap is not None
            if capped and config.softcap_in_generation:
                add(out, "logits with soft-cap", model(**inputs).logits)
            # transformers trains with it from 5.23 on, this library does not.
            with decoder.without_final_softcap(config.text_config):
                add(out, "logits", model(**inputs).logits)
                add(out, "loss", model(**batch, labels=labels).loss[None])
            add(out, "greedy tokens", _greedy(model, question, processor))
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
            add(out, "tower features", features)
            add(out, "projected features", model.get_image_features(batch["pixel_values"]).pooler_output.flatten(0, 1))
            inputs = {**batch, "use_cache": False, "logits_to_keep": labels.shape[1] - features.shape[1]}
            with decoder.without_final_softcap(model.config.text_config):
                logits = model(**inputs).logits
            add(out, "logits", logits)
            # As its forward does, but for the text only: with an image of 4096 tokens, logits of all take gigabytes.
            loss = model.loss_function(logits, labels[:, -logits.shape[1] :], model.config.text_config.vocab_size)
            add(out, "loss", loss[None])
            if decoder.facts(model.config.text_config).final_softcap is not None:
                add(out, "logits with soft-cap", model(**inputs).logits)
            add(out, "greedy tokens", _greedy(model, question, processor))
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
