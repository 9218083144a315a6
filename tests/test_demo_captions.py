"""The demo's caption checker: it accepts what is true, refuses what is not, and refuses what says nothing."""

import random
import re

import pytest

from vlm.demo import captions, scenes

RED = (255, 0, 0)


def thing(name: str, row: int, column: int, size: str = "small") -> scenes.Thing:
    colour, shape = name.split()
    x, y = 24.0 * column + 12, 24.0 * row + 12
    return scenes.Thing(colour, shape, size, row, column, x, y, 5.0, 1.0, 0.0, scenes.COLOURS[colour])


def scene(*things: scenes.Thing) -> scenes.Scene:
    return scenes.Scene(things, (255, 255, 255))


TWO = scene(thing("red circle", 0, 0, "large"), thing("blue star", 1, 2))
THREE = scene(thing("red circle", 0, 0), thing("red star", 0, 2), thing("teal cross", 2, 1))


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a red circle.",
        "a blue star and a red circle",
        "a large red circle at the top left",
        "there is a small blue star",
        "a picture of a blue star at the right and a red circle",
        "two shapes: a red circle and a blue star",
        "two shapes: a red circle",
        "a red circle left of a blue star",
        "a red circle to the left of a blue star",
        "a small blue star below a large red circle",
    ],
)
def test_true_captions(text: str) -> None:
    assert captions.check(TWO, text).true


@pytest.mark.parametrize(
    "text",
    [
        "a red star",
        "a blue circle",
        "a small red circle",
        "a red circle at the top",
        "a red circle and a red circle",
        "a red circle, a blue star and a blue star",
        "three shapes: a red circle and a blue star",
        "one shapes: a red circle",
        "a red circle right of a blue star",
        "a blue star to the left of a red circle",
        "a blue star above a red circle",
        "a red circle left of a red circle",
    ],
)
def test_false_captions(text: str) -> None:
    verdict = captions.check(TWO, text)
    assert not verdict.true and "not a caption" not in verdict.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a picture",
        "a shape",
        "two shapes",
        "a circle",
        "a red shape",
        "red circle",
        "a red circle a blue star",
        "a red circle and",
        "a red circle, a blue star",
        "a red circle and a blue star and a blue star",
        "a red circle left of",
        "a red circle at the blue star",
        "a picture of there is a red circle",
        "a red circle at the top left left",
        "A red circle",
        "a red circle\na blue star",
        "a red circle left of a blue star and a red circle",
    ],
)
def test_text_outside_the_grammar_is_no_caption(text: str) -> None:
    verdict = captions.check(TWO, text)
    assert not verdict.true and "not a caption" in verdict.reason


def test_list_items_must_be_different_things() -> None:
    assert captions.check(THREE, "a red circle, a red star and a teal cross").true
    assert not captions.check(THREE, "a red star, a red star and a teal cross").true
    assert not captions.check(THREE, "a small red star and a large red star").true


def test_every_written_caption_is_true_of_its_scene_and_false_without_one_of_its_things() -> None:
    rng = random.Random(0)
    kinds = set()
    for _ in range(300):
        whole = scenes.make_scene(rng, held_out=rng.random() < 0.5)
        written = captions.captions(rng, whole)
        assert len(written) == len(set(written)) >= (5 if len(whole.things) > 1 else 2)
        for text in written:
            assert captions.check(whole, text).true, (whole, text)
            kinds.add(re.sub(r"[a-z]+", "", text)[:3] + text[:2])
            for missing in whole.things:
                rest = scenes.Scene(tuple(t for t in whole.things if t is not missing), whole.background)
                if missing.name in text:
                    assert not captions.check(rest, text).true, (missing, text)
    assert len(kinds) > 5


def test_changing_any_word_of_a_caption_makes_it_false() -> None:
    """A full description fixes every attribute, so that another colour, shape, size or place is a false statement."""
    rng = random.Random(1)
    groups: list[tuple[str, ...]] = [tuple(scenes.COLOURS), scenes.SHAPES, scenes.SIZES]
    for _ in range(100):
        whole = scenes.make_scene(rng)
        text = captions.every_detail(whole)
        words = text.split(" ")
        for index, word in enumerate(words):
            bare = word.rstrip(",")
            for group in groups:
                for other in group if bare in group else ():
                    if other != bare:
                        changed = " ".join([*words[:index], word.replace(bare, other), *words[index + 1 :]])
                        assert not captions.check(whole, changed).true, (text, changed)
