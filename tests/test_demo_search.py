"""`vlm demo --task search`: the collection, the figures, and going on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from vlm.cli import main
from vlm.demo import album, captions, figures, queries, scenes, search
from vlm.demo.dataset import read_lines
from vlm.errors import ConfigError

COUNT = 60


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "scenes"
    search.main(out, count=COUNT)
    return out


# --- The collection -------------------------------------------------------------------------------------------------


def test_the_album_is_held_out_and_its_lines_are_true(ran: Path) -> None:
    seen, lines = album.all_scenes(0, COUNT), read_lines(ran / "scenes.jsonl")
    assert len(seen) == len(lines) == len({line["id"] for line in lines}) == COUNT
    for scene, line in zip(seen, lines, strict=True):
        standing = {(t.colour, t.shape): 3 * t.row + t.column for t in scene.things}
        assert any(scenes.HELD_OUT[pair] == cell for pair, cell in standing.items())
        assert line["captions"] and all(captions.check(scene, text).true for text in line["captions"])
        assert line["number"] == len(scene.things)
        with Image.open(ran / line["image"]) as opened:
            assert opened.tobytes() == scenes.draw(scene).tobytes()
    assert [len(scene.things) for scene in seen[:6]] == [1, 2, 3, 1, 2, 3]


def test_labels_are_those_of_the_scenes(ran: Path) -> None:
    seen = {f"scene-{number:03d}": scene for number, scene in enumerate(album.all_scenes(0, COUNT))}
    for name in ("colour", "shape"):
        lines = read_lines(ran / f"{name}.jsonl")
        assert len(lines) == COUNT // 3
        assert all([getattr(t, name) for t in seen[line["id"]].things] == [line["label"]] for line in lines)
    assert {line["label"] for line in read_lines(ran / "number.jsonl")} == set(album.NUMBERS)


def test_what_is_sought_is_there_beside_what_looks_like_it() -> None:
    seen = album.all_scenes(0)
    fits = [captions.check(scene, album.SOUGHT).true for scene in seen]
    turned = [captions.check(scene, "a blue circle above a red star").true for scene in seen]
    mixed = [captions.check(scene, "a blue star above a red circle").true for scene in seen]
    assert min(sum(fits), sum(turned), sum(mixed)) >= 3


# --- The figures ----------------------------------------------------------------------------------------------------


def test_figures_of_a_reader_that_knows_and_of_one_that_is_blind() -> None:
    seen = album.all_scenes(1, COUNT)
    texts = [(number, captions.all_things(scene)) for number, scene in enumerate(seen)]

    def knows(asked: Sequence[str]) -> Tensor:
        return torch.tensor([[20.0 if holds(scene, text) else -20.0 for text in asked] for scene in seen])

    def blind(asked: Sequence[str]) -> Tensor:
        return torch.full((len(seen), len(asked)), -5.0)

    for figure in (*figures.zero_shot(seen, knows), figures.relation(seen, knows)):
        assert figure.value == 1 and figure.asked >= COUNT // 3
    for figure in (*figures.zero_shot(seen, blind), figures.relation(seen, blind)):
        assert figure.value < 0.5
    own, true, back = figures.retrieval(seen, texts, knows)
    assert true.value == 1 and own.value == pytest.approx(own.best, abs=0.1) and own.chance == back.chance == 1 / COUNT
    assert figures.retrieval(seen, texts, blind)[0].value == pytest.approx(1 / COUNT)  # the first picture for all


def test_the_calibration_error_is_that_of_the_probabilities() -> None:
    seen = album.all_scenes(1, COUNT)
    true = torch.from_numpy(queries.truth(seen, figures.calibration_texts(seen)))
    certain = figures.calibration(seen, lambda asked: torch.where(true, 20.0, -20.0))
    assert certain.value < 1e-6 and certain.asked == COUNT**2
    one = figures.calibration(seen, lambda asked: torch.full(true.shape, -1.0))
    share = true.double().mean().item()
    assert one.value == pytest.approx(abs(share - 1 / (1 + math.e)), abs=1e-6)


def holds(scene: scenes.Scene, text: str) -> bool:
    """Is the text, a caption or one of the labels, true of the scene?"""
    if captions.is_caption(text):
        return captions.check(scene, text).true
    word = text.split()[1]
    if word.startswith("shape"):
        word = text.split()[0]
        return word in captions.NUMBERS and len(scene.things) == captions.NUMBERS.index(word)
    return any(word in (thing.colour, thing.shape) for thing in scene.things)


def test_the_shipped_siglip_knows_colours_shapes_and_numbers(ran: Path) -> None:
    """Of pictures that it has not seen, far from chance; its probabilities are what they say."""
    value = {figure["name"]: figure["value"] for figure in json.loads((ran / "search.json").read_text())["figures"]}
    assert min(value["zero_shot_colour"], value["zero_shot_shape"], value["zero_shot_number"]) > 0.9
    assert value["text_to_image_true"] > 0.6 and value["calibration_error"] < 0.03


# --- The command ----------------------------------------------------------------------------------------------------


def test_what_it_found_is_told_and_shown(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((ran / "search.json").read_text())
    seen = album.all_scenes(0, COUNT)
    for found in facts["searches"]:
        assert len({result["image"] for result in found["results"]}) == search.FOUND
        assert [r["probability"] for r in found["results"]] == sorted(
            (r["probability"] for r in found["results"]), reverse=True
        )
        if captions.is_caption(found["query"]):
            numbers = [int(result["image"][-7:-4]) for result in found["results"]]
            truths = [captions.check(seen[number], found["query"]).true for number in numbers]
            assert [result["fits"] for result in found["results"]] == truths
    page = (ran / "report.html").read_text()
    assert album.SOUGHT in page and "http" not in page.replace("http-equiv", "")
    before = {path: path.stat().st_mtime_ns for path in ran.rglob("*")}
    assert search.main(ran, count=COUNT) == facts  # done already: the same is printed again
    assert {path: path.stat().st_mtime_ns for path in ran.rglob("*")} == before
    assert "of the first 6 pictures" in capsys.readouterr().out


def test_a_lost_end_is_made_again(ran: Path) -> None:
    facts = json.loads((ran / "search.json").read_text())
    (ran / "search.json").unlink()
    again = search.main(ran, count=COUNT)
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}


def test_another_demo_in_the_same_directory_is_refused(ran: Path) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        search.main(ran, count=COUNT, seed=1)


def test_the_command_takes_no_tower_of_another_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--task", "search", "--encoder", "clip"]) == 2
    assert "--task search" in capsys.readouterr().err
