"""How well pictures and texts of an album find each other: the figures of `vlm demo --task search`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.demo import album, queries, questions, scenes
from vlm.demo.captions import check
from vlm.demo.queries import Query, Said

Read = Callable[[Sequence[str]], Tensor]
"""Texts -> logits float[pictures, texts], for the pictures of the album."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BINS = 10
"""Of the expected calibration error."""


@dataclass(frozen=True)
class Figure:
    """One of them.

    Attributes:
        name: its key in `search.json`.
        text: what it is the share of.
        value: 0 to 1.
        chance: what blind choice would get; None where that means nothing.
        asked: how many pictures or texts it is over.
        best: the most that can be had.
    """

    name: str
    text: str
    value: float
    chance: float | None
    asked: int
    best: float = 1.0


def all_figures(seen: Sequence[scenes.Scene], texts: Sequence[tuple[int, str]], read: Read) -> list[Figure]:
    """
    Args:
        seen: the scenes of the pictures.
        texts: (index of its picture, caption) of each caption.
    """
    return [*retrieval(seen, texts, read), *zero_shot(seen, read), relation(seen, read), calibration(seen, read)]


def retrieval(seen: Sequence[scenes.Scene], texts: Sequence[tuple[int, str]], read: Read) -> list[Figure]:
    """R@1 both ways, counted as the papers do: one right picture for a text, any of its texts for a picture."""
    logits = read([text for _, text in texts])
    owner = torch.tensor([number for number, _ in texts])
    fits = torch.tensor([[check(scene, text).true for _, text in texts] for scene in seen])
    first, said = logits.argmax(0), owner[logits.argmax(1)]
    true = fits[first, torch.arange(len(texts))]
    best = (1 / fits.float().sum(0)).mean().item()
    return [
        Figure(
            "text_to_image_r1",
            "captions whose own picture comes first",
            _share(first == owner),
            1 / len(seen),
            len(texts),
            best,
        ),
        Figure("text_to_image_true", "captions that the first picture fits", _share(true), _share(fits), len(texts)),
        Figure(
            "image_to_text_r1",
            "pictures for which one of their own captions comes first",
            _share(said == torch.arange(len(seen))),
            1 / len(seen),
            len(seen),
        ),
    ]


def zero_shot(seen: Sequence[scenes.Scene], read: Read) -> list[Figure]:
    """The best label, of pictures with one thing by what it is, of all by how many there are."""
    alone = [(number, scene.things[0]) for number, scene in enumerate(seen) if len(scene.things) == 1]
    everyone = [(number, len(scene.things) - 1) for number, scene in enumerate(seen)]
    colours, names = list(scenes.COLOURS), [" ".join(pair) for pair in scenes.PAIRS]
    asked = {
        "colour": ([f"a {colour} shape" for colour in colours], [(n, colours.index(t.colour)) for n, t in alone]),
        "shape": ([f"a {shape}" for shape in scenes.SHAPES], [(n, scenes.SHAPES.index(t.shape)) for n, t in alone]),
        "colour and shape": ([f"a {name}" for name in names], [(n, names.index(t.name)) for n, t in alone]),
        "number": (list(album.NUMBERS), everyone),
    }
    figures = []
    for name, (labels, right) in asked.items():
        best = read(labels)[[number for number, _ in right]].argmax(1)
        value = _share(best == torch.tensor([label for _, label in right]))
        figures.append(
            Figure(
                f"zero_shot_{name.replace(' ', '_')}",
                f"pictures named right by {name}",
                value,
                1 / len(labels),
                len(right),
            )
        )
    return figures


def relation(seen: Sequence[scenes.Scene], read: Read) -> Figure:
    """A true sentence about two things beside three false ones of the same words: the things exchanged, the opposite
    relation, the shapes exchanged. Scenes where the last is true too, or the same, are left out."""
    rng = random.Random("relations")
    asked: list[Query] = []
    owner = []
    for number, scene in enumerate(seen):
        four = _sentences(rng, scene) if len(scene.things) > 1 else []
        if four and queries.truth([scene], four)[0].tolist() == [True, False, False, False]:
            asked += four
            owner.append(number)
    logits = read([query.text for query in asked]).unflatten(1, (-1, 4))[owner, torch.arange(len(owner))]
    value = _share(logits[:, 0] > logits[:, 1:].amax(1))
    return Figure("relation", "true sentences that beat three false ones of the same words", value, 1 / 4, len(owner))


def _sentences(rng: random.Random, scene: scenes.Scene) -> list[Query]:
    a, b = rng.sample(scene.things, 2)
    name = rng.choice([name for name, holds in questions.RELATIONS.items() if holds(a, b)])
    first, second = Said(None, a.colour, a.shape), Said(None, b.colour, b.shape)
    mixed = Said(None, a.colour, b.shape), Said(None, b.colour, a.shape)
    four = [(first, name, second), (second, name, first), (first, OPPOSITE[name], second), (mixed[0], name, mixed[1])]
    return [Query(f"{one.words('a')} {how} {other.words('a')}", (one, other), how) for one, how, other in four]


def calibration(seen: Sequence[scenes.Scene], read: Read) -> Figure:
    """Expected calibration error of the probability that a text, of every kind, is true of a picture, of all pairs."""
    asked = calibration_texts(seen)
    probability = read([query.text for query in asked]).sigmoid().flatten().double()
    true = torch.from_numpy(queries.truth(seen, asked)).flatten().double()
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, probability - true).abs()
    error = gaps.sum().item() / len(true)
    return Figure("calibration_error", "expected calibration error of the probabilities", error, None, len(true), 0.0)


def calibration_texts(seen: Sequence[scenes.Scene]) -> list[Query]:
    """One for each scene."""
    rng = random.Random("calibration")
    return [queries.write(rng, scene) for scene in seen]


def _share(right: Tensor) -> float:
    return right.float().mean().item()
