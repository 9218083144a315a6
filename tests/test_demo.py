"""The demo end to end at a small size: files, figures, going on after an interruption, refusals."""

import json
from pathlib import Path

import pytest

from vlm import demo
from vlm.demo import dataset, show
from vlm.demo.run import Answers, Size
from vlm.demo.scenes import HELD_OUT, PLACES
from vlm.errors import ConfigError

SMALL = Size(40, 6, ("stages.0.steps=2", "stages.1.steps=2", "stages.0.batch_size=8", "stages.1.batch_size=8"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    demo.main(out, size=SMALL)
    return out


def test_figures_and_files(ran: Path) -> None:
    facts = json.loads((ran / "demo.json").read_text())
    for name in ("vqa_accuracy", "vqa_accuracy_shuffled", "vqa_accuracy_untrained", "caption_accuracy"):
        assert 0 <= facts[name] <= 1
    assert facts["cider"] >= 0 and facts["seconds"] > 0 and 0.1 < facts["peak_memory_gb"] < 4
    assert (ran / "model" / "config.json").is_file()
    page = (ran / "report.html").read_text()
    assert "<html" in page and page.count("<article") == facts["num_questions"] + facts["num_captions"]


def test_running_again_changes_nothing(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {f: f.stat().st_mtime_ns for f in ran.rglob("*") if f.is_file()}
    facts = demo.main(ran, size=SMALL)
    assert facts == json.loads((ran / "demo.json").read_text())
    assert before == {f: f.stat().st_mtime_ns for f in ran.rglob("*") if f.is_file()}
    assert str(ran / "report.html") in capsys.readouterr().out


def test_a_lost_end_is_made_again_from_what_is_there(ran: Path) -> None:
    """As after a kill while predicting: the trained model and the finished predictions are used, not made again."""
    old = json.loads((ran / "demo.json").read_text())
    weights = (ran / "model" / "model.safetensors").stat().st_mtime_ns
    (ran / "demo.json").unlink()
    (ran / "predictions" / "answers_shuffled.jsonl").unlink()
    new = demo.main(ran, size=SMALL)
    assert weights == (ran / "model" / "model.safetensors").stat().st_mtime_ns
    same = set(old) - {"seconds", "peak_memory_gb"}
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    assert new["seconds"] > old["seconds"]


def test_another_demo_in_the_same_directory_is_refused(ran: Path) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        demo.main(ran, size=SMALL, seed=1)


def test_missing_start_checkpoints_say_how_to_make_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.demo.start.ASSETS", tmp_path / "none")
    with pytest.raises(ConfigError, match="--pretrain"):
        demo.main(tmp_path / "out", size=SMALL)


def places_asked(file: Path) -> set[tuple[str, str]]:
    """(thing, place) of the questions "where is the ...?"."""
    asked = [
        (line["prefix"].partition("where is the ")[2].rstrip("?"), line["suffix"]) for line in dataset.read_lines(file)
    ]
    return {pair for pair in asked if pair[0]}


def test_data_is_complete_repeatable_and_held_out(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        dataset.write(tmp_path / folder, 3, 30, 10)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len([f for f in files if f.suffix == ".png"]) == 40
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    held_out = {(f"{colour} {shape}", PLACES[cell]) for (colour, shape), cell in HELD_OUT.items()}
    train, test = (places_asked(tmp_path / "a" / f"{name}.jsonl") for name in ("train", "test_questions"))
    assert train and train.isdisjoint(held_out) and test & held_out
    combinations = [f"{name} at the {place}" for name, place in held_out]
    for line in dataset.read_lines(tmp_path / "a" / "test_captions.jsonl"):
        assert line["suffix"] in line["references"]
        assert any(text in reference for text in combinations for reference in line["references"])


def test_shuffled_questions_never_keep_their_picture(ran: Path) -> None:
    answers = Answers(ran, 0, SMALL)
    for line, shuffled in zip(answers.questions, answers.shuffled(), strict=True):
        assert line["image"] != shuffled["image"] and line["prefix"] == shuffled["prefix"]


def test_pictures_in_the_terminal(ran: Path) -> None:
    text = show.half_blocks(ran / "data" / "images" / "test-0000.png")
    assert text.count("▀") == show.CELLS**2 // 2 and text.endswith("\x1b[0m")
