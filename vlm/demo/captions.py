"""Captions of a scene, and the checker that says whether a caption is true of one.

The writer and the checker share one small grammar (words in capitals stand for their members):

    caption  := [LEAD] (counted | relation | list)
    counted  := NUMBER "shapes" ":" list                  the number is exact
    relation := thing RELATION thing
    list     := thing | thing "and" thing | thing "," ... "and" thing
    thing    := "a" [SIZE] COLOUR SHAPE ["at the" PLACE]

Things of a list are different things of the scene.  A caption must name at least one colour with its shape: nothing
else parses, so "a picture" or "two shapes" is no caption.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from vlm.demo.questions import RELATIONS
from vlm.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
LEADS = ("a picture of ", "there is ", "")
_KEPT = 4096
"""Texts that stay parsed: the same captions are checked against many scenes."""
SIDES = {"to the left of": "left of", "to the right of": "right of"}
"""Longer spellings of relations."""


def captions(rng: random.Random, scene: Scene) -> list[str]:
    """Different true captions of the scene, three to six, in random order."""
    made = [all_things(scene), rng.choice(LEADS) + one_thing(rng.choice(scene.things)), every_detail(scene)]
    if len(scene.things) > 1:
        made += [_counted(scene), *(_related(rng, scene) for _ in range(2))]
    made = list(dict.fromkeys(made))
    rng.shuffle(made)
    return made


def one_thing(thing: Thing) -> str:
    return f"a {thing.size} {thing.name} at the {thing.place}"


def all_things(scene: Scene) -> str:
    return _join([f"a {thing.name}" for thing in scene.things])


def every_detail(scene: Scene) -> str:
    return _join([one_thing(thing) for thing in scene.things])


def _counted(scene: Scene) -> str:
    return f"{NUMBERS[len(scene.things)]} shapes: {all_things(scene)}"


def _related(rng: random.Random, scene: Scene) -> str:
    first, second = rng.sample(scene.things, 2)
    relation = rng.choice([name for name, holds in RELATIONS.items() if holds(first, second)])
    long = {short: long for long, short in SIDES.items()}
    spelled = rng.choice((relation, long.get(relation, relation)))
    return f"a {first.name} {spelled} a {second.name}"


def _join(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


@dataclass(frozen=True)
class Verdict:
    """`true` or not, and why not."""

    true: bool
    reason: str = ""


@dataclass(frozen=True)
class _Said:
    """A thing as a caption names it; None where the caption does not say."""

    size: str | None
    colour: str
    shape: str
    place: str | None

    def fits(self, thing: Thing) -> bool:
        said = (self.colour, self.shape) == (thing.colour, thing.shape)
        return said and self.size in (None, thing.size) and self.place in (None, thing.place)


def _any_of(words: Sequence[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_PARTS = re.compile(
    rf"a (?:(?P<size>{_any_of(SIZES)}) )?(?P<colour>{_any_of(list(COLOURS))}) (?P<shape>{_any_of(SHAPES)})"
    rf"(?: at the (?P<place>{_any_of(PLACES)}))?"
)
_THING = re.sub(r"\?P<\w+>", "?:", _PARTS.pattern)
_CAPTION = re.compile(
    rf"(?:{_any_of(LEADS)})"
    rf"(?:(?P<first>{_THING}) (?P<relation>{_any_of([*RELATIONS, *SIDES])}) (?P<second>{_THING})"
    rf"|(?:(?P<number>{_any_of(NUMBERS)}) shapes: )?(?P<list>{_THING}(?:(?:, {_THING})* and {_THING})?))"
)


def is_caption(text: str) -> bool:
    """Does the text parse?"""
    return _match(text) is not None


@lru_cache(_KEPT)
def _match(text: str) -> re.Match[str] | None:
    return _CAPTION.fullmatch(text.strip().removesuffix("."))


def check(scene: Scene, caption: str) -> Verdict:
    """Is the caption a true description of the scene?  Text outside the grammar is not."""
    match = _match(caption)
    if match is None:
        return Verdict(False, "not a caption: it does not parse")
    if match["relation"]:
        return _check_relation(scene, match)
    said = _said(match["list"])
    if match["number"] and NUMBERS.index(match["number"]) != len(scene.things):
        return Verdict(False, f"there are {len(scene.things)} shapes, not {match['number']}")
    choices = itertools.permutations(scene.things, len(said))
    if any(all(s.fits(t) for s, t in zip(said, chosen, strict=True)) for chosen in choices):
        return Verdict(True)
    return Verdict(False, f"not in the picture: {match['list']}")


def _check_relation(scene: Scene, match: re.Match[str]) -> Verdict:
    relation = SIDES.get(match["relation"], match["relation"])
    first, second = (_said(match[key])[0] for key in ("first", "second"))
    pairs = itertools.permutations(scene.things, 2)
    if any(first.fits(a) and second.fits(b) and RELATIONS[relation](a, b) for a, b in pairs):
        return Verdict(True)
    return Verdict(False, f"not so in the picture: {match[0]}")


@lru_cache(_KEPT)
def _said(text: str) -> list[_Said]:
    """The things that a list, or one thing, names."""
    return [_Said(*found.group("size", "colour", "shape", "place")) for found in _PARTS.finditer(text)]
