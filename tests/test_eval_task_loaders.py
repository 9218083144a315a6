"""Each loader on a tiny sample in the official format, written here; gold answers then score the maximum."""

from __future__ import annotations

import json
import sys
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.data import Example
from vlm.errors import ConfigError, DataError
from vlm.eval import items, metrics, tasks
from vlm.eval.tasks import Task, loaders
from vlm.eval.tasks.loaders import mmmu
from vlm.eval.tasks.loaders.refcoco import box_text


class Root:
    """A data root that a test fills."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def json(self, name: str, content: Any) -> None:
        self.text(name, json.dumps(content))

    def lines(self, name: str, rows: Sequence[Any]) -> None:
        self.text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def text(self, name: str, content: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")

    def images(self, *names: str, size: tuple[int, int] = (40, 30)) -> None:
        for name in names:
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, "teal").save(path)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def load(name: str, root: Root, split: str | None = None) -> list[Example]:
    """The items; every image has to be there."""
    examples = tasks.get(name).load(root.path, split)
    for example in examples:
        for image in (example.image, *example.more_images):
            assert isinstance(image, Image.Image) or image.is_file()
    items.check(examples)
    return examples


def values(task: Task, examples: list[Example], said: dict[str, str]) -> dict[str, float]:
    """The metrics of a task for what was said."""
    info = {example.id: example.info for example in examples}
    found = {}
    for metric in metrics.expand(task.metrics):
        gold = {example.id: items.gold_texts(example, metric.reads) for example in examples}
        found[metric.name] = metrics.compute(metric.name, said, gold, info).value
    return found


def gold_scores_all(name: str, examples: list[Example], said: Sequence[str] | None = None) -> None:
    """Gold answers (or what is `said`) get every metric of the task to 1."""
    task = tasks.get(name)
    texts = said or [items.gold_texts(example, "answers")[0] for example in examples]
    answers = {example.id: text for example, text in zip(examples, texts, strict=True)}
    assert set(values(task, examples, answers).values()) == {1.0}
    for key in task.breakdown:
        assert task.groups(examples, key)


# --- Captions ---------------------------------------------------------------------------------------------------------


def test_karpathy_coco(root: Root) -> None:
    def row(number: int, split: str, folder: str) -> dict[str, Any]:
        sentences = [{"raw": f"a cat {number}.", "tokens": ["a", "cat"], "sentid": 1}, {"raw": "Cat!", "tokens": []}]
        name = f"COCO_{folder}_{number:012d}.jpg"
        return {
            "filepath": folder,
            "filename": name,
            "imgid": 0,
            "cocoid": number,
            "split": split,
            "sentences": sentences,
        }

    rows = [
        row(42, "val", "val2014"),
        row(43, "restval", "val2014"),
        row(9, "train", "train2014"),
        row(7, "test", "val2014"),
    ]
    root.json("coco/dataset_coco.json", {"dataset": "coco", "images": rows})
    root.images("coco/val2014/COCO_val2014_000000000042.jpg", "coco/val2014/COCO_val2014_000000000007.jpg")
    [example] = load("cococap", root)
    assert (example.id, example.prefix, example.references) == ("42", "caption en", ("a cat 42.", "Cat!"))
    assert [ex.id for ex in load("cococap", root, "test")] == ["7"]


def test_karpathy_flickr30k(root: Root) -> None:
    row = {"filename": "1007129816.jpg", "imgid": 67, "split": "test", "sentences": [{"raw": "A man."}], "sentids": [1]}
    root.json("flickr30k/dataset_flickr30k.json", {"dataset": "flickr30k", "images": [row]})
    root.images("flickr30k/flickr30k-images/1007129816.jpg")
    [example] = load("flickr30k", root)
    assert (example.id, example.references) == ("67", ("A man.",))


def test_coco_captions_and_nocaps(root: Root) -> None:
    captions = [{"image_id": 5, "id": i, "caption": text} for i, text in enumerate(("a dog", "dog"))]
    image = {"id": 5, "file_name": "COCO_val2014_000000000005.jpg", "width": 4, "height": 3}
    root.json("coco/annotations/captions_val2014.json", {"info": {}, "images": [image], "annotations": captions})
    root.images("coco/val2014/COCO_val2014_000000000005.jpg", "nocaps/validation/0013ea2087020901.jpg")
    [example] = load("coco_captions_val2014", root)
    assert (example.id, example.references, dict(example.info)) == ("5", ("a dog", "dog"), {})
    novel = {"id": 5, "open_images_id": "0013ea2087020901", "file_name": "0013ea2087020901.jpg", "domain": "out-domain"}
    root.json("nocaps/nocaps_val_4500_captions.json", {"images": [novel], "annotations": captions})
    [example] = load("nocaps", root)
    assert example.info == {"domain": "out-domain"} and example.references == ("a dog", "dog")


def test_textcaps_brings_the_captions_of_an_image_together(root: Root) -> None:
    row = {"image_id": "abc", "image_name": "abc", "caption_id": 1, "caption_str": "A sign that says STOP"}
    other = {**row, "image_id": "def", "image_name": "def", "caption_str": "a book"}
    root.json("textcaps/TextCaps_0.1_val.json", {"data": [row, other, {**row, "caption_str": "Stop"}]})
    root.images("textvqa/train_images/abc.jpg", "textvqa/train_images/def.jpg")
    first, second = load("textcaps", root)
    assert (first.id, first.references) == ("abc", ("A sign that says STOP", "Stop"))
    assert second.references == ("a book",) and tasks.get("textcaps").decoding.num_beams == 3


def test_coco35l(root: Root) -> None:
    def row(caption: str, language: str, translation: str) -> dict[str, str]:
        return {
            "image_id": caption,
            "caption_tokenized": f"english {caption}",
            "trg_lang": language,
            "translation_tokenized": translation,
        }

    rows = [
        row("42_1", "de", "eine Katze"),
        row("42_2", "de", "Katze"),
        row("42_1", "fr", "un chat"),
        row("7_3", "fr", "chien"),
    ]
    root.lines("coco35l/coco_mt_dev.jsonl", rows)
    names = {42: "COCO_val2014_000000000042.jpg", 7: "COCO_val2014_000000000007.jpg"}
    images = [{"cocoid": key, "filepath": "val2014", "filename": name} for key, name in names.items()]
    root.json("coco/dataset_coco.json", {"images": images})
    root.images(*(f"coco/val2014/{name}" for name in names.values()))
    english = load("coco35l", root, "en")
    assert [(ex.id, ex.prefix, ex.references) for ex in english] == [
        ("42_en", "caption en", ("english 42_1", "english 42_2"))
    ]
    others = load("coco35l", root)
    assert [(ex.id, ex.prefix) for ex in others] == [
        ("42_de", "caption de"),
        ("42_fr", "caption fr"),
        ("7_fr", "caption fr"),
    ]
    assert tasks.get("coco35l").groups(others, "language") == {"42_de": "de", "42_fr": "fr", "7_fr": "fr"}


def test_xm3600(root: Root) -> None:
    languages = [name for name in tasks.get("xm3600").splits if name != "avg35"]
    row: dict[str, Any] = {"image/key": "0001eeaf4aed83f9", "image/locale": "en"}
    row |= {name: {"caption": [f"{name} one", f"{name} two"], "caption/tokenized": ["x"]} for name in languages}
    root.lines("xm3600/captions.jsonl", [row])
    root.images("xm3600/images/0001eeaf4aed83f9.jpg")
    [thai] = load("xm3600", root, "th")
    assert (thai.id, thai.prefix, thai.references) == ("0001eeaf4aed83f9_th", "caption th", ("th one", "th two"))
    assert len(load("xm3600", root)) == 35


# --- Questions --------------------------------------------------------------------------------------------------------


def vqa_files(root: Root, folder: str, prefix: str, image: int = 42) -> None:
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": i, "raw_answer": "Red"} for i in range(10)]
    question = {"image_id": image, "question": "What colour?", "question_id": 42000}
    facts = {"question_type": "what color", "answer_type": "other", "multiple_choice_answer": "red", "answers": answers}
    root.json(f"{folder}/{prefix}OpenEnded_mscoco_val2014_questions.json", {"questions": [question]})
    root.json(f"{folder}/{prefix}mscoco_val2014_annotations.json", {"annotations": [{**question, **facts}]})
    root.images(f"coco/val2014/COCO_val2014_{image:012d}.jpg")


def test_vqav2_and_okvqa(root: Root) -> None:
    vqa_files(root, "vqav2", "v2_")
    [example] = load("vqav2", root)
    assert (example.id, example.prefix, example.answers) == ("42000", "answer en What colour?", ("red",) * 10)
    gold_scores_all("vqav2", [example])
    vqa_files(root, "okvqa", "")
    gold_scores_all("okvqa", load("okvqa", root))


def test_vqav2_questions_without_annotation_are_named(root: Root) -> None:
    vqa_files(root, "vqav2", "v2_")
    root.json("vqav2/v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(DataError, match="'questions' 0: question 42000 is not in vqav2/v2_mscoco_val2014"):
        load("vqav2", root)


def aokvqa_rows() -> list[dict[str, Any]]:
    row = {
        "split": "val",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is by the truck?",
        "choices": ["mice", "dogs", "ducks", "lady"],
        "correct_choice_idx": 3,
        "direct_answers": ["ducks"] * 7 + ["geese"] * 3,
        "difficult_direct_answer": False,
        "rationales": ["a", "b", "c"],
    }
    return [row, {**row, "question_id": "hard", "difficult_direct_answer": True}]


def test_aokvqa(root: Root) -> None:
    root.json("aokvqa/aokvqa_v1p0_val.json", aokvqa_rows())
    root.images("coco/val2017/000000299207.jpg")
    [direct] = load("aokvqa_da", root)
    assert direct.answers.count("geese") == 3 and direct.prefix == "answer en What is by the truck?"
    gold_scores_all("aokvqa_da", [direct])
    assert [ex.id for ex in load("aokvqa_da", root, "val_all")] == ["22MexNkBPpdZGX6sxbxVBH", "hard"]
    choice, _ = load("aokvqa_mc", root)
    assert choice.prefix == "answer en  What is by the truck? choose from: mice \t dogs \t ducks \t lady"
    assert choice.answers == ("lady",) and tasks.get("aokvqa_mc").candidates_of(choice)[0] == "mice"
    gold_scores_all("aokvqa_mc", [choice])


def test_a_choice_out_of_range_is_named(root: Root) -> None:
    root.json("aokvqa/aokvqa_v1p0_val.json", [{**aokvqa_rows()[0], "correct_choice_idx": 4}])
    with pytest.raises(DataError, match="item 0: 'correct_choice_idx' is 4, but there are 4 choices"):
        tasks.get("aokvqa_mc").load(root.path)


def test_gqa(root: Root) -> None:
    def row(structural: str, answer: str) -> dict[str, Any]:
        kinds = {"structural": structural, "semantic": "attr", "detailed": "x"}
        return {
            "imageId": "n161313",
            "question": "Is it?",
            "answer": answer,
            "fullAnswer": "x",
            "isBalanced": True,
            "types": kinds,
        }

    root.json(
        "gqa/testdev_balanced_questions.json", {"201307251": row("verify", "yes"), "201640614": row("query", "pipe")}
    )
    root.images("gqa/images/n161313.jpg")
    examples = load("gqa", root)
    assert [(ex.id, ex.answers, ex.info["kind"]) for ex in examples] == [
        ("201307251", ("yes",), "binary"),
        ("201640614", ("pipe",), "open"),
    ]
    gold_scores_all("gqa", examples)


def textvqa_file(root: Root) -> None:
    row = {"question": "what brand?", "image_id": "003a8ae2", "question_id": 34602, "answers": ["nokia"] * 10}
    content = {"data": [row, {**row, "question_id": 34603}], "dataset_type": "val"}
    root.json("textvqa/TextVQA_0.5.1_val.json", content)
    root.images("textvqa/train_images/003a8ae2.jpg")


def test_textvqa(root: Root) -> None:
    textvqa_file(root)
    examples = load("textvqa", root)
    assert [ex.id for ex in examples] == ["34602", "34603"] and examples[0].prefix == "answer en what brand?"
    gold_scores_all("textvqa", examples)


def test_textvqa_turns_images_the_right_way_up(root: Root) -> None:
    textvqa_file(root)
    image = Image.new("RGB", (40, 30), "black")
    image.paste("white", (30, 0, 40, 30))  # the right edge
    image.save(root.path / "textvqa/train_images/003a8ae2.jpg", quality=95)
    root.text(
        "textvqa/train-images-boxable-with-rotation.csv", "ImageID,Subset,Rotation\n003a8ae2,train,90.0\nother,train,\n"
    )
    first, second = load("textvqa", root, "val_upright")
    assert isinstance(first.image, Image.Image) and first.image is second.image
    # 90 degrees against the clock: the right edge is the top now.
    assert first.image.size == (30, 40)
    top, bottom = first.image.getpixel((15, 3)), first.image.getpixel((15, 36))
    assert isinstance(top, tuple) and isinstance(bottom, tuple) and min(top) > 240 and max(bottom) < 15


def stvqa_files(root: Root) -> None:
    row = {
        "file_path": "coco-text/COCO_train2014_000000000009.jpg",
        "question": "what word?",
        "answers": ["STOP"],
        "question_id": 1,
    }
    rows = [
        row,
        {**row, "file_path": "vizwiz/a.jpg", "question_id": 2},
        {**row, "file_path": "IIIT/b.jpg", "question_id": 3},
    ]
    root.json("stvqa/train_task_3.json", {"task_name": "Task 3", "data": rows})
    root.images(
        "coco/train2014/COCO_train2014_000000000009.jpg",
        "stvqa/train_images/vizwiz/a.jpg",
        "stvqa/train_images/IIIT/b.jpg",
    )


@pytest.mark.parametrize(
    "code",
    [
        'PSEUDO_VAL_IMAGE_PATHS = frozenset([\n "coco-text/COCO_train2014_000000000009.jpg",\n "vizwiz/a.jpg"])\n',
        '"""Ids."""\nPSEUDO_VAL_IMAGE_PATHS = {"coco-text/COCO_train2014_000000000009.jpg", "vizwiz/a.jpg"}\n',
        'PSEUDO_VAL_IMAGE_PATHS: tuple = ("coco-text/COCO_train2014_000000000009.jpg", "vizwiz/a.jpg")\n',
    ],
)
def test_stvqa(root: Root, code: str) -> None:
    stvqa_files(root)
    root.text("stvqa/val_ids.py", code)
    examples = load("stvqa", root)
    assert [(ex.id, ex.info["source"]) for ex in examples] == [("1", "coco-text"), ("2", "vizwiz")]
    assert examples[0].image == root.path / "coco/train2014/COCO_train2014_000000000009.jpg"
    assert len(load("stvqa", root, "train")) == 3
    gold_scores_all("stvqa", examples)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print(1)\n", "no PSEUDO_VAL_IMAGE_PATHS in the file"),
        ("PSEUDO_VAL_IMAGE_PATHS = load()\n", "cannot read PSEUDO_VAL_IMAGE_PATHS as a list of text"),
        ("PSEUDO_VAL_IMAGE_PATHS = [\n", "cannot read PSEUDO_VAL_IMAGE_PATHS"),
        ("PSEUDO_VAL_IMAGE_PATHS = frozenset(open('/etc/passwd'))\n", "cannot read PSEUDO_VAL_IMAGE_PATHS"),
    ],
)
def test_stvqa_runs_nothing_of_the_list(root: Root, code: str, message: str) -> None:
    stvqa_files(root)
    root.text("stvqa/val_ids.py", code)
    with pytest.raises(DataError, match=message):
        load("stvqa", root)


def test_ocrvqa(root: Root) -> None:
    def book(split: int, extension: str) -> dict[str, Any]:
        return {
            "imageURL": f"http://ecx.images-amazon.com/images/I/61Y5cOdHJbL.{extension}",
            "questions": ["Who wrote this book?", "What is the title?"],
            "answers": ["Sandra Boynton", "Calendar"],
            "title": "Calendar",
            "split": split,
        }

    root.json("ocrvqa/dataset.json", {"761183272": book(3, "jpg"), "000": book(1, "jpg"), "111": book(2, "png")})
    root.images("ocrvqa/images/761183272.jpg", "ocrvqa/images/111.png")
    examples = load("ocrvqa", root)
    assert [(ex.id, ex.answers) for ex in examples] == [
        ("761183272-0", ("Sandra Boynton",)),
        ("761183272-1", ("Calendar",)),
    ]
    assert len(load("ocrvqa", root, "val")) == 2
    gold_scores_all("ocrvqa", examples)


def test_docvqa_in_both_layouts(root: Root) -> None:
    row = {"questionId": 49153, "question": "What is the actual value?", "question_types": ["table/list", "figure"]}
    row |= {"image": "documents/pybv0228_81.png", "docId": 14465, "answers": ["0.28"], "data_split": "val"}
    root.json("docvqa/spdocvqa_qas/val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [row]})
    root.images("docvqa/spdocvqa_images/pybv0228_81.png")
    [example] = load("docvqa", root)
    assert (example.id, example.prefix, example.answers) == ("49153", "What is the actual value?", ("0.28",))
    assert example.info == {"question_type": "figure, table/list"} and example.file.endswith("qas/val_v1.0_withQT.json")
    gold_scores_all("docvqa", [example])
    older = Root(root.path / "older")
    del row["question_types"]
    older.json("docvqa/val/val_v1.0.json", {"data": [row]})
    older.images("docvqa/val/documents/pybv0228_81.png")
    assert load("docvqa", older)[0].info == {"question_type": "none"}


def test_infovqa(root: Root) -> None:
    row = {
        "questionId": 98313,
        "question": "Which?",
        "image_local_name": "38247.jpeg",
        "answers": ["2 tips", "two tips"],
    }
    row |= {"answer_type": ["single span"], "evidence": ["text"], "operation/reasoning": []}
    root.json("infovqa/infographicsVQA_val_v1.0_withQT.json", {"data": [row]})
    root.images("infovqa/images/38247.jpeg")
    [example] = load("infovqa", root)
    assert example.prefix == "answer en Which?" and example.info == {"question_type": "single span"}
    gold_scores_all("infovqa", [example])


def test_chartqa(root: Root) -> None:
    human = [{"imgname": "41699051005347.png", "query": "How many?", "label": "14"}]
    augmented = [{"imgname": "41699051005347.png", "query": "What share?", "label": "23.5"}]
    root.json("chartqa/test/test_human.json", human)
    root.json("chartqa/test/test_augmented.json", augmented)
    root.images("chartqa/test/png/41699051005347.png")
    examples = load("chartqa", root)
    assert [(ex.id, ex.prefix, ex.answers) for ex in examples] == [
        ("human-0", "How many?", ("14",)),
        ("augmented-0", "What share?", ("23.5",)),
    ]
    gold_scores_all("chartqa", examples, ["14.5", "23.5"])  # 14.5 is within 5 %
    assert [ex.id for ex in load("chartqa", root, "augmented")] == ["augmented-0"]


def test_vizwiz(root: Root) -> None:
    def row(name: str, answer: str, answerable: int) -> dict[str, Any]:
        answers = [{"answer": answer, "answer_confidence": "yes"}] * 10
        kind = "other" if answerable else "unanswerable"
        return {
            "image": name,
            "question": "What is this?",
            "answers": answers,
            "answer_type": kind,
            "answerable": answerable,
        }

    root.json(
        "vizwiz/val.json", [row("VizWiz_val_00000000.jpg", "cat", 1), row("VizWiz_val_00000001.jpg", "unanswerable", 0)]
    )
    root.images("vizwiz/val/VizWiz_val_00000000.jpg", "vizwiz/val/VizWiz_val_00000001.jpg")
    examples = load("vizwiz", root)
    assert [(ex.id, bool(ex.info["answerable"])) for ex in examples] == [
        ("VizWiz_val_00000000", True),
        ("VizWiz_val_00000001", False),
    ]
    gold_scores_all("vizwiz", examples)


def test_scienceqa_takes_the_questions_with_an_image(root: Root) -> None:
    problem = {
        "question": "Which is a mammal?",
        "choices": ["a frog", "a bat", "a fly"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "biology",
        "split": "test",
    }
    others = {"5": {**problem, "image": None}, "6": {**problem, "split": "train"}, "7": {**problem, "split": "val"}}
    root.json("scienceqa/problems.json", {"4": problem, **others})
    root.images("scienceqa/test/4/image.png", "scienceqa/val/7/image.png")
    [example] = load("scienceqa", root)
    assert example.prefix == (
        "Question: Which is a mammal?\nContext: N/A\nOptions: (A) a frog, (B) a bat, (C) a fly\nAnswer:"
    )
    assert example.answers == ("B",) and tasks.get("scienceqa").candidates_of(example)[1] == "The answer is B."
    gold_scores_all("scienceqa", [example], ["The answer is B."])
    assert [ex.id for ex in load("scienceqa", root, "val")] == ["7"]


def test_tallyqa(root: Root) -> None:
    row = {
        "answer": 4,
        "data_source": "imported_genome",
        "image": "VG_100K_2/2410408.jpg",
        "image_id": 92410408,
        "issimple": False,
        "question": "How many headlights does the black bus have?",
        "question_id": 30095774,
    }
    root.json("tallyqa/test.json", [row, {**row, "issimple": True, "question_id": 2, "image": "VG_100K/1.jpg"}])
    root.images("visual_genome/VG_100K_2/2410408.jpg", "visual_genome/VG_100K/1.jpg")
    examples = load("tallyqa", root)
    assert [(ex.id, ex.answers, ex.info["split"]) for ex in examples] == [
        ("92410408-30095774", ("4",), "complex"),
        ("92410408-2", ("4",), "simple"),
    ]
    gold_scores_all("tallyqa", examples)


def test_pope(root: Root) -> None:
    def rows(*labels: str) -> list[dict[str, Any]]:
        image = "COCO_val2014_000000016631.jpg"
        return [
            {"question_id": i + 1, "image": image, "text": f"Is there a {i} in the image?", "label": label}
            for i, label in enumerate(labels)
        ]

    for name in ("random", "popular", "adversarial"):
        root.lines(f"pope/coco_pope_{name}.json", rows("yes", "no"))
    root.images("coco/val2014/COCO_val2014_000000016631.jpg")
    examples = load("pope", root)
    assert [ex.id for ex in examples][:3] == ["random-1", "random-2", "popular-1"] and len(examples) == 6
    assert examples[1].prefix == "answer en Is there a 1 in the image?" and examples[1].answers == ("no",)
    gold_scores_all("pope", examples)
    assert [ex.id for ex in load("pope", root, "adversarial")] == ["adversarial-1", "adversarial-2"]
    root.lines("pope/coco_pope_random.json", rows("maybe"))
    with pytest.raises(DataError, match="coco_pope_random.json, line 1: 'label' should be yes or no, got 'maybe'"):
        load("pope", root, "random")


def test_nlvr2_has_two_images(root: Root) -> None:
    row = {
        "identifier": "test1-0-1-0",
        "sentence": "There is a dog.",
        "label": "True",
        "left_url": "x",
        "right_url": "y",
    }
    root.lines("nlvr2/test1.json", [row, {**row, "identifier": "test1-0-1-1", "label": "False", "sentence": "Two."}])
    root.images("nlvr2/test1/test1-0-1-img0.png", "nlvr2/test1/test1-0-1-img1.png")
    examples = load("nlvr2", root)
    assert examples[1].prefix == "answer en Two." and examples[1].answers == ("False",)
    assert [example.image for example in examples] == [root.path / "nlvr2/test1/test1-0-1-img0.png"] * 2
    assert examples[0].more_images == (root.path / "nlvr2/test1/test1-0-1-img1.png",)
    gold_scores_all("nlvr2", examples)


# --- Diagrams, boxes, archives, lists of choices ----------------------------------------------------------------------


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
    assert box_text((-3.0, 0.0, 41.0, 30.0), 40, 30) == "<loc0000><loc0000><loc1023><loc1023>"


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
        ({"images": []}, "at least one image"),
    ):
        with pytest.raises(DataError, match=f"mine/questions.jsonl, line 1: .*{message}"):
            choices_task(root, [{**row, **wrong}]).load(root.path)


MMMU_ROW = {
    "id": "validation_Art_Theory_3",
    "question": "Which is it? <image 1>",
    "options": "['a mural', \"it's an icon\"]",
    "answer": "B",
    "question_type": "multiple-choice",
    "image_1": Image.new("RGB", (4, 4)),
    "image_2": Image.new("RGB", (5, 5)),
    **{f"image_{number}": None for number in range(3, 8)},
    "subfield": "Painting",
}


def test_mmmu_rows() -> None:
    open_question = {**MMMU_ROW, "question_type": "open", "options": "[]", "answer": "7"}
    [item] = mmmu.items([open_question, MMMU_ROW], "here")
    assert (item.id, item.answers, len(item.images)) == ("validation_Art_Theory_3", ("it's an icon",), 2)
    assert (item.info["subject"], item.info["answer_index"]) == ("Art_Theory", 1)
    assert item.fields["choices"] == "a mural \t it's an icon"
    with pytest.raises(DataError, match="here, row 0: 'options' should be a list written as text, got 'a, b'"):
        list(mmmu.items([{**MMMU_ROW, "options": "a, b"}], "here"))


def test_mmmu_needs_the_extra(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    root.text("mmmu/data/README.md", "")
    with pytest.raises(DataError, match=r"no validation-\*\.parquet in it"):
        tasks.get("mmmu").load(root.path)
    root.text("mmmu/data/validation-00000-of-00001.parquet", "")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-backbone\[datasets\]'"):
        tasks.get("mmmu").load(root.path)


def test_mmmu_reads_parquet_through_datasets(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself is optional: a stand-in takes the call that the real one takes."""
    root.text("mmmu/data/validation-00000-of-00001.parquet", "")
    calls = []

    def load_dataset(kind: str, *, data_files: dict[str, list[str]], split: str) -> list[dict[str, Any]]:
        calls.append((kind, [Path(name).name for name in data_files[split]]))
        return [MMMU_ROW]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    [example] = load("mmmu", root)
    assert calls == [("parquet", ["validation-00000-of-00001.parquet"])]
    gold_scores_all("mmmu", [example])


def test_every_format_has_a_test_here() -> None:
    used = {tasks.get(name).format for name in tasks.names()} | {"jsonl", "choices"}
    assert used == set(loaders.formats())
