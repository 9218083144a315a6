"""`vlm score`: the benchmarks' own files in, figures out; whatever would change the denominator is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm.cli import parse
from vlm.errors import ConfigError, DataError
from vlm.eval import gold as files
from vlm.eval import metrics, score_files
from vlm.eval.metrics import registry
from vlm.eval.scoring import table

DATA = Path(__file__).parent / "data"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
TEN = ["cat", "cat", "cat", "dog", "dog", "dog", "dog", "dog", "dog", "cow"]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a value as JSON, a list of lines as JSONL (`lines=True`), or bytes; returns the path."""

    def to_file(name: str, value: Any, lines: bool = False) -> Path:
        path = tmp_path / name
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else json.dumps(value), "utf-8")
        return path

    return to_file


def score(predictions: Path, references: Path, metrics: str, **options: Any) -> tuple[dict[str, float], dict[str, Any]]:
    outcome = score_files(predictions, references, metrics, **options)
    json.dumps(outcome, allow_nan=False)
    return {name: result["value"] for name, result in outcome["metrics"].items()}, outcome


# --- The benchmarks' formats ------------------------------------------------------------------------------------------


def test_vqa_files_give_the_official_figures(write: Any) -> None:
    """All golden items of the official script, as the official files: overall, per answer type, per question type."""
    items = json.loads((DATA / "metrics" / "vqa_v2_official.json").read_text(encoding="utf-8"))["items"]
    kinds = {
        item["question_id"]: (item.get("answer_type", "other"), item.get("question_type", "none")) for item in items
    }
    annotations = [
        {
            "question_id": item["question_id"],
            "image_id": 1,
            "question_type": kinds[item["question_id"]][1],
            "answer_type": kinds[item["question_id"]][0],
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(item["answers"])
            ],
        }
        for item in items
    ]
    gold = write("annotations.json", {"info": {}, "data_subtype": "val2014", "annotations": annotations})
    results = [{"question_id": item["question_id"], "answer": item["prediction"]} for item in items]
    said = write("results.json", results)
    asked = write("questions.json", {"questions": [{"question_id": i["question_id"], "question": "?"} for i in items]})
    values, outcome = score(said, gold, "vqa_accuracy,okvqa", questions=asked)
    expected = sum(item["expected"] for item in items) / len(items)
    assert values == pytest.approx({"vqa_accuracy": expected, "okvqa": expected})
    result = outcome["metrics"]["vqa_accuracy"]
    assert result["normalizer"] == "VQA v2 official" and result["num_items"] == len(items)
    for position, fact in enumerate(("answer_type", "question_type")):
        for value, part in result["by"][fact].items():
            mine = [item["expected"] for item in items if kinds[item["question_id"]][position] == value]
            assert part == {"mean": pytest.approx(sum(mine) / len(mine)), "num_items": len(mine)}
    assert result["details"]["number"] == pytest.approx(result["by"]["answer_type"]["number"]["mean"])
    assert (outcome["predictions"]["format"], outcome["references"]["format"]) == ("vqa", "vqa")
    short = write("short.json", {"questions": [{"question_id": items[0]["question_id"]}]})
    with pytest.raises(DataError, match="annotations without one"):
        score(said, gold, "vqa_accuracy", questions=short)


def test_coco_captions(write: Any) -> None:
    file = json.loads((DATA / "metrics" / "caption_coco80_vinvl.json").read_text(encoding="utf-8"))
    corpus = file["corpus_expected_tokenised_alone"]  # as our tokenizer: the official run lets captions touch others
    items = list(enumerate(file["items"]))
    gold = write(
        "captions.json",
        {
            "images": [{"id": number, "file_name": "x.jpg"} for number, _ in items],
            "annotations": [
                {"image_id": number, "id": 10 * number + place, "caption": caption}
                for number, item in items
                for place, caption in enumerate(item["refs"])
            ],
        },
    )
    said = write("results.json", [{"image_id": number, "caption": item["hyp"]} for number, item in items])
    values, outcome = score(said, gold, "cider,bleu_4,rouge_l")
    assert values == pytest.approx(
        {"cider": corpus["CIDEr"], "bleu_4": corpus["Bleu_4"], "rouge_l": corpus["ROUGE_L"]},
        abs=1e-9,
    )
    assert outcome["references"]["format"] == outcome["predictions"]["format"] == "coco"


def test_textvqa_and_docvqa(write: Any) -> None:
    text = write("textvqa.json", {"data": [{"question_id": 7, "question": "?", "answers": ["One,two"] * 10}]})
    said = write("said.json", [{"question_id": 7, "answer": "onetwo"}])
    assert score(said, text, "textvqa,textvqa_paligemma")[0] == {"textvqa": 1, "textvqa_paligemma": 0}
    rows = [
        {"questionId": 1, "answers": ["abcdef"], "question_types": ["layout", "form"]},
        {"questionId": 2, "answers": ["x", "Paris"], "question_types": ["form"]},
    ]
    document = write("val_v1.0.json", {"dataset_name": "docvqa", "data": rows})
    said = write("docvqa.json", [{"questionId": 1, "answer": "abc"}, {"questionId": 2, "answer": "paris"}])
    values, outcome = score(said, document, "anls,anls_paligemma")
    assert values == {"anls": 0.75, "anls_paligemma": 0.5}
    parts = outcome["metrics"]["anls"]["by"]["question_type"]
    assert parts["form, layout"] == {"mean": 0.5, "num_items": 1} and parts["form"]["mean"] == 1


def test_gqa_scores_the_balanced_questions_as_the_official_script(write: Any) -> None:
    def question(answer: str, structural: str, balanced: bool = True) -> dict[str, Any]:
        types = {"structural": structural, "semantic": "attr", "detailed": "x"}
        return {"question": "?", "answer": answer, "isBalanced": balanced, "types": types}

    gold = write(
        "q.json", {"1": question("yes", "verify"), "2": question("red", "query"), "3": question("x", "query", False)}
    )
    said = write("p.json", [{"questionId": str(n), "prediction": a} for n, a in ((1, "yes"), (2, "blue"), (3, "x"))])
    values, outcome = score(said, gold, "gqa")
    assert values == {"gqa": 0.5} and outcome["metrics"]["gqa"]["num_items"] == 2
    assert outcome["metrics"]["gqa"]["details"] == {"query": 0, "verify": 1, "binary": 1, "open": 0}
    assert outcome["notes"] == ["gqa: 1 of 3 items are not in GQA's balanced set and not scored"]
    without = write("p2.json", [{"questionId": "1", "prediction": "yes"}, {"questionId": "2", "prediction": "blue"}])
    assert score(without, gold, "gqa")[0] == {"gqa": 0.5}


def test_pope_lines(write: Any) -> None:
    labels = ["yes", "no", "no", "yes"]
    gold = write(
        "pope.json",
        [{"question_id": i, "image": "x.jpg", "text": "Is there?", "label": label} for i, label in enumerate(labels)],
        lines=True,
    )
    texts = ["Yes, there is.", "No", "Yes", "There is no dog"]
    for name, key in (("llava", "text"), ("own", "answer")):
        said = write(f"{name}.jsonl", [{"question_id": i, key: text} for i, text in enumerate(texts)], lines=True)
        values, outcome = score(said, gold, "pope,pope_f1,pope_paligemma")
        assert values == {"pope": 0.5, "pope_f1": 0.5, "pope_paligemma": 0.25}
        assert outcome["metrics"]["pope"]["details"]["yes_ratio"] == 0.5
        assert outcome["metrics"]["pope"]["by"]["label"]["no"] == {"mean": 0.5, "num_items": 2}


def test_science_qa_problems(write: Any) -> None:
    problems = {
        "1": {"question": "?", "choices": ["a", "b"], "answer": 1, "split": "test", "subject": "natural science"},
        "2": {"question": "?", "choices": ["a", "b", "c"], "answer": 0, "split": "test", "subject": "language"},
        "3": {"question": "?", "choices": ["a", "b", "c"], "answer": 0, "split": "train", "subject": "language"},
    }
    gold = write("problems.json", problems)
    said = write("results.json", {"acc": 1, "results": {}, "outputs": {"1": "The answer is B.", "2": "A"}})
    values, outcome = score(said, gold, "scienceqa,scienceqa_llava", split="test")
    assert values == {"scienceqa": 0.5, "scienceqa_llava": 1}
    assert outcome["notes"] == ["split test: 2 of 3 annotated items"]
    assert outcome["metrics"]["scienceqa"]["by"]["subject"]["language"]["mean"] == 0
    with pytest.raises(DataError, match="no annotation has the split 'val'; they have test, train"):
        score(said, gold, "scienceqa", split="val")
    with pytest.raises(DataError, match="1 of 3 items have no prediction: '3'"):
        score(said, gold, "scienceqa")


def test_aokvqa_leaves_out_difficult_questions_of_direct_answers_only(write: Any) -> None:
    def question(key: str, difficult: bool) -> dict[str, Any]:
        answers = {"direct_answers": ["cat"] * 2 + ["dog"] * 8, "choices": ["cat", "dog"], "correct_choice_idx": 1}
        return {"question_id": key, "difficult_direct_answer": difficult, **answers}

    gold = write("aokvqa.json", [question("a", False), question("b", True)])
    said = write("said.json", {"a": "cat", "b": "dog"})
    values, outcome = score(said, gold, "aokvqa_da,aokvqa_mc")
    assert values == pytest.approx({"aokvqa_da": 2 / 3, "aokvqa_mc": 0.5})
    assert outcome["notes"] == ["aokvqa_da: 1 of 2 items are marked difficult_direct_answer and not scored"]
    assert score(write("da.json", {"a": {"direct_answer": "dog"}}), gold, "aokvqa_da")[0] == {"aokvqa_da": 1}
    choice = write("mc.json", {"a": {"multiple_choice": "dog"}})
    with pytest.raises(DataError, match="aokvqa_mc: 1 of 2 items have no prediction: 'b'"):
        score(choice, gold, "aokvqa_mc")
    both = write("both.json", {key: {"multiple_choice": "dog", "direct_answer": "cat"} for key in "ab"})
    with pytest.raises(DataError, match="--predictions-format aokvqa_da or aokvqa_mc"):
        score(both, gold, "aokvqa_mc")
    assert score(both, gold, "aokvqa_mc", predictions_format="aokvqa_mc")[0] == {"aokvqa_mc": 1}


def test_vizwiz_tallyqa_and_nlvr2(write: Any) -> None:
    row = {
        "image": "v_1.jpg",
        "question": "?",
        "answers": [{"answer": "2"}] * 10,
        "answer_type": "other",
        "answerable": 1,
    }
    gold = write("vizwiz.json", [row])
    said = write("v.json", [{"image": "v_1.jpg", "answer": "Two"}])
    values, outcome = score(said, gold, "vizwiz,vizwiz_paligemma")
    assert values == {"vizwiz": 1, "vizwiz_paligemma": 0}
    assert outcome["metrics"]["vizwiz"]["details"]["unanswerable_f1"] == 0

    tally = write("tally.json", [{"image_id": 5, "question_id": 1, "answer": 3, "issimple": True}])
    said = write("t.jsonl", [{"id": "5-1", "prediction": "three"}], lines=True)
    assert score(said, tally, "tallyqa,tallyqa_paligemma")[0] == {"tallyqa": 1, "tallyqa_paligemma": 1}

    pairs = [{"identifier": f"test1-0-{i}-0", "sentence": "s", "label": "True"} for i in range(2)]
    nlvr = write("test1.json", pairs, lines=True)
    said = write("n.json", [{"identifier": pair["identifier"], "prediction": "True"} for pair in pairs])
    assert score(said, nlvr, "nlvr2")[1]["metrics"]["nlvr2"]["details"]["consistency"] == 1


def test_our_own_lines_and_one_file_for_both_sides(write: Any) -> None:
    """`items.jsonl` of an evaluation holds predictions and gold texts."""
    rows = [
        {"id": 1, "prediction": "B", "suffix": "cat", "choices": ["dog", "cat"], "kind": "x"},
        {"id": "q2", "prediction": "", "suffix": "cat", "info": {"choices": ["dog", "cat"]}, "kind": "y"},
    ]
    path = write("items.jsonl", rows, lines=True)
    values, outcome = score(path, path, "multiple_choice,exact_match")
    assert values == {"multiple_choice": 0.5, "exact_match": 0} and outcome["num_empty_predictions"] == 1
    assert outcome["metrics"]["multiple_choice"]["by"]["kind"] == {
        "x": {"mean": 1, "num_items": 1},
        "y": {"mean": 0, "num_items": 1},
    }
    single = write("one.jsonl", rows[:1], lines=True)
    assert score(single, single, "multiple_choice")[0] == {"multiple_choice": 1}
    bare = write("bare.jsonl", [{"image": "x.png", "prefix": "q", "suffix": text} for text in "ab"], lines=True)
    assert score(write("lines.json", {"1": "a", "2": "x"}), bare, "exact_match")[0] == {"exact_match": 0.5}
    line = {"image": "x.png", "prefix": "q", "suffix": "a"}
    assert list(files.read_gold(write("line.jsonl", [line], lines=True))[0]) == ["1"]
    looks = {"id": 5, "image": "x.png", "question": "?", "answers": ["like", "VizWiz"]}
    assert files.read_gold(write("looks.json", [looks]))[1] == "jsonl"
    fallback = write("a.jsonl", [{"id": 1, "answers": TEN, "suffix": "ignored"}], lines=True)
    assert score(write("p.json", {"1": "cat"}), fallback, "okvqa")[0] == {"okvqa": pytest.approx(0.9)}


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_ids_must_agree_and_are_listed(write: Any) -> None:
    gold = write("gold.json", {str(i): "x" for i in range(20)})
    few = write("few.json", {str(i): "x" for i in range(5)})
    with pytest.raises(DataError, match=r"15 of 20 items have no prediction: '5', '6'.*and 5 more"):
        score(few, gold, "exact_match")
    values, outcome = score(few, gold, "exact_match", only_predicted=True)
    assert values == {"exact_match": 1} and outcome["num_items"] == 5
    assert "15 of 20 annotated items have no prediction" in outcome["notes"][0]
    more = write("more.json", {str(i): "x" for i in range(21)})
    for only_predicted in (False, True):
        with pytest.raises(DataError, match="1 of 21 predictions have no annotation: '20'"):
            score(more, gold, "exact_match", only_predicted=only_predicted)


def test_ids_that_occur_twice(write: Any) -> None:
    rows = [{"id": 1, "prediction": "a"}, {"id": "1", "prediction": "b"}, {"id": 2, "prediction": "c"}]
    with pytest.raises(DataError, match="1 ids occur more than once: '1'"):
        files.read_predictions(write("p.jsonl", rows, lines=True))
    with pytest.raises(DataError, match="the key '1' is there twice"):
        files.read_predictions(write("p.json", b'{"1": "a", "1": "b"}'))
    with pytest.raises(DataError, match="2 ids occur more than once: '8', '7'"):
        files.read_gold(write("g.jsonl", [{"id": i, "suffix": "x"} for i in (7, 8, 8, 7)], lines=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected JSON"),
        (b"[]", "holds no item"),
        (b"{}", "holds no item"),
        (b"id,prediction", "starts with 'i'"),
        (b"\x1f\x8b\x08", "compressed file"),
        (b'{"id": 1, "prediction": "\xff"}', "byte 0xff at column 26 is not UTF-8"),
        (b'[{"id": 1, "prediction": "a"}', "not JSON"),
        (b'{"id": 1, "prediction": "a"}\n{"id": 2, "pred', ":2: not JSON.*is the line cut off"),
        (b'{"id": 1, "prediction": "a"}\n{"id": 2}', ":2: no 'prediction'; it has 'id'"),
        (b'{"id": 1, "prediction": "a"}\n[1]', ":2 should be an object"),
        (b'[{"id": 1, "prediction": null}]', r"\[0\]: 'prediction' should be text, got null; write an empty text"),
        (b'[{"id": 1, "prediction": 3}]', "should be text, got 3"),
        (b'[{"id": true, "prediction": "a"}]', "'id' should be a text or a whole number, got true"),
        (b'[{"id": 1.5, "prediction": "a"}]', "'id' should be a text or a whole number"),
        (b'[{"id": 1, "prediction": NaN}]', "NaN is no JSON value"),
        (b'[{"number": 1}]', "predictions of no known format; the keys are number. Known: jsonl"),
        (b'["a"]', r"\[0\] should be an object"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_broken_predictions(write: Any, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        files.read_predictions(write("p.json", content))


def test_broken_references(write: Any) -> None:
    with pytest.raises(DataError, match="references of no known format; the keys are number"):
        files.read_gold(write("g.json", [{"number": 1}]))
    with pytest.raises(DataError, match="1 items have no gold text: '2'"):
        files.read_gold(write("g.jsonl", [{"id": 1, "suffix": "a"}, {"id": 2}], lines=True))
    coco: dict[str, list[Any]] = {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"image_id": 1, "caption": "a cat"}],
    }
    with pytest.raises(DataError, match="1 items have no gold text: '2'"):
        files.read_gold(write("g.json", coco))
    coco["annotations"].append({"image_id": 3, "caption": "a dog"})
    with pytest.raises(DataError, match="image '3' is not among the images"):
        files.read_gold(write("g.json", coco))
    coco["images"].append({"id": 1})
    with pytest.raises(DataError, match="1 ids occur more than once: '1'"):
        files.read_gold(write("g.json", coco))
    with pytest.raises(DataError, match=r"'1': 'answer' should be a whole number from 0 to 1, got 2"):
        files.read_gold(write("g.json", {"1": {"choices": ["a", "b"], "answer": 2}}))
    with pytest.raises(ConfigError, match=r"unknown format 'coko' \(did you mean 'coco'\?\)"):
        files.read_gold(write("g.json", {"1": "a"}), "coko")
    with pytest.raises(DataError, match="no 'annotations'"):
        files.read_gold(write("g.json", {"1": "a"}), "coco")


def test_a_missing_fact_is_refused(write: Any) -> None:
    gold, said = write("g.json", {"1": "cat"}), write("p.json", {"1": "B"})
    with pytest.raises(DataError, match="1 of 1 items have no 'choices': '1'"):
        score(said, gold, "scienceqa")
    with pytest.raises(
        ConfigError, match="--by colour: 1 of 1 items have no 'colour'; the annotations have no further"
    ):
        score(said, gold, "exact_match", by=["colour"])


# --- The page ---------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_page_names_every_format() -> None:
    assert set(files.prediction_formats()) | set(files.gold_formats()) <= set(re.findall(r"`([a-z0-9_]+)`", PAGE))


def test_the_examples_of_the_page_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    blocks = [
        block
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        if not re.search("score_files|vae-oid", block)
    ]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    result = metrics.compute("at_most", {"a": "two words"}, {"a": ("",)}, {"a": {"limit": 1}})
    assert (result.value, result.num_items) == (0, 1)


# --- The command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "vlm", "score", *arguments], capture_output=True, text=True)


def test_the_command(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gold = write("gold.json", {"a": "cat", "b": ["dog", "a dog"]})
    said = write("said.json", {"a": "cat", "b": "a cow"})
    options = ["score", "-p", str(said), "-r", str(gold), "-m", "exact_match,anls"]
    command, parsed = parse([*options, "--json"])
    assert command.run(parsed) == 0
    printed = capsys.readouterr()
    outcome = json.loads(printed.out)
    assert outcome["metrics"]["exact_match"]["value"] == 0.5 and len(outcome["references"]["sha256"]) == 64
    assert printed.err.splitlines() == [f"predictions: {said} read as mapping", f"references: {gold} read as mapping"]
    command, parsed = parse(options)
    assert command.run(parsed) == 0
    assert capsys.readouterr().out.rstrip("\n") == table(outcome)
    lines = table(outcome).splitlines()
    assert lines[0].split() == ["metric", "value", "95", "%", "interval", "items", "normaliser"]
    assert lines[1].split()[:2] == ["exact_match", "0.5000"] and lines[1].endswith("outer blanks")
    assert any(line.startswith("anls (version 1): mean over questions") for line in lines)


def test_the_command_lists_metrics_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    command, parsed = parse(["score", "--list"])
    assert command.run(parsed) == 0
    printed = capsys.readouterr().out
    assert (
        "scienceqa_paligemma" in printed
        and "[needs choices" in printed
        and 'COCO results: list of {"image_id"' in printed
    )
    command, parsed = parse(["score", "--list", "--json"])
    assert command.run(parsed) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"name", "rule", "reads", "needs", "uses"} == set(listed["metrics"][0])


def test_the_command_needs_files_and_says_so(write: Any) -> None:
    done = run("-m", "anls", "-p", "x.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: vlm score needs --references;")
    gold, said = write("g.json", {"a": "cat"}), write("p.json", {"b": "cat"})
    done = run("-m", "anls", "-p", str(said), "-r", str(gold))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no annotation: 'b'" in done.stderr


def test_scoring_starts_without_torch() -> None:
    heavy = ("torch", "transformers", "PIL")
    code = "import sys, vlm.eval.scoring, vlm.cli.commands.score"
    code += f"; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("metric", "gold"),
    [
        ("exact_match", {"1": []}),
        ("textvqa", {"data": [{"question_id": 1, "answers": []}]}),
        ("anls", {"data": [{"questionId": 1, "answers": []}]}),
    ],
)
def test_no_gold_answer_is_told(metric: str, gold: Any, write: Any) -> None:
    said = write("said.json", [{"question_id": 1, "answer": "a"}] if "data" in gold else {"1": "a"})
    with pytest.raises(DataError, match="is an empty list, so that nothing could be right; give at least one text"):
        score_files(said, write("gold.json", gold), metric, predictions_format=None)


def test_notes_and_the_best_constant_stand_below_the_table(write: Any) -> None:
    gold = [{"id": str(i), "suffix": "cat", "choices": ["dog", "cat"]} for i in range(3)]
    said = [{"id": str(i), "prediction": text} for i, text in enumerate(["The answer is B.", "?", "a"])]
    outcome = score_files(
        write("said.jsonl", said, lines=True), write("gold.jsonl", gold, lines=True), "multiple_choice,exact_match"
    )
    shown = table(outcome)
    assert 'exact_match: the best constant answer would score 1.0000 ("cat")' in shown
    assert 'multiple_choice: the best constant answer would score 1.0000 ("B")' in shown
    assert "note: multiple_choice: 1 of 3 answers could not be read as a choice and count as wrong" in shown
    assert outcome["metrics"]["multiple_choice"]["details"]["num_unparsed"] == 1
    one_image = score_files(write("s.json", {"1": "a cat"}), write("g.json", {"1": "a cat"}), "cider")
    assert "note: cider: CIDEr is 0 here whatever the captions say" in table(one_image)


# --- A metric of one's own: one new file ------------------------------------------------------------------------------

OWN = """
from vlm.eval.metrics.registry import register
from vlm.eval.metrics.result import mean_result


@register("same_length", summary="answers as long as the gold text", reads="references", per_item_is_right=True)
def same_length(predictions, references):
    scores = {key: float(len(predictions[key]) == len(gold[0])) for key, gold in references.items()}
    return mean_result("same_length", scores, "1 if the prediction has as many characters as the first gold text")
"""


def linked(source: Path, copy: Path, into: tuple[str, ...]) -> None:
    """`copy` holds links to what `source` holds, the folders on the way `into` are real."""
    copy.mkdir()
    for entry in source.iterdir():
        if entry.name != "__pycache__" and entry.name != (into[0] if into else None):
            (copy / entry.name).symlink_to(entry)
    if into:
        linked(source / into[0], copy / into[0], into[1:])


def test_a_metric_is_one_new_file(tmp_path: Path, write: Any) -> None:
    """In the package, and in a module of one's own: nothing else is edited, and every command knows it."""
    linked(Path(metrics.__file__).parents[2], tmp_path / "vlm", ("eval", "metrics"))
    (tmp_path / "vlm" / "eval" / "metrics" / "same_length.py").write_text(OWN)
    (tmp_path / "of_ones_own.py").write_text(OWN.replace("same_length", "own_length"))
    said, gold = write("said.json", {"a": "cat", "b": "horse"}), write("gold.json", {"a": "dog", "b": "cow"})
    options = ["score", "-m", "same_length,own_length", "-p", str(said), "-r", str(gold), "--json"]
    code = f"import sys, of_ones_own; from vlm.cli import main; sys.exit(main({options}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    for name in ("same_length", "own_length"):
        assert outcome["metrics"][name]["value"] == 0.5
        assert outcome["metrics"][name]["best_constant"] == {"answer": "dog", "value": 1.0}
