"""Signs with numbers: what is drawn is what is written, both towers get 36 tokens, the scores are right."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlm
from vlm.demo import dataset, reading, text
from vlm.demo.start import Choice, make
from vlm.errors import ConfigError
from vlm.train.run import run as train

SIGNS = [text.make_sign(random.Random(number), text.GRIDS[number % 7]) for number in range(70)]


def ink(sign: text.Sign, picture: Image.Image) -> np.ndarray:
    """float[H, W]: 0 is paper, 1 is ink."""
    paper, dark = (np.array(colour, dtype=float) for colour in (sign.paper, sign.ink))
    return ((paper - np.asarray(picture)) / (paper - dark)).mean(-1)


def read(sign: text.Sign, picture: Image.Image) -> str:
    """The digits whose bitmaps fit best, from the picture and the place of the text alone."""
    darkness, factor = ink(sign, picture), sign.scale / text.PATCH
    said = ""
    for number in range(len(sign.text)):
        left, top = sign.corner(number)
        ys = [int(factor * (top + (row + 0.5) * sign.dot)) for row in range(text.HEIGHT)]
        xs = [int(factor * (left + (column + 0.5) * sign.dot)) for column in range(text.WIDTH)]
        dots = darkness[np.ix_(ys, xs)]
        said += min(text.GLYPHS, key=lambda digit: float(np.abs(dots - text.bitmap(digit)).sum()))
    return said


def test_every_sign_shows_its_number() -> None:
    for sign in SIGNS:
        picture = text.draw(sign)
        assert picture.size == sign.size and read(sign, picture) == sign.text
        inside = ink(sign, picture)
        assert inside.sum() == pytest.approx(
            sum(text.bitmap(digit).sum() for digit in sign.text) * (sign.dot * sign.scale / text.PATCH) ** 2, rel=0.1
        ), "nothing is cut off, and nothing else is drawn"


def test_the_same_seed_draws_the_same_and_digits_differ() -> None:
    again = [text.make_sign(random.Random(number), text.GRIDS[number % 7]) for number in range(70)]
    assert again == SIGNS
    assert text.draw(SIGNS[0]).tobytes() == text.draw(again[0]).tobytes()
    bitmaps = {digit: text.bitmap(digit) for digit in text.GLYPHS}
    assert all(b.shape == (text.HEIGHT, text.WIDTH) for b in bitmaps.values()) and len(bitmaps) == 10
    pairs = [(a, b) for a in bitmaps for b in bitmaps if a < b]
    assert min(int((bitmaps[a] != bitmaps[b]).sum()) for a, b in pairs) >= 3


def test_squashing_a_strip_loses_what_naflex_keeps() -> None:
    """A dot of a digit is more than a pixel wide and high on every shape as NaFlex sees it. Squashed, two dots share a
    pixel on the longest strips, and squares, the control, are as they were."""
    for sign in SIGNS:
        longest = max(sign.grid)
        squashed = sign.dot * 72 / (text.PATCH * longest)
        assert sign.dot > 1.3
        assert (squashed <= 0.5) == (longest == 18)
        assert (squashed == sign.dot) == (longest == 6)
        for number in range(len(sign.text)):
            corner = sign.corner(number)
            ends = (corner[0] + text.WIDTH * sign.dot, corner[1] + text.HEIGHT * sign.dot)
            cell = [int(value // text.PATCH) for value in corner]
            assert [int(value // text.PATCH) for value in ends] == cell, "one digit, one patch"


@pytest.mark.parametrize("tower", reading.TOWERS)
def test_every_shape_is_36_tokens(tmp_path: Path, tower: str) -> None:
    """The transform's grid, the tower's patches, and the placeholders of the decoder's input."""
    settings = make(Choice(tower), tmp_path, 0).model
    model, processor = vlm.new(settings.pop("encoder"), "linear", settings.pop("decoder"), **settings)
    for sign in SIGNS[:7]:
        picture = text.draw(sign)
        picture.save(tmp_path / "sign.png")
        assert reading.image_tokens(processor, tmp_path / "sign.png") == 36
        grid = processor.image_transform.grid(picture.height, picture.width)
        assert grid == (sign.grid if tower == "siglip2_naflex" else (6, 6))


def test_half_of_training_are_squares_and_the_test_has_all_shapes_alike() -> None:
    train = [reading.grid_of(number, "train") for number in range(84)]
    test = [reading.grid_of(number, "test") for number in range(84)]
    assert {grid: test.count(grid) for grid in text.GRIDS} == dict.fromkeys(text.GRIDS, 12)
    assert {grid: train.count(grid) for grid in text.GRIDS} == {**dict.fromkeys(text.GRIDS, 7), text.SQUARE: 42}


def test_both_towers_share_recipe_data_and_weights(tmp_path: Path) -> None:
    first, second = (reading.recipe(tower, tmp_path, 4, 10) for tower in reading.TOWERS)
    assert second["model"].pop("encoder_kind") == "siglip2_naflex"
    assert second["model"].pop("image") == {"max_num_patches": 36}
    assert first.pop("out") != second.pop("out")
    assert first == second and [stage["steps"] for stage in first["stages"]] == [10]


def test_distance() -> None:
    for said, true, edits in [("", "", 0), ("12", "12", 0), ("", "123", 3), ("132", "123", 2), ("1203", "123", 1)]:
        assert text.distance(said, true) == text.distance(true, said) == edits
    assert text.distance("kitten", "sitting") == 3


def test_scores_by_hand() -> None:
    lines = [
        {"shape": "9:1", "tokens": 36, "suffix": "1234", "prediction": "1234"},
        {"shape": "9:1", "tokens": 34, "suffix": "1234", "prediction": "134"},
        {"shape": "1:1", "tokens": 36, "suffix": "5678", "prediction": "8765"},
    ]
    scores = reading.score(lines)
    assert scores["tokens"] == pytest.approx(106 / 3)
    assert scores["9:1"] == {"exact": 0.5, "character_errors": 0.125, "pictures": 2}
    assert scores["1:1"] == {"exact": 0.0, "character_errors": 1.0, "pictures": 1}
    assert scores["all"]["exact"] == 0.3333


def test_the_task_runs_goes_on_and_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.demo import pretrain

    monkeypatch.setattr(pretrain, "run_jobs", lambda jobs: [job(*arguments) for job, arguments in jobs])
    amount = reading.Amount(train=14, test=7, steps=1)
    facts = reading.main(tmp_path, amount=amount, train=train)
    for tower in reading.TOWERS:
        assert facts[tower]["tokens"] == 36
        assert len(dataset.read_lines(tmp_path / tower / "said.jsonl")) == 7
    table = capsys.readouterr().out
    assert all(shape in table for shape in ("9:1", "1:1", "1:9", "all", "36.0"))
    monkeypatch.setattr(pretrain, "run_jobs", lambda jobs: pytest.fail("done already") if jobs else None)
    assert reading.main(tmp_path, amount=amount, train=train) == facts
    with pytest.raises(ConfigError, match="other settings"):
        reading.main(tmp_path, seed=1, amount=amount, train=train)
