"""Which blocks of a tower are its features, and how they are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def runs(module: nn.Module, method: Callable[..., Any]) -> None:
    """Make a call of the module run this in the place of its `forward`.

    A method that is called past the module goes without its hooks, among them those that bring offloaded parameters in.
    """
    module.forward = method


def chosen_layers(config: Any) -> list[int]:
    """The blocks whose outputs are the features, counted from 1; none where the last one's are."""
    # A choice is an attribute beside the fields of transformers' classes, and a file without a choice does not have it.
    return list(getattr(config, "feature_layers", None) or [])


def feature_layers(config: Any) -> list[int]:
    """The blocks whose outputs are the features, counted from 1."""
    return chosen_layers(config) or [config.num_hidden_layers]


def feature_width(config: Any) -> int:
    """Channels of the features."""
    return int(config.hidden_size) * len(chosen_layers(config) or [0])


def final_norm(config: Any, norm: nn.Module) -> nn.Module:
    """The tower's final norm, or nothing where no feature goes through it."""
    return norm if not chosen_layers(config) or config.feature_norm else nn.Identity()


def run_blocks(config: Any, blocks: Iterable[nn.Module], norm: nn.Module, hidden: Tensor, **inputs: Any) -> Tensor:
    """Run the blocks and collect the features.

    Args:
        hidden: float[M, T, E].
        norm: applied to the output of the last block.
        inputs: further arguments of every block.

    Returns:
        float[M, T, E * number of feature layers].
    """
    outputs = []
    for block in blocks:
        hidden = block(hidden, **inputs)
        outputs.append(hidden)
    outputs[-1] = norm(hidden)
    return torch.cat([outputs[number - 1] for number in feature_layers(config)], dim=-1)


def join_layers(config: Any, found: Iterable[Tensor], norm: nn.Module) -> Tensor:
    """Outputs of the chosen blocks, in rising order, as features in the order of the choice; the final norm on the
    highest one where it is chosen."""
    blocks = feature_layers(config)
    outputs = dict(zip(sorted(blocks), found, strict=True))
    if config.feature_norm:
        outputs[max(blocks)] = norm(outputs[max(blocks)])
    return torch.cat([outputs[block] for block in blocks], dim=-1)


def hidden_features(
    config: Any, model: Any, norm: nn.Module, prefix: int = 0, *, normed: bool = True, **inputs: Tensor
) -> Tensor:
    """What `run_blocks` gives, from a model of transformers.

    Args:
        norm: the final norm.
        prefix: class and register tokens before the patches.
        normed: `last_hidden_state` comes with the norm.

    Returns:
        float[M, P, E * number of feature layers].
    """
    chosen = chosen_layers(config)
    if not chosen:
        last = model(**inputs).last_hidden_state
        return (last if normed else norm(last))[:, prefix:]
    states = list(model(**inputs, output_hidden_states=True).hidden_states)  # the embeddings are the first
    if config.feature_norm:
        states[config.num_hidden_layers] = norm(states[config.num_hidden_layers])
    return torch.cat([states[number] for number in chosen], dim=-1)[:, prefix:]
