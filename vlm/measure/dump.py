"""Named intermediates of one batch: what goes into a model, what leaves each of its parts and blocks, logits and loss.

Two dumps of the same batch show where two models, two versions or two devices begin to differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vlm.model.batch import Batch
from vlm.model.forward import VLM
from vlm.words import columns


def intermediates(model: VLM, batch: Batch) -> dict[str, Tensor]:
    """Run one forward without gradients, in the model's own mode, and keep what passes by.

    Args:
        batch: what the processor made; with labels the loss is kept too.

    Returns:
        on the CPU and in the order in which they were made: `batch.NAME` for each tensor of the batch; the output of
        each part, embedding and block under its module's name; `mask` (what the first block of the decoder was given);
        `logits`; with labels `loss`.
    """
    kept: dict[str, Tensor] = {f"batch.{name}": tensor for name, tensor in batch.items()}

    def keep(name: str, value: Any) -> None:
        tensor = _first_tensor(value)
        if tensor is not None:
            kept[name] = tensor.detach().cpu()

    def take_mask(_module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        if "mask" not in kept:
            keep("mask", kwargs.get("attention_mask"))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in _watched(model):
            hook = module.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
            hooks.callback(hook.remove)
        for module in _blocks(model.model.language_model):
            hooks.callback(module.register_forward_pre_hook(take_mask, with_kwargs=True).remove)
        out = model(**batch.to(model.device), skip_logits=False)
    keep("logits", out.logits)
    keep("loss", out.loss)
    return {name: tensor.cpu().contiguous() for name, tensor in kept.items()}


def _watched(model: VLM) -> Iterator[tuple[str, nn.Module]]:
    """Parts, the token embedding, and every member of a list of modules (blocks), with their names."""
    parts = {model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model}
    parts |= {model.get_input_embeddings()}
    blocks = {id(block) for block in _blocks(model)}
    for name, module in model.named_modules():
        if id(module) in blocks or module in parts:
            yield name, module


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for inner in module.modules():
        if isinstance(inner, nn.ModuleList):
            yield from inner


def _first_tensor(value: Any) -> Tensor | None:
    """The tensor of an output: itself, or the first one of a tuple or mapping."""
    if isinstance(value, Tensor):
        return value
    items = list(value.values()) if isinstance(value, Mapping) else value
    found = [one for one in items if isinstance(one, Tensor)] if isinstance(items, list | tuple) else []
    return found[0] if found else None


def table(found: Mapping[str, Tensor]) -> str:
    """One line each: shape, dtype, and of the finite numbers the least, the largest, mean and root mean square."""
    rows = [("name", "shape", "dtype", "min", "max", "mean", "rms", "not finite")]
    for name, tensor in found.items():
        numbers = tensor.double().flatten()
        finite = numbers[numbers.isfinite()]
        lost = numbers.numel() - finite.numel()
        shape = "x".join(map(str, tensor.shape)) or "1"
        kind = str(tensor.dtype).removeprefix("torch.")
        rows.append((name, shape, kind, *_range(finite), str(lost) if lost else ""))
    return columns(rows, left=(0, 1, 2))


def _range(numbers: Tensor) -> tuple[str, str, str, str]:
    """Least, largest, mean and root mean square; `-` where there is no number."""
    if not numbers.numel():
        return ("-", "-", "-", "-")
    values = (numbers.min(), numbers.max(), numbers.mean(), numbers.square().mean().sqrt())
    least, largest, mean, rms = (f"{value.item():.4g}" for value in values)
    return least, largest, mean, rms
