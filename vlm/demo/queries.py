"""What people type about a drawn scene, and of which scenes it is true.

The writer makes texts of every kind: one word ("red", "star"), a thing with some of its words, several things, how one
stands to another, how many there are, the whole picture, with or without articles, and with a template around it. Every
text keeps what it says, so that its truth is known for every scene and not only for the one it was written for: in a
world this small most short texts are true of many pictures.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.demo.captions import NUMBERS, SIDES
from vlm.demo.questions import PLURAL, RELATIONS
from vlm.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

MOST = 4
"""Things of a scene, and things that a text names."""
LEADS = ("a picture of ", "there is ", "a photo of ", "an image of ", "a drawing of ", "this is ", "a scene with ")
MEDIA = ("photo", "picture", "image", "drawing", "painting", "rendering", "sketch", "sculpture", "cartoon")
QUALITIES = (
    "",
    "",
    "bad ",
    "good ",
    "cropped ",
    "bright ",
    "dark ",
    "clean ",
    "blurry ",
    "close-up ",
    "low resolution ",
)
ARTICLES = ("a", "a", "the", "one", "my")


@dataclass(frozen=True)
class Said:
    """A thing as a text names it; None where the text does not say."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    place: str | None = None

    def words(self, article: str = "") -> str:
        """ "a small red circle at the top left"; what has no shape is a "shape"."""
        named = [article, self.size, self.colour, self.shape or "shape", self.place and f"at the {self.place}"]
        return " ".join(filter(None, named))


@dataclass(frozen=True)
class Query:
    """A text and what it says: the picture holds all `things` (different ones), the first stands in `relation` to the
    second, and exactly `number` things are as `counted` says."""

    text: str
    things: tuple[Said, ...] = ()
    relation: str | None = None
    number: int | None = None
    counted: Said = Said()


# --- The writer -----------------------------------------------------------------------------------------------------


def write(rng: random.Random, scene: Scene) -> Query:
    """A text that is true of the scene."""
    kinds = (_one, _whole, _related, _number, _two) if len(scene.things) > 1 else (_one, _whole, _number)
    query = rng.choices(kinds, weights=(30, 25, 25, 10, 10) if len(kinds) > 3 else (60, 25, 15))[0](rng, scene)
    text = _around(rng, query.text) if query.number is None or query.things else query.text
    return Query(text + ("." if rng.random() < 0.1 else ""), query.things, query.relation, query.number, query.counted)


def _around(rng: random.Random, text: str) -> str:
    """The text as it is, without articles, behind a lead, or in a template."""
    chance = rng.random()
    if chance < 0.45:
        return text
    if chance < 0.65:
        return " ".join(word for word in text.split() if word not in ("a", "the"))
    if chance < 0.85 or not text.startswith("a "):
        return rng.choice(LEADS) + text
    template = f"a {rng.choice(QUALITIES)}{rng.choice(MEDIA)} of {rng.choice(ARTICLES)} "
    return template + text.removeprefix("a ")


def _said(rng: random.Random, thing: Thing, *, place: float = 0.0) -> Said:
    """Some of what can be said of the thing, mostly colour and shape; its place in this share of the cases."""
    colour, shape = rng.choice(((True, True), (True, True), (True, True), (True, False), (False, True)))
    return Said(
        thing.size if rng.random() < 0.2 else None,
        thing.colour if colour else None,
        thing.shape if shape else None,
        thing.place if rng.random() < place else None,
    )


def _one(rng: random.Random, scene: Scene) -> Query:
    said = _said(rng, rng.choice(scene.things), place=0.3)
    word = [word for word in (said.colour, said.shape) if word]
    if len(word) == 1 and rng.random() < 0.5:
        return Query(word[0], (Said(None, said.colour, said.shape),))
    return Query(said.words("a"), (said,))


def _two(rng: random.Random, scene: Scene) -> Query:
    said = tuple(_said(rng, thing, place=0.1) for thing in rng.sample(scene.things, 2))
    return Query(rng.choice((" and ", ", ", " and ")).join(one.words("a") for one in said), said)


def _whole(rng: random.Random, scene: Scene) -> Query:
    size, place = (rng.random() < 0.3 for _ in range(2))
    said = [Said(t.size if size else None, t.colour, t.shape, t.place if place else None) for t in scene.things]
    if rng.random() < 0.5:
        rng.shuffle(said)
    named = [one.words("a") for one in said]
    text = " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))
    if rng.random() < 0.3:
        return Query(f"{_noun(rng, len(said), Said())}: {text}", tuple(said), number=len(said))
    return Query(text, tuple(said))


def _related(rng: random.Random, scene: Scene) -> Query:
    first, second = rng.sample(scene.things, 2)
    relation = rng.choice([name for name, holds in RELATIONS.items() if holds(first, second)])
    longer = {short: long for long, short in SIDES.items()}
    spelled = rng.choice((relation, longer.get(relation, relation)))
    said = tuple(_said(rng, thing) for thing in (first, second))
    return Query(f"{said[0].words('a')} {spelled} {said[1].words('a')}", said, relation)


def _number(rng: random.Random, scene: Scene) -> Query:
    """How many things there are; of a colour or of a shape, if there is one."""
    thing = rng.choice(scene.things)
    counted = rng.choice((Said(), Said(), Said(colour=thing.colour), Said(shape=thing.shape)))
    number = sum(_fits(counted, thing) for thing in scene.things)
    return Query(_noun(rng, number, counted), number=number, counted=counted)


def _noun(rng: random.Random, number: int, counted: Said) -> str:
    """ "three shapes", "1 star", "two red shapes"."""
    spelled = rng.choice((NUMBERS[number], NUMBERS[number], str(number)))
    noun = counted.shape or "shape"
    plural = PLURAL.get(noun, "shapes")
    return " ".join(filter(None, (spelled, counted.colour, noun if number == 1 else plural)))


def _fits(said: Said, thing: Thing) -> bool:
    pairs = ((said.size, thing.size), (said.colour, thing.colour), (said.shape, thing.shape), (said.place, thing.place))
    return all(word in (None, real) for word, real in pairs)


# --- The truth ------------------------------------------------------------------------------------------------------

_CODES = tuple({word: code for code, word in enumerate(words)} for words in (SIZES, list(COLOURS), SHAPES, PLACES))
_ANY, _NOTHING = -1, -2
_ORDERS = tuple(itertools.permutations(range(MOST)))


def truth(scenes: Sequence[Scene], queries: Sequence[Query]) -> np.ndarray:
    """bool[B, C]: is text c true of scene b?"""
    things, stands = _things(scenes), _relations(scenes)
    said = np.array([[_code(one) for one in (*q.things, *[Said()] * (MOST - len(q.things)))] for q in queries])
    fits = _fit(said[None, :, :, None], things[:, None, None])  # [B, C, said, thing]
    named = np.array([[k < len(q.things) for k in range(MOST)] for q in queries])
    fits |= ~named[None, :, :, None]
    names = [None, *RELATIONS]
    stands = stands[:, [names.index(q.relation) for q in queries]]  # [B, C, thing, thing]
    found = np.zeros(fits.shape[:2], dtype=bool)
    for order in _ORDERS:
        chosen = [fits[:, :, k, thing] for k, thing in enumerate(order)]
        found |= np.logical_and.reduce([*chosen, stands[:, :, order[0], order[1]]])
    counted = np.array([_code(q.counted) for q in queries])
    count = _fit(counted[None, :, None], things[:, None]).sum(-1)
    number = np.array([_ANY if q.number is None else q.number for q in queries])
    matching: np.ndarray = found & ((number == _ANY) | (count == number))
    return matching


def _fit(said: np.ndarray, things: np.ndarray) -> np.ndarray:
    """int[..., 4] against int[..., 4]; nothing fits an empty slot."""
    fits: np.ndarray = ((said == _ANY) | (said == things)).all(-1) & (things[..., 0] != _NOTHING)
    return fits


def _code(said: Said) -> list[int]:
    words = (said.size, said.colour, said.shape, said.place)
    return [_ANY if word is None else codes[word] for word, codes in zip(words, _CODES, strict=True)]


def _things(scenes: Sequence[Scene]) -> np.ndarray:
    """int[B, MOST, 4]: size, colour, shape and place of each thing; empty slots are `_NOTHING`."""
    table = np.full((len(scenes), MOST, 4), _NOTHING)
    for row, scene in zip(table, scenes, strict=True):
        for slot, t in zip(row, scene.things, strict=False):
            slot[:] = _code(Said(t.size, t.colour, t.shape, t.place))
    return table


def _relations(scenes: Sequence[Scene]) -> np.ndarray:
    """bool[B, 1 + relations, MOST, MOST]: does the first thing stand so to the second? The first entry is no relation,
    which always holds."""
    table = np.zeros((len(scenes), 1 + len(RELATIONS), MOST, MOST), dtype=bool)
    table[:, 0] = True
    for row, scene in zip(table, scenes, strict=True):
        for entry, holds in zip(row[1:], RELATIONS.values(), strict=True):
            for (i, a), (j, b) in itertools.permutations(enumerate(scene.things), 2):
                entry[i, j] = holds(a, b)
    return table
