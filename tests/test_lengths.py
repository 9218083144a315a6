"""Text that does not fit into the model: found before the first step or answer, with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from traintools import align, config, world

import vlm
import vlm.train
from vlm.build.presets import tiny
from vlm.cli import main
from vlm.data.reading import read
from vlm.errors import DataError
from vlm.eval import evaluate
from vlm.model.lengths import Room, context_of, over_context, too_long
from vlm.train.context_fit import targets

CONTEXT = 512
"""Of the tiny model; its image has 4 tokens."""


def data(folder: Path, *records: dict[str, Any], name: str = "data.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (28, 28), "red").save(folder / "a.png")
    lines = [{"image": "a.png", "prefix": "caption en", "suffix": "red", **record} for record in records]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


LONG = {"prefix": "caption " * 3000}
HUGE = {"prefix": "x" * 100_001}


def test_the_bound_is_the_models_context(tmp_path: Path) -> None:
    """The longest text that fits, token by token: image, BOS, prefix, newline, suffix, EOS are the context."""
    model, processor = tiny()
    assert context_of(model.config) == CONTEXT
    room = Room(processor=processor, context=CONTEXT)
    fixed = 4 + 1 + 1 + 1  # image, BOS, newline, EOS
    one = len(processor(None, ["7"]).input_ids[0]) - 2
    many = len(processor(None, ["7" * 100]).input_ids[0]) - 2
    assert (one, many) == (1, 100)  # a digit is a token
    for digits, fits in ((CONTEXT - fixed - 1, True), (CONTEXT - fixed, False)):
        examples, _ = read(data(tmp_path, {"prefix": "7" * digits, "suffix": "7"}))
        assert (too_long(examples, room, targets) == {}) is fits
    examples, _ = read(data(tmp_path, {"prefix": "7" * (CONTEXT - fixed), "suffix": "7"}))
    (problem,) = too_long(examples, room, targets).values()
    said = f"{CONTEXT + 1} tokens, 4 of them of its images, the model has {CONTEXT} positions (max_position_embeddings)"
    assert str(problem) == f"{tmp_path / 'data.jsonl'}:1: too-long: example '1': {said}; shorten the text"
    assert too_long(examples, Room(processor=processor), targets) == {}
    assert over_context(10, 0, None) is None and over_context(10, 0, 10) is None


@pytest.mark.parametrize("where", ["train", "val", "evaluate"])
def test_training_refuses_before_its_first_step(where: str, tmp_path: Path) -> None:
    """Every long line of every file, with file and line; nothing was trained."""
    good = data(tmp_path / "data", {}, {}, {}, {}, name="good.jsonl")
    bad = data(tmp_path / "data", {}, LONG, {"suffix": "y" * 90_000} if where != "evaluate" else LONG, HUGE)
    settings: dict[str, Any] = {"data": {"train": good, "val": good}}
    settings["evaluate"] = {"data": good, "metrics": ["exact_match"]}
    settings = {**settings, "data": {**settings["data"], where: bad}} if where != "evaluate" else settings
    if where == "evaluate":
        settings["evaluate"] = {"data": bad, "metrics": ["exact_match"]}
    run = config(tmp_path / "out", align(steps=2), **settings)
    with pytest.raises(DataError) as caught:
        vlm.train.run(run)
    said = str(caught.value)
    assert "3 examples are too long for the model" in said
    for line in (2, 3, 4):
        assert f"{bad}:{line}: too-long:" in said
    assert "100,001 characters" in said and not (run.out / "align").exists()


def test_skip_bad_leaves_out_and_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of training, validation and evaluation alike; broken validation lines are listed too. The model is that of the
    data without those lines."""
    files = {}
    for name in ("train", "val", "evaluate"):
        lines = [{"id": f"{name}{i}", "prefix": f"caption {i}"} for i in range(6)]
        clean = data(tmp_path / name, *lines[:2], *lines[3:], name="clean.jsonl")
        files[name] = clean, data(tmp_path / name, *lines[:2], {**lines[2], **LONG}, *lines[3:], {"suffix": 3})
    made = []
    for number, skip in enumerate((False, True)):
        run = config(
            tmp_path / f"out{number}",
            align(steps=3),
            data={"train": files["train"][number], "val": files["val"][number]},
            evaluate={"data": files["evaluate"][number], "metrics": ["exact_match"], "max_new_tokens": 1},
        )
        caplog.clear()
        made.append(vlm.train.run(run, skip_bad=skip))
    for name in files:
        assert f"skipped {files[name][1]}:3: too-long: example '{name}2': " in caplog.text
        assert f"skipped {files[name][1]}:7: wrong-type: 'suffix' should be text" in caplog.text
    summary = json.loads((tmp_path / "out1" / "summary.json").read_text())
    assert summary["skipped_annotations"] == 6
    first, second = (json.loads((path / "training.json").read_text())["data_sha256"] for path in made)
    assert first == second


def test_evaluation_refuses_before_its_first_answer(tmp_path: Path) -> None:
    model, processor = vlm.load(world()[0])
    bad = data(tmp_path / "data", {}, LONG, HUGE)
    with pytest.raises(DataError, match=r"data.jsonl:2: too-long:") as caught:
        evaluate((model, processor), bad, "exact_match", tmp_path / "out", progress=False)
    assert "data.jsonl:3: too-long:" in str(caught.value) and not (tmp_path / "out").exists()
    found = evaluate(
        *((model, processor), bad, "exact_match", tmp_path / "out"), skip_bad=True, max_new_tokens=1, progress=False
    )
    assert found["num_items"] == 1 and found["skipped"] == 2
    assert [one["line"] for one in found["skipped_annotations"]] == [2, 3]


def test_candidates_count(tmp_path: Path) -> None:
    processor = tiny()[1]
    examples, _ = read(data(tmp_path, {}))
    room = Room(processor=processor, context=64)
    assert too_long(examples, room, lambda example: ("yes", "no")) == {}
    assert 0 in too_long(examples, room, lambda example: ("yes", "7" * 60))


def test_generation_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(world()[0])
    data(tmp_path, {})
    with pytest.raises(DataError, match=r"sample 'b': .* the model has 512 positions"):
        vlm.generate(*vlm.load(model), None, ["a", "7" * 600], ids=["a", "b"], max_new_tokens=1)
    image = str(tmp_path / "a.png")
    for prompt, said in (("7" * 600, "512 positions"), ("x" * 100_001, "100,001 characters")):
        assert main(["caption", image, image, "--model", model, "--prompt", prompt]) == 2
        assert capsys.readouterr().err.count(said) == 2
    assert main(["caption", image, str(tmp_path / "none.png"), "--model", model, "--max-new-tokens", "1"]) == 3


def test_asking_about_several_images_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(world()[0])
    data(tmp_path, {})
    image, options = str(tmp_path / "a.png"), ["--model", model, "--max-new-tokens", "3", "--json"]
    for images in ([], [image], [image, image]):
        assert main(["ask", *images, "what is it?", *options]) == 0
        said = json.loads(capsys.readouterr().out)
        pictures = [Image.open(path) for path in images]
        expected = vlm.generate(*vlm.load(model), [pictures], ["answer en what is it?"], max_new_tokens=3)[0]
        assert said["text"] == expected
        assert said.get("image") == image if len(images) == 1 else said["images"] == images
    assert main(["ask", image, *options]) == 2
    assert "is a file, and there is no question" in capsys.readouterr().err
