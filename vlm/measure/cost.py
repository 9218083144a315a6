"""What a model costs: image tokens, parameters, floating-point operations, time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm.children import peak_memory_bytes
from vlm.errors import ConfigError, DataError, nearest
from vlm.images.load import image_size

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlm.model.batch import Batch
    from vlm.model.forward import VLM
    from vlm.model.processor import ImageSource, Processor


def image_tokens(processor: Processor, images: Sequence[ImageSource]) -> dict[str, float]:
    """How many tokens of an image enter the decoder (after the projector): `mean`, `min` and `max` over the images.

    Only the images' headers are read.

    Raises:
        DataError: no images. ImageError: an image that cannot be opened.
    """
    if not images:
        raise DataError("there are no images to count tokens of")
    counts = []
    for image in images:
        width, height = image_size(image)
        counts.append(processor.num_image_tokens(processor.image_transform.grid(height, width)))
    return {"mean": statistics.fmean(counts), "min": min(counts), "max": max(counts)}


def count_parameters(model: VLM, trained_parts: Iterable[str] = ()) -> dict[str, int]:
    """Numbers of parameters, each tensor counted once however many names it has.

    Args:
        trained_parts: names of parts (encoder, projector, decoder) that a recipe trains.

    Returns:
        `total` = `encoder` + `projector` + `decoder`; `embeddings` (the token table, which is the output embedding too)
        is contained in `decoder`; `trained` is the sum of the trained parts.

    Raises:
        ConfigError: a part that does not exist.
    """
    parts = model.parts()
    for name in trained_parts:
        if name not in parts:
            raise ConfigError(f"unknown part {name!r}{nearest(name, parts)}; known: {', '.join(parts)}")
    by_part = {name: _distinct([part]) for name, part in parts.items()}
    return {
        "total": _distinct([model]),
        "trained": _distinct([parts[name] for name in trained_parts]),
        **by_part,
        "embeddings": _distinct([model.get_input_embeddings()]),
    }


def _distinct(modules: Iterable[nn.Module]) -> int:
    found = {id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}
    return sum(found.values())


def flops_per_image(model: VLM, processor: Processor, image: ImageSource, prompt: str) -> dict[str, int]:
    """Floating-point operations of reading one image and its prompt, counted on a real forward pass.

    That is all work before the first token of the answer; the vocabulary is met at the last position only. A multiply
    and add are two operations. Matrix products, convolutions and attention are counted, elementwise work and the resize
    of position tables are not. Attention counts every pair of positions, masked or not, because that is what is
    computed.

    Returns:
        `encoder`, `projector`, `decoder` and their sum, `total`.
    """
    import torch

    from vlm.model.modes import in_mode

    batch = processor([image], [prompt]).to(model.device)
    tensors = {name: batch[name] for name in batch.keys()}
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    pixels: dict[str, Any] = {name: tensors.pop(name) for name in names if name in tensors}
    with torch.no_grad(), in_mode(model), _without_gradients(model):
        encoder, encoded = counted(lambda: model.encode(**pixels))
        projector, _ = counted(lambda: model.model.project(encoded))
        rest, _ = counted(lambda: model(**tensors, encoded=encoded, use_cache=True, logits_to_keep=1))
    return {"encoder": encoder, "projector": projector, "decoder": rest - projector, "total": encoder + rest}


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """torch's counter stumbles over views of parameters that want a gradient, `no_grad` or not."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """(floating-point operations, result) of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=_attention_formulas()) as counter:
        result = run()
    return int(counter.get_total_flops()), result


def _attention_formulas() -> dict[Any, Any]:
    """torch's counter knows the GPU's fused attention, but not the CPU's (up to 2.13 it counts that as nothing)."""
    import torch

    names = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    return {getattr(torch.ops.aten, name): attention_flops for name in names if hasattr(torch.ops.aten, name)}


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of scores and weighted sum, from the shapes [B, heads, S, width]; key and value may have fewer heads."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def inference_speed(
    model: VLM,
    processor: Processor,
    images: Sequence[ImageSource],
    prompts: Sequence[str],
    *,
    batch_size: int = 1,
    max_new_tokens: int = 16,
    repeats: int = 5,
) -> dict[str, float]:
    """How fast the model answers, where it is now.

    Everything from tensors to token ids is timed; decoding and resizing of images is done before. Every answer has
    exactly `max_new_tokens` tokens (EOS is not allowed), so that two models do the same work whatever they say. Each
    measurement runs over all images, once to warm up and then `repeats` times; the median counts.

    Returns:
        `images_per_second` and `seconds_per_image` of whole answers, `encoder_images_per_second` and
        `encoder_seconds_per_image` of the vision tower alone, and `peak_memory_bytes` (see `vlm.children`).

    Raises:
        ConfigError: a number below 1, or unequal numbers of images and prompts.
    """
    import torch

    from vlm.model.modes import in_mode

    numbers = {"images": len(images), "batch_size": batch_size, "max_new_tokens": max_new_tokens, "repeats": repeats}
    if min(numbers.values()) < 1 or len(images) != len(prompts):
        raise ConfigError(f"speed needs one prompt per image and at least 1 of each, got {numbers}")
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = [
        processor(images[start : start + batch_size], list(prompts[start : start + batch_size])).to(device)
        for start in range(0, len(images), batch_size)
    ]
    with in_mode(model):
        whole = _median_seconds(lambda: _answer(model, processor, batches, max_new_tokens), repeats, device)
        tower = _median_seconds(lambda: _encode(model, batches), repeats, device)
    return {
        "images_per_second": len(images) / whole,
        "seconds_per_image": whole / len(images),
        "encoder_images_per_second": len(images) / tower,
        "encoder_seconds_per_image": tower / len(images),
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _answer(model: VLM, processor: Processor, batches: Sequence[Batch], max_new_tokens: int) -> None:
    from vlm.generation.decoding import Decoding
    from vlm.generation.text import generate_ids, generation_config

    settings = generation_config(processor, Decoding(max_new_tokens=max_new_tokens))
    settings.min_new_tokens = max_new_tokens
    for batch in batches:
        generate_ids(model, batch, settings)


def _encode(model: VLM, batches: Sequence[Batch]) -> None:
    import torch

    with torch.inference_mode():
        for batch in batches:
            assert batch.pixel_values is not None
            model.encode(batch.pixel_values, batch.pixel_attention_mask, batch.spatial_shapes)


def _median_seconds(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    import torch

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
