"""What a model consists of and what it costs: parts, parameters, image tokens, bytes, floating-point operations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from vlm.checkpoints.directory import load
from vlm.checkpoints.two_towers import has_two_towers
from vlm.measure import dual
from vlm.model import decoder as decoders
from vlm.model.forward import VLM
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor
from vlm.siglip.loading import load as load_dual
from vlm.words import aligned, megabytes

LARGE = 1 << 14
"""Side in pixels of a square image that fills any budget."""
PROMPT_TOKENS = 8
"""Text tokens assumed for the prefill figure: BOS, `caption en`, newline and a little more."""


def describe(model: str | Path | tuple[VLM, Processor]) -> dict[str, Any]:
    """Facts about a model.

    Args:
        model: a model directory, a hub id, or (model, processor).

    Returns:
        JSON values: `parts` (kind, parameters, bytes of each, members of a fused tower), `parameters`, `bytes`,
            `dtype`, `image_tokens` (most per image), `image_tokens_square` (of a large square image), `image` (in
            words), `effective_resolution` and `flops` of tower, projector and prefill for that square image: 2 per
            multiply-add, matrix products only. Of a model with two towers: what `vlm.measure.dual.describe` gives.
    """
    if isinstance(model, str | Path) and has_two_towers(model):
        return dual.describe(*load_dual(model))
    net, processor = load(model) if isinstance(model, str | Path) else model
    config = net.config
    transform = processor.image_transform
    grid = transform.grid(LARGE, LARGE)
    kinds = {
        "encoder": config.encoder,
        "projector": config.projector_config["kind"],
        "decoder": config.text_config.model_type,
    }
    parts = {
        name: {
            "kind": kinds[name],
            "parameters": sum(p.numel() for p in unique_parameters(module)),
            "bytes": sum(p.numel() * p.element_size() for p in unique_parameters(module)),
        }
        for name, module in net.parts().items()
    }
    members = [kind for kind, _ in encoder_spec(config.encoder).members(config.vision_config)]
    if members:
        parts["encoder"]["members"] = members
    return {
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "dtype": str(net.dtype).removeprefix("torch."),
        "image_tokens": processor.max_image_tokens,
        "image_tokens_square": processor.num_image_tokens(grid),
        "image": transform.describe(),
        "effective_resolution": list(transform.effective_resolution(LARGE, LARGE)),
        "vocabulary": config.text_config.vocab_size,
        "flops": flops(net, grid),
    }


def unique_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a part, each once (the output embedding is tied to the input embedding)."""
    return list(dict.fromkeys(module.parameters()))


def flops(model: VLM, grid: tuple[int, int]) -> dict[str, int]:
    """Floating-point operations of one image with a (rows, columns) patch grid: 2 per multiply-add of a matrix product;
    attention products included, normalisation, activations and averages not. `prefill` is the decoder over the image
    and a short prompt, with the logits of one position.
    """
    vision, text = model.config.vision_config, model.config.text_config
    projector: Any = model.model.multi_modal_projector
    patches = grid[0] * grid[1]
    sequence = projector.num_tokens(grid) + PROMPT_TOKENS
    heads = decoders.facts(text).attention_width
    tower = tower_flops(model.config.encoder, vision, model.model.vision_tower, patches)
    decoder = 2 * sequence * matrix_weights(model.model.language_model.layers)
    decoder += 4 * sequence**2 * heads * text.num_hidden_layers
    return {
        "encoder": tower,
        "projector": projector.flops(grid),
        "prefill": decoder + 2 * text.vocab_size * text.hidden_size,
    }


def tower_flops(kind: str, config: Any, tower: nn.Module, patches: int) -> int:
    """Of a tower over an image of so many patches. Class and register tokens are not counted."""
    spec = encoder_spec(kind)
    if spec.flops is not None:
        return spec.flops(config)
    if members := spec.members(config):
        modules: Any = tower.members
        return sum(
            tower_flops(kind, own, module, math.prod(encoder_spec(kind).grid(own)))
            for (kind, own), module in zip(members, modules, strict=True)
        )
    products = 2 * patches * matrix_weights(tower)
    return products + 4 * patches**2 * int(config.hidden_size) * int(config.num_hidden_layers)


def matrix_weights(module: nn.Module) -> int:
    """Weights that multiply each token: those of linear layers and of the patch convolution."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d))


def table(facts: dict[str, Any]) -> str:
    """The facts as aligned text."""
    if "text" in facts:
        return dual.table(facts)
    rows = [("part", "kind", "parameters", "size")]
    for name, own in facts["parts"].items():
        kind = own["kind"] + (f" ({' + '.join(own['members'])})" if "members" in own else "")
        rows.append((name, kind, f"{own['parameters']:,}", megabytes(own["bytes"])))
    rows.append(("total", "", f"{facts['parameters']:,}", megabytes(facts["bytes"])))
    square = ""
    if facts["image_tokens_square"] != facts["image_tokens"]:
        square = f", {facts['image_tokens_square']} of a square one"
    cost = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in facts["flops"].items())
    return "\n".join(
        [
            *aligned(rows, left=(0, 1)),
            "",
            f"image       {facts['image']}",
            f"tokens      {facts['image_tokens']} per image (at most){square}",
            f"GFLOP/image {cost}",
            f"dtype       {facts['dtype']}, vocabulary {facts['vocabulary']:,}",
        ]
    )
