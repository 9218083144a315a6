"""Loaders of diagrams, boxes, archives and lists of choices, each on a tiny sample in the official format."""

from __future__ import annotations

import io
import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tasktools import Root, gold_scores_all, load, values

from vlm import registry
from vlm.data import reading
from vlm.data.benchmarks import countbenchqa, mmmu
from vlm.data.rows import Row
from vlm.data.source import Folder
from vlm.errors import ConfigError, DataError
from vlm.eval import metrics, tasks
from vlm.eval.tasks import Task
from vlm.text.locations import box_to_loc


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def ai2d_files(root: Root) -> None:
    question = {"questionId": "0.png-0", "answerTexts": ["A", "B"], "correctAnswer": 1, "abcLabel": True}
    plain = {"questionId": "0.png-1", "answerTexts": ["the moon", "the sun"], "correctAnswer": 0, "abcLabel": False}
    questions = {"Which letter is the sun?": question, "What is grey?": plain}
    root.json("ai2d/questions/0.png.json", {"imageName": "0.png", "questions": questions})
    root.json("ai2d/questions/1.png.json", {"imageName": "1.png", "questions": {"In training?": question}})
    label = {"rectangle": [[10, 10], [40, 30]], "replacementText": "B", "value": "sun", "labelId": "T0"}
    root.json("ai2d/annotations/0.png.json", {"text": {"T0": label}, "blobs": {}})
    root.text("ai2d/ai2d_test_ids.csv", "0\n")
    root.images("ai2d/images/0.png", size=(60, 50))


def test_ai2d_draws_letters_over_labels(root: Root) -> None:
    ai2d_files(root)
    letter, plain = load("ai2d", root)
    assert letter.prefix == "answer en  Which letter is the sun? choose from: A \t B" and letter.answers == ("B",)
    assert plain.image == root.path / "ai2d/images/0.png" and plain.answers == ("the moon",)
    assert letter.image == root.path / "ai2d/lettered/0.png"
    drawn = np.asarray(Image.open(root.path / "ai2d/lettered/0.png").convert("RGB"))
    box = {tuple(pixel) for pixel in drawn[10:31, 10:41].reshape(-1, 3).tolist()}
    assert {(255, 255, 255), (0, 0, 0)} <= box and (0, 128, 128) not in box
    assert (drawn[:10] == (0, 128, 128)).all() and (drawn[:, 41:] == (0, 128, 128)).all()
    gold_scores_all("ai2d", [letter, plain])


def test_the_right_choice_is_known_where_its_text_is_the_letter_of_another(root: Root) -> None:
    """The right choice is called B and stands first; "B" alone could mean either."""
    ai2d_files(root)
    question = {"questionId": "q", "answerTexts": ["B", "A"], "correctAnswer": 0, "abcLabel": False}
    root.json("ai2d/questions/0.png.json", {"imageName": "0.png", "questions": {"Which?": question}})
    (example,) = load("ai2d", root)
    info = {"q": example.info}
    assert metrics.compute("scienceqa_llava", {"q": "A"}, {"q": example.answers}, info).value == 1
    with pytest.raises(DataError, match="fits several choices; give 'answer_index'"):
        metrics.compute("scienceqa_llava", {"q": "A"}, {"q": example.answers}, {"q": {"choices": ["B", "A"]}})


def test_ai2d_draws_once(root: Root) -> None:
    ai2d_files(root)
    load("ai2d", root)
    root.images("ai2d/lettered/0.png", size=(3, 3))
    load("ai2d", root)
    assert Image.open(root.path / "ai2d/lettered/0.png").size == (3, 3)


def test_ai2d_without_images_still_loads_the_items(root: Root) -> None:
    ai2d_files(root)
    (root.path / "ai2d/images/0.png").unlink()
    with pytest.raises(DataError, match="2 of 2 images are missing"):
        tasks.get("ai2d").load(root.path)


def refcoco_files(root: Root) -> None:
    ref = {
        "ref_id": 0,
        "ann_id": 1719310,
        "image_id": 581857,
        "category_id": 1,
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "split": "val",
        "sent_ids": [0, 1],
        "sentences": [{"sent_id": 0, "sent": "left man", "raw": "left man"}, {"sent_id": 1, "sent": "man in blue"}],
    }
    name = "COCO_train2014_000000581857.jpg"
    image = {"id": 581857, "file_name": name, "width": 40, "height": 30}
    box = {"id": 1719310, "bbox": [0.0, 7.5, 20.0, 15.0], "image_id": 581857}
    root.json("refcoco/refcoco/refs(unc).json", [ref, {**ref, "split": "testA"}])
    root.json("refcoco/refcoco/instances.json", {"images": [image], "annotations": [box]})
    root.images(f"coco/train2014/{name}")


def test_refcoco(root: Root) -> None:
    refcoco_files(root)
    first, second = load("refcoco", root)
    assert (first.id, first.prefix, second.prefix) == ("0", "detect left man", "detect man in blue")
    # y 7.5 and 22.5 of 30, x 0 and 20 of 40: 255.75 and 767.25, 0 and 511.5 of 1023.
    assert first.answers == ("<loc0256><loc0000><loc0767><loc0512>",)
    assert first.info == {"box": (0.0, 7.5, 20.0, 22.5), "image_size": (40, 30)}
    gold_scores_all("refcoco", [first, second])


def test_refcoco_boxes_stay_in_the_image() -> None:
    assert box_to_loc((-3.0, 0.0, 41.0, 30.0), 40, 30) == "<loc0000><loc0000><loc1023><loc1023>"


def test_refcoco_pickles_are_refused(root: Root) -> None:
    refcoco_files(root)
    (root.path / "refcoco/refcoco/refs(unc).json").unlink()
    root.text("refcoco/refcoco/refs(unc).p", "not even a pickle")
    with pytest.raises(DataError, match=r"refs\(unc\)\.p is a pickle, which can run code .* python -c .*json\.dump"):
        load("refcoco", root)


def easy_vqa(root: Root, questions: list[Any]) -> None:
    root.images("0.png", size=(64, 64))
    (root.path / "easy_vqa").mkdir(exist_ok=True)
    with zipfile.ZipFile(root.path / "easy_vqa/easy_vqa.zip", "w") as archive:
        archive.writestr("data/test/questions.json", json.dumps(questions))
        archive.write(root.path / "0.png", "data/test/images/0.png")


def test_easy_vqa(root: Root) -> None:
    easy_vqa(
        root, [["what is the teal shape?", "circle", 0], ["is it red?", "no", 0], ["what color is it?", "teal", 0]]
    )
    examples = load("easy_vqa", root)
    assert [(ex.id, ex.references, ex.info["kind"]) for ex in examples] == [
        ("test-0", ("circle",), "shape"),
        ("test-1", ("no",), "yes/no"),
        ("test-2", ("teal",), "colour"),
    ]
    assert examples[0].image is examples[2].image
    gold_scores_all("easy_vqa", examples)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([["is it?", "no"]], r"item 0: expected \[question, answer, image id\], got \['is it\?', 'no'\]"),
        ([["is it?", "no", 7]], "no data/test/images/7.png in it"),
    ],
)
def test_a_broken_easy_vqa_archive(root: Root, questions: list[Any], message: str) -> None:
    easy_vqa(root, questions)
    with pytest.raises(DataError, match=message):
        load("easy_vqa", root)
    root.text("easy_vqa/easy_vqa.zip", "no archive")
    with pytest.raises(DataError, match="easy_vqa.zip: not a zip archive"):
        load("easy_vqa", root)


def choices_task(root: Root, rows: list[dict[str, Any]]) -> Task:
    root.lines("mine/questions.jsonl", rows)
    root.text(
        "mine.yaml",
        "exam:\n  title: an exam\n  format: choices\n  default_split: all\n  metrics: [multiple_choice]\n"
        '  prompt: "answer en {question} choose from: {choices}"\n  breakdown: [subject]\n  splits:\n    all:\n'
        "      files: {questions: {path: mine/questions.jsonl}, images: {path: mine/images}}\n",
    )
    [task] = tasks.load_file(root.path / "mine.yaml")
    return task


def test_multiple_choice_of_ones_own(root: Root) -> None:
    row = {"id": "1", "question": "Which?", "options": ["a cat", "a dog"], "answer": "B", "images": ["a.png", "b.png"]}
    root.images("mine/images/a.png", "mine/images/b.png")
    task = choices_task(root, [{**row, "subject": "zoology"}])
    [example] = task.load(root.path)
    assert example.prefix == "answer en Which? choose from: a cat \t a dog" and len(example.more_images) == 1
    assert values(task, [example], {"1": "a dog"}) == values(task, [example], {"1": "B"}) == {"multiple_choice": 1.0}
    assert task.groups([example], "subject") == {"1": "zoology"}
    for wrong, message in (
        ({"answer": "C"}, "the answer 'C' is not the letter of one of 2 options"),
        ({"images": []}, "no image; every item needs at least one"),
    ):
        with pytest.raises(DataError, match=f"mine/questions.jsonl, line 1: .*{message}"):
            choices_task(root, [{**row, **wrong}]).load(root.path)


MMMU_ROW = {
    "id": "validation_Art_Theory_3",
    "question": "Which is it? <image 1>",
    "options": "['a mural', \"it's an icon\"]",
    "answer": "B",
    "question_type": "multiple-choice",
    "image_1": {"bytes": b"first", "path": "x.png"},
    "image_2": {"bytes": b"second", "path": "y.png"},
    **{f"image_{number}": None for number in range(3, 8)},
    "subfield": "Painting",
}


def test_mmmu_rows(tmp_path: Path) -> None:
    open_question = {**MMMU_ROW, "question_type": "open", "options": "[]", "answer": "7"}
    [item] = mmmu.items([open_question, MMMU_ROW], Folder(tmp_path / "images"), "here")
    assert (item.id, item.answers) == ("validation_Art_Theory_3", ("it's an icon",))
    assert (item.info["subject"], item.info["answer_index"]) == ("Art_Theory", 1)
    assert item.fields["choices"] == "a mural \t it's an icon"
    assert [image.read_bytes() for image in item.images if isinstance(image, Path)] == [b"first", b"second"]
    with pytest.raises(DataError, match="here, row 0: 'options' should be a list written as text, got 'a, b'"):
        list(mmmu.items([{**MMMU_ROW, "options": "a, b"}], Folder(tmp_path), "here"))


def test_mmmu_needs_the_extra(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    root.text("mmmu/data/README.md", "")
    with pytest.raises(DataError, match=r"no validation-\*\.parquet in it"):
        tasks.get("mmmu").load(root.path)
    root.text("mmmu/data/validation-00000-of-00001.parquet", "")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-backbone\[datasets\]'"):
        tasks.get("mmmu").load(root.path)


def test_mmmu_reads_parquet_through_datasets(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself is optional: a stand-in takes the calls that the real one takes."""
    root.text("mmmu/data/validation-00000-of-00001.parquet", "")
    calls: list[Any] = []

    class Table(list):
        column_names = list(MMMU_ROW)

        def cast_column(self, name: str, feature: Any) -> Table:
            calls.append((name, feature))
            return self

    def load_dataset(kind: str, *, data_files: dict[str, list[str]], split: str) -> Table:
        calls.append((kind, [Path(name).name for name in data_files[split]]))
        return Table([MMMU_ROW])

    module: Any = types.ModuleType("datasets")
    module.load_dataset, module.Image = load_dataset, lambda decode: f"decode {decode}"
    monkeypatch.setitem(sys.modules, "datasets", module)
    [example] = load("mmmu", root)
    assert calls[:2] == [("parquet", ["validation-00000-of-00001.parquet"]), ("image_1", "decode False")]
    assert example.more_images == (root.path / "mmmu/images/validation_Art_Theory_3-image_2",)
    gold_scores_all("mmmu", [example])


def png(mode: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_countbenchqa_leaves_out_what_the_reference_leaves_out(tmp_path: Path) -> None:
    rows = [
        {"image": image, "number": 3 + index} for index, image in enumerate((png("RGB"), None, png("L"), png("RGB")))
    ]
    questions = [Row({"question": f"How many {index}?"}, "questions") for index in range(4)]
    found = list(countbenchqa.items(rows, questions, Folder(tmp_path), "here"))
    assert [(item.id, item.answers, item.fields["question"]) for item in found] == [
        ("0", ("3",), "How many 0?"),
        ("3", ("6",), "How many 3?"),
    ]
    assert found[0].images == (tmp_path / "0",) and Image.open(tmp_path / "0").size == (4, 4)
    with pytest.raises(DataError, match="here: 4 rows, but there are 3 questions"):
        list(countbenchqa.items(rows, questions[:3], Folder(tmp_path), "here"))


def test_every_format_is_that_of_a_task() -> None:
    used = {tasks.get(name).format for name in tasks.names()} | {"choices"}
    assert used - set(reading.formats()) == set(registry.kinds("vlm.data.benchmarks"))
