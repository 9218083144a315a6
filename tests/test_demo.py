"""The demo end to end at a small size: files, figures, going on after an interruption, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm import demo
from vlm.demo import dataset, scenes, show
from vlm.demo.answers import Answers
from vlm.demo.recipe import Size
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


def test_what_is_held_out_is_colour_shape_and_place_as_the_report_says(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in a training set of the demo's size, its texts and the scenes behind its pictures."""
    drawn = []
    make_scene = scenes.make_scene

    def recorded(*args: Any, **options: Any) -> scenes.Scene:
        drawn.append(make_scene(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(scenes, "make_scene", recorded)
    monkeypatch.setattr(scenes, "draw", lambda scene: Image.new("1", (1, 1)))
    dataset.write(tmp_path / "d", 0, 800, 100)
    train, test = drawn[:800], drawn[800:]
    assert len(test) == 100

    def held_out(scene: scenes.Scene) -> bool:
        return any(3 * t.row + t.column == HELD_OUT[t.colour, t.shape] for t in scene.things)

    assert not any(map(held_out, train)) and all(map(held_out, test))
    texts = [f"{line['prefix']} {line['suffix']}" for line in dataset.read_lines(tmp_path / "d" / "train.jsonl")]
    counts = {pair: sum(" ".join(pair) in text for text in texts) for pair in HELD_OUT}
    assert min(counts.values()) > 20  # colour and shape together are in many training texts
    for (colour, shape), cell in HELD_OUT.items():
        place = PLACES[cell]
        assert not any(f"{colour} {shape} at the {place}" in text for text in texts)
        assert not any(text.endswith(f"where is the {colour} {shape}? {place}") for text in texts)
    page = (ran / "report.html").read_text()
    assert "Held out are combinations of colour, shape and place" in page
    assert "The colour and the shape together do occur there" in page


def test_damaged_leftovers_are_made_again(ran: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Empty or torn, as a full disk or a power cut leaves them: told, and made again with the same figures."""
    wanted = json.loads((ran / "demo.json").read_text())
    out = tmp_path / "out"
    shutil.copytree(ran, out)
    for name in ("settings.json", "seconds.json", "demo.json", "data/complete.json", "predictions/answers.jsonl"):
        (out / name).write_text("")
    torn = out / "predictions" / "captions.jsonl"
    torn.write_bytes(torn.read_bytes()[:-20])
    for number in range(2):
        caplog.clear()
        facts = demo.main(out, size=SMALL)
        same = set(wanted) - {"seconds", "peak_memory_gb"}
        assert {name: facts[name] for name in same} == {name: wanted[name] for name in same}
        said = [text for text in caplog.messages if "damaged" in text]
        assert (len(said) > 0) == (number == 0)
    for name in ("data/train.jsonl", "predictions/answers_untrained.jsonl"):
        (out / name).write_text("")
        assert demo.main(out, size=SMALL)["vqa_accuracy_untrained"] == wanted["vqa_accuracy_untrained"]
        assert (out / name).stat().st_size == (ran / name).stat().st_size
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".part") or ".writing-" in path.name]


def test_a_damaged_start_checkpoint_is_not_taken_for_done(tmp_path: Path) -> None:
    from vlm.demo import learning, pretrain, towers

    towers.new_tower("dinov2", tmp_path / "dinov2", 0)
    weights = tmp_path / "dinov2" / "model.safetensors"
    assert learning.complete(tmp_path / "dinov2", weights.name)
    assert pretrain.tower_jobs(["dinov2"], tmp_path, tmp_path, 0, 1) == []
    whole = weights.read_bytes()
    for damage in (b"", whole[:50], whole[: len(whole) // 2]):
        weights.write_bytes(damage)
        assert len(pretrain.tower_jobs(["dinov2"], tmp_path, tmp_path, 0, 1)) == 1
    weights.write_bytes(whole)
    (tmp_path / "dinov2" / "config.json").write_text("")
    assert not learning.complete(tmp_path / "dinov2", weights.name)
    towers.new_tower("dinov2", tmp_path / "dinov2", 0)
    assert learning.complete(tmp_path / "dinov2", weights.name) and weights.read_bytes() == whole


def test_shuffled_questions_never_keep_their_picture(ran: Path) -> None:
    answers = Answers(ran, 0, SMALL)
    for line, shuffled in zip(answers.questions, answers.shuffled(), strict=True):
        assert line["image"] != shuffled["image"] and line["prefix"] == shuffled["prefix"]


def test_pictures_in_the_terminal(ran: Path) -> None:
    text = show.half_blocks(ran / "data" / "images" / "test-0000.png")
    assert text.count("▀") == show.CELLS**2 // 2 and text.endswith("\x1b[0m")
