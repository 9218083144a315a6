"""The demo's drawn world: what is asked and said about a scene is checked against its pixels and by other rules."""

import itertools
import random
import re
from typing import Any

import pytest
from PIL import Image

from vlm.demo import captions, questions, scenes

SCENES = 300
WORDS = re.compile(r"[a-z]+|[0-9]+")
_PLACE = r"(?:top|bottom)(?: left| right)?|left|right|center"
NAMED = re.compile(rf"({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.SHAPES)})\?? at the ({_PLACE})")


def make(count: int, *, held_out: bool = False, seed: int = 0) -> list[scenes.Scene]:
    rng = random.Random(seed)
    return [scenes.make_scene(rng, held_out=held_out) for _ in range(count)]


def named_pairs(text: str) -> set[tuple[str, str]]:
    """(colour, shape) of every two neighbouring words that are a colour and a shape."""
    words = WORDS.findall(text)
    return {(a, b) for a, b in itertools.pairwise(words) if a in scenes.COLOURS and b in scenes.SHAPES}


def nearest_colour(pixel: tuple[int, int, int]) -> str:
    """The colour name by hue, chroma and lightness: another rule than the one that draws."""
    red, green, blue = pixel
    light, chroma = max(pixel), max(pixel) - min(pixel)
    if chroma < 45:
        return "black" if light < 60 else "gray"
    if blue == light and blue - green > 60:
        return "blue"
    if abs(green - blue) < 45 and green > red + 45:
        return "teal"
    if green == light and green > red + 60:
        return "green"
    if red > 150 and green > 150:
        return "yellow"
    return "red" if red - max(green, blue) > 175 else "brown"


def components(image: Image.Image, background: tuple[int, int, int]) -> list[list[tuple[int, int]]]:
    """Groups of touching pixels that differ clearly from the background."""
    width, height = image.size
    pixels: Any = image.load()
    other = {
        (x, y)
        for x in range(width)
        for y in range(height)
        if sum(abs(a - b) for a, b in zip(pixels[x, y], background, strict=True)) > 90
    }
    groups = []
    while other:
        stack, group = [other.pop()], []
        while stack:
            x, y = stack.pop()
            group.append((x, y))
            for near in ((x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)):
                if near in other:
                    other.remove(near)
                    stack.append(near)
        groups.append(group)
    return groups


def triples(scene: scenes.Scene) -> set[tuple[str, str, str]]:
    """(colour, shape, place) of each thing, the place read from its centre."""
    return {(t.colour, t.shape, place(t)) for t in scene.things}


def held_out_triples() -> set[tuple[str, str, str]]:
    return {(colour, shape, scenes.PLACES[cell]) for (colour, shape), cell in scenes.HELD_OUT.items()}


def test_every_test_scene_holds_a_combination_that_no_training_scene_has() -> None:
    held_out = held_out_triples()
    assert len(held_out) == 8 * 5 and set(scenes.HELD_OUT.values()) == set(range(9))
    for scene in make(1000, seed=1, held_out=True):
        assert triples(scene) & held_out
    train = set().union(*map(triples, make(5000)))
    assert train.isdisjoint(held_out) and len(train) == 8 * 5 * 8  # each pair in each of its other eight places
    rng = random.Random(1)
    loose = set().union(*(triples(scenes.make_loose_thing(rng)) for _ in range(5000)))
    assert loose.isdisjoint(held_out) and len(loose) > 250


def test_training_text_names_no_held_out_combination() -> None:
    rng = random.Random(2)
    held_out, seen = held_out_triples(), set()
    for scene in make(SCENES):
        texts = captions.captions(rng, scene)
        texts += [f"{q.text} at the {q.answer}" for q in questions.ask(rng, scene, len(questions.KINDS))]
        for text in texts:
            seen |= set(NAMED.findall(text))
    assert len(seen) > 250 and seen.isdisjoint(held_out)
    test = make(50, held_out=True)
    assert any(held_out & set(NAMED.findall(text)) for scene in test for text in captions.captions(rng, scene))


def test_every_pair_and_every_place_is_drawn() -> None:
    things = [t for scene in make(2000) for t in scene.things]
    assert {(t.colour, t.shape) for t in things} == set(scenes.PAIRS)
    assert {t.place for t in things} == set(scenes.PLACES) and len(scenes.PLACES) == 9
    assert {t.size for t in things} == set(scenes.SIZES)


def test_the_same_seed_draws_the_same_pictures() -> None:
    first, second = (scenes.draw(make(5, seed=3)[-1]).tobytes() for _ in range(2))
    assert first == second
    assert first != scenes.draw(make(5, seed=4)[-1]).tobytes()


def test_pictures_show_the_things_where_the_scene_says() -> None:
    """Count, colour, place and size, measured in the pixels."""
    counted = 0
    for scene in make(150, seed=5) + make(150, seed=6, held_out=True):
        image = scenes.draw(scene)
        assert image.size == (scenes.IMAGE_SIZE,) * 2 and image.mode == "RGB"
        for thing in scene.things:
            pixel = image.getpixel((int(thing.x), int(thing.y)))
            assert nearest_colour(pixel) == thing.colour, (pixel, thing)  # type: ignore[arg-type]
        groups = components(image, scene.background)
        if len(groups) != len(scene.things):  # neighbours that touch
            continue
        counted += 1
        measured = sorted(_measure(group) for group in groups)
        assert [m[:3] for m in measured] == sorted((t.row, t.column, t.size) for t in scene.things)
    assert counted > 200


def _measure(group: list[tuple[int, int]]) -> tuple[int, int, str]:
    columns, rows = zip(*group, strict=True)
    middle = ((min(rows) + max(rows)) / 2, (min(columns) + max(columns)) / 2)
    extent = max(max(rows) - min(rows), max(columns) - min(columns)) + 1
    row, column = (int(v / scenes.IMAGE_SIZE * 3) for v in middle)
    return row, column, "large" if extent > 17 else "small"


def test_answers_agree_with_an_independent_reading_of_the_scene() -> None:
    rng = random.Random(7)
    kinds = set()
    for scene in make(SCENES, seed=8) + make(SCENES, seed=9, held_out=True):
        for question in questions.ask(rng, scene, len(questions.KINDS), tuple(questions.KINDS)):
            assert question.answer == answer(scene, question.text), (scene, question)
            kinds.add(question.kind)
    assert kinds == set(questions.KINDS)


def answer(scene: scenes.Scene, text: str) -> str:
    """Read the question's words and look at coordinates, not at grid cells."""
    words = WORDS.findall(text)
    things = [t for t in scene.things if (t.colour, t.shape) in named_pairs(text)]
    if text.startswith("how many"):
        plural = words[2]
        if plural == "shapes":
            return str(len(scene.things))
        return str(
            sum(t.colour == plural or t.shape + ("es" if t.shape == "cross" else "s") == plural for t in scene.things)
        )
    if text.startswith("where"):
        return place(things[0])
    if "size" in words or "large" in words:
        return "large" if things[0].radius > 8 else "small"
    if words[0] == "is" and len(named_pairs(text)) == 1:
        return "yes" if things else "no"
    relation = next((r for r in ("left", "right", "above", "below") if r in words), None)
    if words[0] == "is":
        pair = re.findall(r"(\w+ \w+) (?:left of|right of|above|below) the (\w+ \w+)\?", text)[0]
        first, second = (next(t for t in scene.things if t.name == name) for name in pair)
        return "yes" if stands(first, str(relation), second) else "no"
    if relation:
        found = [t for t in scene.things if t is not things[0] and stands(t, relation, things[0])]
        assert len(found) == 1
        return found[0].name
    (single,) = [t for t in scene.things if t.colour in words or t.shape in words]
    return single.shape if single.colour in words else single.colour


def place(thing: scenes.Thing) -> str:
    third = scenes.IMAGE_SIZE / 3
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    return f"{rows[int(thing.y / third)]} {columns[int(thing.x / third)]}".strip() or "center"


def stands(first: scenes.Thing, relation: str, second: scenes.Thing) -> bool:
    third = scenes.IMAGE_SIZE / 3
    across, down = (int(getattr(first, axis) / third) - int(getattr(second, axis) / third) for axis in "xy")
    return {"left": across < 0, "right": across > 0, "above": down < 0, "below": down > 0}[relation]


@pytest.mark.parametrize("kind", ["exists", "relation", "size"])
def test_two_way_questions_are_balanced(kind: str) -> None:
    rng = random.Random(10)
    made = [questions.question(rng, scene, kind) for scene in make(2000, seed=11)]
    answers = [q.answer for q in made if q is not None]
    share = answers.count(answers[0]) / len(answers)
    assert len(set(answers)) == 2 and 0.45 < share < 0.55
