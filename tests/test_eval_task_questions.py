"""Loaders of questions, each on a tiny sample in the official format; gold answers then score the maximum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tasktools import Root, as_scored_files, gold_scores_all, load

from vlm.errors import DataError
from vlm.eval import tasks
from vlm.eval.gold import read_gold


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


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
    as_scored_files("vqav2", [example], root.path / "vqav2/v2_mscoco_val2014_annotations.json")
    vqa_files(root, "okvqa", "")
    gold_scores_all("okvqa", load("okvqa", root))


def test_vqav2_questions_without_annotation_are_named(root: Root) -> None:
    vqa_files(root, "vqav2", "v2_")
    root.json("vqav2/v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(DataError, match="questions.json: 1 questions without annotation: '42000'"):
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
    as_scored_files("aokvqa_da", [direct], root.path / "aokvqa/aokvqa_v1p0_val.json")
    assert [ex.id for ex in load("aokvqa_da", root, "val_all")] == ["22MexNkBPpdZGX6sxbxVBH", "hard"]
    choice, _ = load("aokvqa_mc", root)
    assert choice.prefix == "answer en  What is by the truck? choose from: mice \t dogs \t ducks \t lady"
    assert choice.answers == ("lady",) and tasks.get("aokvqa_mc").candidates_of(choice)[0] == "mice"
    gold_scores_all("aokvqa_mc", [choice])
    as_scored_files("aokvqa_mc", load("aokvqa_mc", root), root.path / "aokvqa/aokvqa_v1p0_val.json")


def test_a_choice_out_of_range_is_named(root: Root) -> None:
    root.json("aokvqa/aokvqa_v1p0_val.json", [{**aokvqa_rows()[0], "correct_choice_idx": 4}])
    with pytest.raises(DataError, match="item 0: 'correct_choice_idx' should be a whole number from 0 to 3, got 4"):
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
    as_scored_files("gqa", examples, root.path / "gqa/testdev_balanced_questions.json")


def test_xgqa(root: Root) -> None:
    tasks_of = tasks.get("xgqa").split()
    row = {"imageId": "n161313", "question": "Ist es rot?", "answer": "yes", "isBalanced": True}
    for role, file in tasks_of.files.items():
        if role != "images":
            root.json(file.path, {"201307251": row, "201640614": row})
    root.images("gqa/images/n161313.jpg")
    german = load("xgqa", root, "de")
    assert [(ex.id, ex.prefix, dict(ex.info)) for ex in german][0] == (
        "201307251_de",
        "answer en Ist es rot?",
        {"language": "de"},
    )
    everything = load("xgqa", root)
    assert len(everything) == 14 and "201307251_en" not in {ex.id for ex in everything}
    gold_scores_all("xgqa", everything)


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
    as_scored_files("textvqa", examples, root.path / "textvqa/TextVQA_0.5.1_val.json")


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
    as_scored_files("docvqa", [example], root.path / "docvqa/spdocvqa_qas/val_v1.0_withQT.json")
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
    assert example.prefix == "answer en Which?" and example.info == dict.fromkeys(
        ("question_type", "answer_type"), "single span"
    )
    gold_scores_all("infovqa", [example])
    row["answers"] = ["red, blue", "red, blue, red", "one"]
    root.json("infovqa/infographicsVQA_val_v1.0_withQT.json", {"data": [row]})
    [example] = load("infovqa", root, "val_any_order")
    three = ("red, blue, red", "red, red, blue", "blue, red, red")
    assert set(example.answers) == {"red, blue", "blue, red", *three, "one"} and len(example.answers) == 6


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
    as_scored_files("vizwiz", examples, root.path / "vizwiz/val.json")


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
    as_scored_files("tallyqa", examples, root.path / "tallyqa/test.json")


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
    as_scored_files("nlvr2", examples, root.path / "nlvr2/test1.json")


# --- One reader: where the two of before differed, both commands now do what the official scripts do ------------------


def test_a_scienceqa_answer_is_its_letter(root: Root) -> None:
    """The official script reads letters; `vlm score` had the text of the choice, tasks the letter."""
    problem = {"question": "?", "choices": ["a frog", "a bat"], "answer": 1, "hint": "", "split": "test"}
    problem |= {"image": "image.png", "subject": "natural science", "grade": "grade2"}
    text_only = {"choices": ["x", "y"], "answer": 0, "split": "val"}
    root.json("scienceqa/problems.json", {"4": problem, "5": {**problem, "image": None}, "6": text_only})
    root.images("scienceqa/test/4/image.png")
    [example] = load("scienceqa", root)
    gold, _ = read_gold(root.path / "scienceqa/problems.json")
    assert example.answers == gold["4"].answers == ("B",) and gold["6"].answers == ("A",)
    assert example.info.items() <= gold["4"].info.items() and gold["4"].info["split"] == "test"


def test_questions_and_annotations_are_the_same(root: Root) -> None:
    """The official script refuses results that are not about all annotated questions; a task took any part of them."""
    vqa_files(root, "vqav2", "v2_")
    annotation = {"question_id": 7, "answers": [{"answer": "red"}] * 10}
    file = root.path / "vqav2/v2_mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    root.json("vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [*content["annotations"], annotation]})
    with pytest.raises(DataError, match="questions.json: 1 annotations without one: '7'"):
        tasks.get("vqav2").load(root.path)


def test_a_count_of_tallyqa_is_a_whole_number(root: Root) -> None:
    """The official script subtracts them; `vlm score` took any text."""
    row = {"image_id": 1, "question_id": 2, "issimple": True, "image": "a.jpg", "question": "how many?"}
    root.json("tallyqa/test.json", [{**row, "answer": "3"}])
    root.images("visual_genome/a.jpg")
    assert load("tallyqa", root)[0].answers == ("3",)
    as_scored_files("tallyqa", load("tallyqa", root), root.path / "tallyqa/test.json")
    root.json("tallyqa/test.json", [{**row, "answer": "three"}])
    for read in (lambda: load("tallyqa", root), lambda: read_gold(root.path / "tallyqa/test.json")):
        with pytest.raises(DataError, match="'answer' should be a whole number, got \"three\""):
            read()


def test_kinds_of_questions_are_the_same_in_tasks_and_scores(root: Root) -> None:
    """GQA's open and binary questions, which its script reports; InfographicVQA's kinds under both names."""
    types = {"structural": "query", "semantic": "attr"}
    gqa = {"imageId": "1", "question": "what?", "answer": "a", "types": types}
    root.json("gqa/testdev_balanced_questions.json", {"1": gqa})
    root.images("gqa/images/1.jpg")
    gold, _ = read_gold(root.path / "gqa/testdev_balanced_questions.json")
    assert load("gqa", root)[0].info == gold["1"].info == {"kind": "open", **types}
    info = {"questionId": 1, "question": "?", "image_local_name": "a.jpg", "answers": ["x"], "answer_type": ["b", "a"]}
    root.json("infovqa/infographicsVQA_val_v1.0_withQT.json", {"data": [info]})
    root.images("infovqa/images/a.jpg")
    gold, _ = read_gold(root.path / "infovqa/infographicsVQA_val_v1.0_withQT.json")
    assert load("infovqa", root)[0].info == gold["1"].info == {"question_type": "a, b", "answer_type": "a, b"}


def test_a_hidden_test_split_is_named_for_every_format(root: Root) -> None:
    """`vlm score` refused items without gold text; of the tasks only COCO's reader did."""
    image = {"filename": "a.jpg", "filepath": "val2014", "split": "val", "cocoid": 1, "sentences": []}
    root.json("coco/dataset_coco.json", {"images": [image]})
    with pytest.raises(DataError, match="item '1' has no gold text; is this a file of the hidden test split"):
        tasks.get("cococap").load(root.path)
