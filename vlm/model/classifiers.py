"""Classifiers on vectors that stay as they are: k nearest neighbours and a linear one. Nothing in them is random.

The probes of a tower (`vlm.measure.probes`) and the evaluation of embeddings (`vlm.eval.towers`) answer with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07
"""Of the neighbours' weights, as in the paper."""
L2_GRID = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Penalties that the linear probe chooses from, strongest first."""
HELD_OUT = 0.2
"""Share of the training images of each class on which it chooses."""
MAX_ITERATIONS = 500
_SIMILARITIES = 2**24
"""How many similarities are in memory at a time."""


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def knn(
    train: Tensor, test: Tensor, labels: Tensor, num_classes: int, *, k: int = 20, temperature: float = TEMPERATURE
) -> tuple[Tensor, dict[str, Any]]:
    """Weighted nearest neighbours: each of the k training vectors with the highest cosine similarity s votes for its
    class with weight exp(s / temperature).

    Source: arXiv 1805.01978, section 3.4; DINO (arXiv 2104.14294) evaluates so with k = 20. Between classes of equal
    votes the first one wins.

    Args:
        train, test: float[N, E], float[M, E].
        labels: int64[N], from 0 to `num_classes` - 1.

    Returns:
        int64[M], and the settings.
    """
    used = min(k, len(train))
    stored = F.normalize(train.double(), dim=-1)
    chosen = []
    for rows in F.normalize(test.double(), dim=-1).split(max(1, _SIMILARITIES // len(train))):
        near, index = (rows @ stored.T).topk(used, dim=1)
        # The largest similarity is 1: no overflow, and the same proportions.
        weights = ((near - 1) / temperature).exp()
        votes = torch.zeros(len(rows), num_classes, dtype=torch.float64).scatter_add(1, labels[index], weights)
        chosen.append(votes.argmax(1))
    return torch.cat(chosen), {"k": used, "k_asked": k, "temperature": temperature, "similarity": "cosine"}


# --- linear classifier -----------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A linear classifier on standardised features.

    Attributes:
        mean, scale: float64[E], of the features it was fitted to.
        weight, bias: float64[C, E], float64[C].
        iterations: of the solver.
        converged: before it ran out of iterations.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool

    def answer(self, vectors: Tensor) -> Tensor:
        """float[N, E] -> int64[N], the likeliest class."""
        return (((vectors.double() - self.mean) / self.scale) @ self.weight.T + self.bias).argmax(1)


def linear(train: Tensor, test: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, dict[str, Any]]:
    """Multinomial logistic regression on standardised features, in float64.

    The penalty is chosen from `L2_GRID` by the accuracy on a held-out fifth of the training images (the stronger one of
    two that are equal); then the classifier is fitted to all of them. After the linear probe of CLIP (arXiv 2103.00020,
    appendix A.3): L-BFGS, and the penalty swept on a validation split.

    Args, returns: as `knn`.
    """
    fitted, held = held_out(labels)
    accuracies: dict[float, float] = {}
    found: Fit | None = None
    for l2 in L2_GRID if len(held) else ():
        found = fit(train[fitted], labels[fitted], num_classes, l2, start=found)
        accuracies[l2] = float((found.answer(train[held]) == labels[held]).double().mean())
    # The grid goes from strong to weak, and max() takes the first of equals.
    l2 = max(accuracies, key=lambda penalty: accuracies[penalty]) if accuracies else L2_GRID[len(L2_GRID) // 2]
    final = fit(train, labels, num_classes, l2)
    settings = {
        "l2": l2,
        "l2_chosen_on": len(held),
        "held_out_accuracy": accuracies.get(l2),
        "l2_grid": list(L2_GRID),
        "iterations": final.iterations,
        "converged": final.converged,
    }
    return final.answer(test), settings


def held_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions to fit to and positions to choose on: of each class a fifth, at least one when it has two images; of a
    class with one image nothing. Which ones is decided by a fixed seed.

    Returns:
        (int64[F], int64[H]), each in ascending order.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = []
    for number in labels.unique().tolist():
        members = order[labels[order] == number]
        take = max(1, int(len(members) * HELD_OUT)) if len(members) > 1 else 0
        held.append(members[:take])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(held)] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def fit(vectors: Tensor, labels: Tensor, num_classes: int, l2: float, *, start: Fit | None = None) -> Fit:
    """Minimise mean cross-entropy + l2 / 2 * (sum of squared weights); biases are not penalised. Features that are the
    same for all images are only centred.

    Args:
        vectors: float[N, E]. labels: int64[N].
        start: where the solver begins; the problem is convex, so this only saves time.
    """
    values = vectors.double()
    mean, scale = values.mean(0), values.std(0, correction=0)
    scale = torch.where(scale > 1e-12 * values.abs().amax(0).clamp(min=1e-300), scale, 1.0)
    values = (values - mean) / scale
    weight = torch.zeros(num_classes, values.shape[1], dtype=torch.float64) if start is None else start.weight.clone()
    bias = torch.zeros(num_classes, dtype=torch.float64) if start is None else start.bias.clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(values @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    steps = int(solver.state[weight]["n_iter"])
    return Fit(mean, scale, weight.detach(), bias.detach(), steps, steps < MAX_ITERATIONS)
