"""Boxes, points and masks as text, and what is wrong with such text."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlm
from vlm.build.presets import tiny
from vlm.data.reading import read
from vlm.errors import ConfigError, DataError
from vlm.text import control
from vlm.text.locations import (
    Located,
    box_to_loc,
    loc_to_box,
    mask_to_seg,
    move,
    objects_to_text,
    point_to_loc,
    problems,
    text_to_objects,
)

MASK = "".join(f"<seg{code:03d}>" for code in range(0, 128, 8))
BOX = "<loc0001><loc0002><loc0003><loc0004>"


def test_a_box_by_hand() -> None:
    # 480 high, 640 wide: y 120/480 and 360/480, x 64/640 and 640/640; 0.25 * 1023 = 255.75, 0.1 * 1023 = 102.3.
    assert box_to_loc((64, 120, 640, 360), 640, 480) == "<loc0256><loc0102><loc0767><loc1023>"
    assert box_to_loc(np.array([0.1, 0.25, 1.0, 0.75])) == "<loc0256><loc0102><loc0767><loc1023>"
    assert point_to_loc((64, 120), 640, 480) == "<loc0256><loc0102>"
    (found,) = text_to_objects("<loc0256><loc0102><loc0767><loc1023> cat", 640, 480)
    assert found.label == "cat"
    assert found.box == pytest.approx((102 / 1023 * 640, 256 / 1023 * 480, 640, 767 / 1023 * 480))


def test_places_outside_are_clipped_to_the_image() -> None:
    assert box_to_loc((-3, 0, 41, 30), 40, 30) == "<loc0000><loc0000><loc1023><loc1023>"
    assert point_to_loc((40.4, 31), 40, 30) == "<loc1023><loc1023>"


def test_objects_there_and_back() -> None:
    rng = random.Random(0)
    objects = []
    for number in range(200):
        x0, y0 = rng.randrange(900), rng.randrange(700)
        box = (x0, y0, x0 + rng.randrange(1, 100), y0 + rng.randrange(1, 60))
        codes = tuple(rng.randrange(128) for _ in range(16)) if number % 3 == 0 else ()
        objects.append(Located(f"thing {number}", box=box, codes=codes))
        objects.append(Located("", point=(rng.random() * 1000, rng.random() * 760)))
    text = objects_to_text(objects, 1000, 760)
    assert problems(text) == []
    back = text_to_objects(text, 1000, 760)
    assert [(item.label, item.codes) for item in back] == [(item.label, item.codes) for item in objects]
    for ours, theirs in zip(objects, back, strict=True):
        assert (ours.box is None) == (theirs.box is None)
        assert (theirs.box or theirs.point) == pytest.approx(ours.box or ours.point, abs=0.51 * 1000 / 1023)


def test_every_written_token_is_one_token_of_the_model() -> None:
    tokenizer = tiny()[1].tokenizer
    text = objects_to_text([Located("", box=(0, 0, 1, 1), codes=tuple(range(112, 128)))])
    assert len(tokenizer.encode(text, add_special_tokens=False)) == 4 + 16


@pytest.mark.parametrize(
    ("box", "size", "message"),
    [
        ((10, 10, 5, 20), (40, 30), "lies before the upper left one; a box is x0, y0, x1, y1"),
        ((10, 10, 20, 5), (40, 30), "lies before the upper left one"),
        ((1, 2, 3), (40, 30), "a box is x0, y0, x1, y1, 4 finite numbers"),
        ((1, 2, 3, math.nan), (40, 30), "4 finite numbers"),
        ((1, 2, 3, math.inf), (40, 30), "4 finite numbers"),
        ((1, 2, 3, "x"), (40, 30), "a box is x0, y0, x1, y1, got"),
        ((1, 2, 3, 4), (0, 30), "the image has the size 0 x 30"),
    ],
)
def test_boxes_that_are_none(box: tuple[float, ...], size: tuple[int, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        box_to_loc(box, *size)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Located("cat"), "an object has a box or a point"),
        (Located("cat", box=(0, 0, 1, 1), point=(0, 0)), "an object has a box or a point"),
        (Located("cat", point=(0, 0), codes=(1,) * 16), "the codes of a mask need its box"),
        (Located("cat", box=(0, 0, 1, 1), codes=(1,) * 15), "a mask is 16 codes from 0 to 127"),
        (Located("cat", box=(0, 0, 1, 1), codes=(128,) * 16), "a mask is 16 codes from 0 to 127"),
        (Located("cat ; dog", box=(0, 0, 1, 1)), "may hold no ';'"),
        (Located("<loc0001>", box=(0, 0, 1, 1)), "no tokens"),
    ],
)
def test_objects_that_are_none(item: Located, message: str) -> None:
    with pytest.raises(DataError, match=message):
        objects_to_text([item])


def test_masks_cannot_be_encoded_and_the_reason_is_said() -> None:
    with pytest.raises(ConfigError, match="published the decoder .* not its encoder"):
        mask_to_seg(np.ones((8, 8), bool))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<loc1024><loc0000><loc0001><loc0002> cat", "'<loc1024>' is no token.* the border of the image is <loc1023>"),
        ("<loc12><loc0100><loc0200><loc0300>", "'<loc12>' is no token"),
        ("<loc-001>", "'<loc-001>' is no token"),
        ("<loc00010>", "'<loc00010>' is no token"),
        ("<loc0001.5>", "is no token"),
        ("<loc 0001>", "is no token"),
        ("<loc_0001>", "is no token"),
        ("<LOC0001>", "is no token"),
        ("</loc0001>", "is no token"),
        ("<loc>", "is no token"),
        ("<loc\u0660\u0660\u0660\u0661>", "is no token"),
        ("loc0001>", "is no token"),
        ("[loc0001][loc0002]", "is no token"),
        ("&lt;loc0001&gt;", "is no token"),
        ("<seg128>", "'<seg128>' is no token, .* there are <seg000> to <seg127>"),
        ("<seg12>", "'<seg12>' is no token"),
        ("<seg0001>", "'<seg0001>' is no token"),
        ("<loc0001><loc..", "'<loc..' is no token"),
        ("<loc0001><loc00", "'<loc00' is no token"),
        ("<loc0001><loc0002><loc0003> cat", "3 <loc> tokens in a row; a box is four"),
        ("<loc0001> cat", "1 <loc> tokens in a row"),
        (BOX * 2, "8 <loc> tokens in a row"),
        (f"{BOX} cat ; <loc0001><loc0002><loc0003> dog", "3 <loc> tokens in a row"),
        ("<loc0001><loc0002> <loc0003><loc0004>", "blanks between <loc0002> and <loc0003>"),
        ("<loc0500><loc0001><loc0100><loc0002>", "y1 < y0; the order is"),
        ("<loc0001><loc0500><loc0002><loc0100>", "x1 < x0; the order is"),
        (MASK, "a mask without its box"),
        (f"{BOX} {MASK}", "a mask without its box"),
        (f"<loc0001><loc0002>{MASK}", "a mask without its box"),
        (BOX + MASK[:-8], "15 <seg> tokens in a row; a mask is 16"),
        (BOX + MASK * 2, "32 <seg> tokens in a row"),
    ],
)
def test_what_is_wrong_with_a_text_is_told(text: str, message: str, tmp_path: Path) -> None:
    assert problems(text)
    with pytest.raises(DataError, match=message):
        text_to_objects(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"image": "a.png", "prefix": f"caption {BOX}", "suffix": f"{BOX}{MASK} cat ; <loc0000><loc1023> nose"}
    for key in ("prefix", "suffix"):
        lines = [good, {**good, key: text}, good]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError, match=rf"train.jsonl:2: bad-location: '{key}': .*{message}"):
            read(tmp_path / "train.jsonl")
        examples, skipped = read(tmp_path / "train.jsonl", skip_bad=True)
        assert [example.line for example in examples] == [1, 3] and skipped[0].code == "bad-location"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "the location of segment 12, locality <location> <segment> loc 5 > 3",
        "a block < 5 and <lo> <se>",
        f"{BOX} cat",
        f"{BOX}{MASK} cat ; {BOX} dog",
        "<loc0001><loc0002> nose ; <loc0003><loc0004> ear",
        "<loc0001><loc0001><loc0001><loc0001> a dot",  # a box thinner than a bin
    ],
)
def test_text_that_is_right_is_left_alone(text: str) -> None:
    assert problems(text) == []


def test_what_an_answer_says_is_read_or_is_none() -> None:
    assert loc_to_box(f"it is at {BOX}", 1023, 1023) == (2, 1, 4, 3)
    assert loc_to_box("<loc0001><loc0002><loc0003>") is None and loc_to_box("<loc1024>" * 4) is None


def test_moving_keeps_the_words() -> None:
    text = f"a {BOX}{MASK} cat ; <loc0010><loc0020> nose"
    assert move(text, lambda x, y: (x, y)) == text
    moved = move(text, lambda x, y: (x + 100 / 1023, y))
    assert moved == f"a <loc0001><loc0102><loc0003><loc0104>{MASK} cat ; <loc0010><loc0120> nose"
    assert move(text, lambda x, y: (x - 3 / 1023, y)) is None  # half of the masked box is outside
    assert move("no box", lambda x, y: (x - 1, y)) == "no box"


def test_the_module_is_public() -> None:
    assert vlm.text.locations.box_to_loc is box_to_loc


def test_a_prompt_with_malformed_tokens_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_told", set())
    processor = tiny()[1]
    picture = Image.new("RGB", (28, 28))
    for _ in range(2):
        processor([picture, picture], ["caption <loc1024><loc0000><loc0001><loc0002>", f"caption {BOX}"])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and told[0].startswith(
        "a prompt has malformed <loc> or <seg> tokens: '<loc1024>' is no token"
    )
