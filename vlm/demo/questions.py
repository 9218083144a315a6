"""Questions about a scene that have one correct answer each."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm.demo.scenes import COLOURS, PAIRS, SHAPES, Scene, Thing

RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
"""name -> does the first thing stand so to the second?  Decided by grid cells, so never by a pixel."""
PLURAL = {"circle": "circles", "rectangle": "rectangles", "triangle": "triangles", "star": "stars", "cross": "crosses"}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def question(rng: random.Random, scene: Scene, kind: str) -> Question | None:
    """A question of this kind (a key of `KINDS`) about the scene, or None where it has no single correct answer."""
    made = KINDS[kind](rng, scene)
    return None if made is None else Question(kind, *made)


def ask(rng: random.Random, scene: Scene, count: int, kinds: Sequence[str] | None = None) -> list[Question]:
    """`count` questions of different kinds, `ASKED` by default (fewer where the scene does not allow so many)."""
    kinds = ASKED if kinds is None else kinds
    made = (question(rng, scene, kind) for kind in rng.sample(sorted(kinds), len(kinds)))
    return [q for q in made if q is not None][:count]


Made = tuple[str, str] | None


def _colour(rng: random.Random, scene: Scene) -> Made:
    shapes = [t.shape for t in scene.things]
    single = [t for t in scene.things if shapes.count(t.shape) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return rng.choice(("what color is the {}?", "what is the color of the {}?")).format(thing.shape), thing.colour


def _shape(rng: random.Random, scene: Scene) -> Made:
    colours = [t.colour for t in scene.things]
    single = [t for t in scene.things if colours.count(t.colour) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return rng.choice(("what shape is {}?", "what is the {} shape?")).format(thing.colour), thing.shape


def _count(rng: random.Random, scene: Scene) -> Made:
    sort = rng.choice(("all", "shape", "colour"))
    if sort == "all":
        return "how many shapes are there?", str(len(scene.things))
    if sort == "shape":
        shape = rng.choice([t.shape for t in scene.things] + [rng.choice(SHAPES)])
        return f"how many {PLURAL[shape]} are there?", str(sum(t.shape == shape for t in scene.things))
    colour = rng.choice([t.colour for t in scene.things] + [rng.choice(list(COLOURS))])
    return f"how many {colour} shapes are there?", str(sum(t.colour == colour for t in scene.things))


def _where(rng: random.Random, scene: Scene) -> Made:
    thing = rng.choice(scene.things)
    return f"where is the {thing.name}?", thing.place


def _size(rng: random.Random, scene: Scene) -> Made:
    thing = rng.choice(scene.things)
    return rng.choice(("what size is the {}?", "is the {} small or large?")).format(thing.name), thing.size


def _neighbour(rng: random.Random, scene: Scene) -> Made:
    """What stands on one side of a thing, where exactly one other thing does."""
    options = []
    for relation, holds in RELATIONS.items():
        for thing in scene.things:
            found = [other for other in scene.things if holds(other, thing)]
            if len(found) == 1:
                options.append((f"what is {relation} the {thing.name}?", found[0].name))
    return rng.choice(options) if options else None


def _exists(rng: random.Random, scene: Scene) -> Made:
    """Yes and no in equal parts; two in three of the absent pairs mix a colour and a shape that are in the picture."""
    present = {(t.colour, t.shape) for t in scene.things}
    template = rng.choice(("is there a {}?", "is a {} present?"))
    if rng.random() < 0.5:
        return template.format(rng.choice(scene.things).name), "yes"
    absent = [p for p in PAIRS if p not in present]
    colours, shapes = zip(*present, strict=True)
    mixed = [p for p in absent if p[0] in colours and p[1] in shapes]
    near = [p for p in absent if p[0] in colours or p[1] in shapes]
    return template.format(" ".join(rng.choice(mixed if mixed and rng.random() < 0.67 else near))), "no"


def _relation(rng: random.Random, scene: Scene) -> Made:
    """Yes and no in equal parts; two things of one row are asked about left and right only, and the like."""
    if len(scene.things) < 2:
        return None
    first, second = rng.sample(scene.things, 2)
    true = [name for name, holds in RELATIONS.items() if holds(first, second)]
    false = [name for name, holds in RELATIONS.items() if holds(second, first)]
    answer = rng.choice(("yes", "no"))
    relation = rng.choice(true if answer == "yes" else false)
    return f"is the {first.name} {relation} the {second.name}?", answer


KINDS: dict[str, Callable[[random.Random, Scene], Made]] = {
    "color": _colour,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "size": _size,
    "neighbor": _neighbour,
    "exists": _exists,
    "relation": _relation,
}
ASKED = tuple(kind for kind in KINDS if kind != "relation")
"""The kinds in the demo's data."""
