"""Pictures of coloured shapes, drawn with Pillow: the world that the demo's models see.

A scene is a few things on a light background.  Each thing has a colour, a shape, a size and a cell of a 3 x 3 grid,
and no two things of a scene share both colour and shape, so "the red circle" names one thing.

What is held out: each colour-and-shape has one place where it never stands in training (`HELD_OUT`). Every test scene
holds such a combination of colour, shape and place, so no test scene can have been seen.

Everything here is a pure function of a `random.Random`, so the same seed draws the same pictures.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 72
"""Pixels on a side."""
CELL = IMAGE_SIZE // 3
SUPERSAMPLE = 4
MAX_THINGS = 3
"""Most things of a scene in the demo's data; at most 4."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
DARKEST = {
    "black": 1.0,
    "gray": 0.75,
    "red": 0.85,
    "green": 0.6,
    "blue": 0.7,
    "yellow": 0.85,
    "teal": 0.8,
    "brown": 0.75,
}
"""How far a colour may be darkened before it could be mistaken for another (1 = not at all)."""
SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
SIZES = ("small", "large")
Radius = dict[str, tuple[float, float]]
"""Size -> smallest and largest distance from a thing's centre to its farthest side, in pixels."""
RADIUS: Radius = {"small": (5.5, 7.0), "large": (9.5, 11.5)}
"""In pretraining."""
CLEAR_RADIUS: Radius = {"small": (7.0, 8.0), "large": (10.2, 11.5)}
"""In the demo's data: small stars and crosses of 11 pixels are hard to tell apart on patches of 12."""
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
Placed = dict[tuple[str, str], int]
"""(colour, shape) -> the cell (0..8, row by row) where it stands."""
HELD_OUT: Placed = {pair: (4 * i + i // 9) % 9 for i, pair in enumerate(PAIRS)}
"""Where each stands in test scenes only."""


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `row` and `column` are 0..2, lengths are pixels, `turn` is degrees."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    aspect: float
    turn: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """ "top left" ... "bottom right"; the middle cell is "center"."""
        return " ".join(filter(None, (ROWS[self.row], COLUMNS[self.column]))) or "center"


@dataclass(frozen=True)
class Scene:
    """Things in reading order (row by row, left to right) on one background colour."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]


PLACES = tuple(" ".join(filter(None, (row, column))) or "center" for row in ROWS for column in COLUMNS)


def make_scene(rng: random.Random, *, held_out: bool = False, most: int = MAX_THINGS, radius: Radius = RADIUS) -> Scene:
    """A scene of 1 to `most` things: with `held_out` all of them in their held-out places, without it none.

    `radius` gives the range for each size.
    """
    count = rng.choices((1, 2, 3, 4)[:most], weights=(1, 3, 3, 2)[:most])[0]
    cells = sorted(rng.sample(range(9), count))
    pairs = _seen_pairs(rng, cells)
    if held_out:
        chosen = rng.randrange(count)
        pairs[chosen] = rng.choice([pair for pair in PAIRS if HELD_OUT[pair] == cells[chosen] and pair not in pairs])
    things = tuple(_thing(rng, pair, divmod(cell, 3), radius) for pair, cell in zip(pairs, cells, strict=True))
    return Scene(things, _background(rng))


def arrange(rng: random.Random, placed: Placed, radius: Radius = RADIUS) -> Scene:
    """A scene of these things in these cells; all that `placed` does not say is random."""
    in_order = sorted(placed.items(), key=lambda item: item[1])
    things = tuple(_thing(rng, pair, divmod(cell, 3), radius) for pair, cell in in_order)
    return Scene(things, _background(rng))


CHANGES = ("swap", "swap", "colour", "shape", "move", "more", "fewer")
"""Of a scene: two things change places; one gets another colour, shape or place; one more; one fewer."""
MIX = "mix"
"""Another: two things exchange their colours."""


def make_like(rng: random.Random, scene: Scene, changes: Sequence[str] = CHANGES) -> Scene:
    """A scene that differs from this one in one change. Sizes, and all that no word says, are drawn anew; nothing
    stands in its held-out place."""
    before = {(thing.colour, thing.shape): 3 * thing.row + thing.column for thing in scene.things}
    while True:
        after = _changed(rng, before, changes)
        if after != before and all(HELD_OUT[pair] != cell for pair, cell in after.items()):
            return arrange(rng, after)


def _changed(rng: random.Random, placed: Placed, changes: Sequence[str]) -> Placed:
    """One change later; a change that makes two things of one name loses one of them."""
    free = [cell for cell in range(9) if cell not in placed.values()]
    pair = rng.choice(list(placed))
    colour, shape = pair
    how = rng.choice(changes)
    if how == "more" and len(placed) < 4:
        return {**placed, rng.choice(PAIRS): rng.choice(free)}
    if len(placed) > 1 and how in ("swap", MIX):
        other = rng.choice([one for one in placed if one != pair])
        if how == "swap":
            return {**placed, pair: placed[other], other: placed[pair]}
        rest = {one: cell for one, cell in placed.items() if one not in (pair, other)}
        return {(other[0], shape): placed[pair], (colour, other[1]): placed[other], **rest}
    rest = {one: cell for one, cell in placed.items() if one != pair}
    if how == "fewer" and rest:
        return rest
    if how == "colour":
        return {(rng.choice(list(COLOURS)), shape): placed[pair], **rest}
    if how == "shape":
        return {(colour, rng.choice(SHAPES)): placed[pair], **rest}
    return {**rest, pair: rng.choice(free)}


def make_loose_thing(rng: random.Random) -> Scene:
    """One thing of any size (3 to 20 pixels radius) anywhere else than in its held-out place, for pretraining."""
    while True:
        radius = 3 * (20 / 3) ** rng.random()
        x, y = (rng.uniform(radius, IMAGE_SIZE - radius) for _ in range(2))
        row, column = int(y // CELL), int(x // CELL)
        thing = _thing(rng, rng.choice(PAIRS), (row, column))
        if HELD_OUT[thing.colour, thing.shape] != 3 * row + column:
            break
    loose = {**thing.__dict__, "radius": radius, "x": x, "y": y, "turn": rng.choice((0.0, thing.turn))}
    return Scene((Thing(**loose),), _background(rng))


def make_labelled(rng: random.Random, pair: tuple[str, str], *, held_out: bool) -> Scene:
    """One thing of this colour and shape: in its held-out place, or anywhere else."""
    place = HELD_OUT[pair]
    cell = place if held_out else rng.choice([cell for cell in range(9) if cell != place])
    return Scene((_thing(rng, pair, divmod(cell, 3), CLEAR_RADIUS),), _background(rng))


def _seen_pairs(rng: random.Random, cells: list[int]) -> list[tuple[str, str]]:
    """A pair for each cell, all different, none in its held-out place.

    Every second one shares a colour or a shape with the first, so that counting is not trivial.
    """
    pairs: list[tuple[str, str]] = []
    for cell in cells:
        allowed = [p for p in PAIRS if HELD_OUT[p] != cell and p not in pairs]
        pairs.append(rng.choice(_like(pairs[:1], allowed) if rng.random() < 0.5 else allowed))
    return pairs


def _like(first: list[tuple[str, str]], allowed: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those with the colour or the shape of the first; all where there is none."""
    return [p for p in allowed if any(p[0] == f[0] or p[1] == f[1] for f in first)] or allowed


def _thing(rng: random.Random, pair: tuple[str, str], cell: tuple[int, int], ranges: Radius = RADIUS) -> Thing:
    colour, shape = pair
    row, column = cell
    size = rng.choice(SIZES)
    radius = rng.uniform(*ranges[size])
    slack = CELL / 2 - radius
    x, y = (CELL * (k + 0.5) + rng.uniform(-slack, slack) for k in (column, row))
    aspect = rng.uniform(0.5, 1.0)
    turn = rng.uniform(-15, 15) + (90 if shape == "rectangle" and rng.random() < 0.5 else 0)
    shade = rng.uniform(DARKEST[colour], 1.0)
    red, green, blue = (min(255, round(shade * c + rng.uniform(0, 20))) for c in COLOURS[colour])
    return Thing(colour, shape, size, row, column, x, y, radius, aspect, turn, (red, green, blue))


def _background(rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (rng.randint(225, 255) for _ in range(3))
    return red, green, blue


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of IMAGE_SIZE x IMAGE_SIZE, edges smoothed."""
    side = IMAGE_SIZE * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        x, y, radius = (SUPERSAMPLE * v for v in (thing.x, thing.y, thing.radius))
        if thing.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=thing.rgb)
        else:
            pen.polygon(_outline(thing, x, y, radius), fill=thing.rgb)
    return canvas.reduce(SUPERSAMPLE)


def _outline(thing: Thing, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners in pixels: the unit shape, stretched, turned and moved.  The centre (x, y) is always inside."""
    angle = math.radians(thing.turn)
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    return [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _unit_shape(thing.shape, thing.aspect)]


def _unit_shape(shape: str, aspect: float) -> list[tuple[float, float]]:
    """Corners in a circle of radius 1 or a little more, y downwards."""
    if shape == "rectangle":
        return [(-1, -aspect), (1, -aspect), (1, aspect), (-1, aspect)]
    if shape == "triangle":
        return [(0, -1), (1, 0.8), (-1, 0.8)]
    if shape == "star":
        spokes = [(math.pi * k / 5, 1.1 if k % 2 == 0 else 0.45) for k in range(10)]
        return [(r * math.sin(a), -r * math.cos(a)) for a, r in spokes]
    if shape == "cross":
        w = 0.33
        return [
            (-w, -1),
            (w, -1),
            (w, -w),
            (1, -w),
            (1, w),
            (w, w),
            (w, 1),
            (-w, 1),
            (-w, w),
            (-1, w),
            (-1, -w),
            (-w, -w),
        ]
    raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")
