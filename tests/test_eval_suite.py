"""`vlm eval --tasks`: tasks from official files, beside published figures, in folders of their own."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_eval_harness import ColourPredictor, lines_of

import vlm
from vlm.build import presets
from vlm.cli import main
from vlm.data.examples import Example
from vlm.errors import ConfigError, DataError
from vlm.eval import Options, evaluate, evaluate_tasks, table

QUIET = Options(progress=False)
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


class Answers(ColourPredictor):
    """Says what a function of the picture's colour and the prompt says."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def predict(self, images: Any, prompts: Sequence[str], *, ids: Sequence[str], decoding: Any) -> list[str]:
        self.batches.append(list(ids))
        self.decoding = decoding
        names = {rgb: name for name, rgb in COLOURS.items()}
        return [
            self.answer(names[image.getpixel((0, 0))], prompt) for image, prompt in zip(images, prompts, strict=True)
        ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """POPE in its three files (4 questions each), and VQA v2 with two questions."""
    root = tmp_path / "root"
    (root / "coco" / "val2014").mkdir(parents=True)
    (root / "pope").mkdir()
    (root / "vqav2").mkdir()
    for number, colour in enumerate(("red", "blue"), 1):
        Image.new("RGB", (8, 8), colour).save(root / "coco" / "val2014" / f"COCO_val2014_{number:012d}.jpg", quality=95)
        Image.new("RGB", (8, 8), colour).save(root / "coco" / "val2014" / f"COCO_val2014_{number:012d}.jpg.png")
        path = root / "coco" / "val2014" / f"COCO_val2014_{number:012d}.jpg"
        path.write_bytes(path.with_name(path.name + ".png").read_bytes())  # exact colours
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": i, "image": f"COCO_val2014_{1 + i % 2:012d}.jpg", "text": f"Is it {c}?", "label": label}
            for i, (c, label) in enumerate([("red", "yes"), ("red", "no"), ("blue", "no"), ("blue", "yes")])
        ]
        (root / "pope" / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    questions = [{"question_id": i, "image_id": 1 + i, "question": "What colour is it?"} for i in range(2)]
    annotations = [
        {
            "question_id": i,
            "question_type": "what colour",
            "answer_type": "other",
            "answers": [{"answer": c, "answer_confidence": "yes", "answer_id": k} for k in range(10)],
            "multiple_choice_answer": c,
        }
        for i, c in enumerate(("red", "blue"))
    ]
    vqa = root / "vqav2"
    (vqa / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (vqa / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return root


def look(colour: str, prompt: str) -> str:
    """Right about everything, but that it says yes to every question about blue."""
    if "What" in prompt:
        return colour
    return "yes" if colour in prompt or "blue" in prompt else "no"


def test_tasks_are_scored_broken_down_and_put_beside_published_figures(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = evaluate_tasks(Answers(look), "pope,vqav2", root, out, options=QUIET)
    pope, vqa = outcome["tasks"]["pope"], outcome["tasks"]["vqav2"]
    # Of four questions in each part one is wrong: blue is asked of a red picture, the answer is yes.
    assert pope["metrics"]["pope"]["value"] == 0.75 and pope["num_items"] == 12
    assert pope["breakdown"]["split"]["pope"] == {
        split: {"mean": 0.75, "num_items": 4} for split in ("adversarial", "popular", "random")
    }
    # yes is right twice and wrong once: precision 2/3, recall 1, F1 0.8, in the parts as in the whole.
    assert pope["metrics"]["pope_f1"]["value"] == pytest.approx(0.8)
    assert pope["breakdown"]["split"]["pope_f1"]["random"]["value"] == pytest.approx(0.8)
    assert vqa["metrics"]["vqa_accuracy"]["value"] == 1.0
    assert vqa["prompts"]["examples"] == ["answer en What colour is it?"]
    assert json.loads((out / "results.json").read_text()) == outcome
    assert len(lines_of(out / "pope" / "items.jsonl")) == 12 and (out / "vqav2" / "predictions.jsonl").is_file()
    shown = table(outcome)
    assert "vqav2  vqa_accuracy" in shown and "2 of 214354" in shown
    page = (out / "report.html").read_text()
    assert 'href="pope/report.html"' in page and "vqav2 · vqa_accuracy" in page.replace("<wbr>", "")
    assert "All metrics by split" in (out / "pope" / "report.html").read_text()


def test_an_image_that_cannot_be_decoded_is_never_right(root: Path, tmp_path: Path) -> None:
    """POPE's script reads an empty answer as yes, and to VQA v2 an empty answer equals "a": neither may count."""
    (root / "coco" / "val2014" / "COCO_val2014_000000000002.jpg").write_bytes(b"torn")
    path = root / "vqav2" / "v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace('"answer": "blue"', '"answer": "a"').replace('"a"', '"A"', 1))
    outcome = evaluate_tasks(Answers(look), "pope,vqav2", root, tmp_path / "out", options=QUIET)
    pope, vqa = outcome["tasks"]["pope"], outcome["tasks"]["vqav2"]
    # Questions 1 and 3 of each part, a no and a yes, show the torn image; of 0 and 2 the model gets 0 right.
    assert pope["skipped"] == 6 and pope["metrics"]["pope"]["value"] == 1 / 4
    details = pope["metrics"]["pope_f1"]["details"]
    assert (details["precision"], details["recall"], details["yes_ratio"]) == (1 / 2, 1 / 2, 1 / 2)
    assert pope["metrics"]["pope_f1"]["value"] == pope["breakdown"]["split"]["pope_f1"]["random"]["value"] == 1 / 2
    assert "its image could not be decoded, is wrong and no yes" in pope["metrics"]["pope"]["rule"]
    assert vqa["metrics"]["vqa_accuracy"]["value"] == vqa["metrics"]["vqa_accuracy"]["details"]["other"] == 1 / 2
    assert lines_of(tmp_path / "out" / "vqav2" / "items.jsonl")[1]["prediction"] == ""


def test_published_figures_stand_beside_ours(tmp_path: Path) -> None:
    """In the table, the results and the page; those of another split in a table of their own."""
    write_own(tmp_path)
    outcome = evaluate_tasks(Answers(look), str(tmp_path / "own.yaml"), tmp_path, tmp_path / "out", options=QUIET)
    shown = table(outcome)
    assert "82.1 (Big at 448)" in shown
    assert "33.9" not in shown and "61.2" not in shown
    page = (tmp_path / "out" / "own" / "report.html").read_text()
    assert "Beside published figures" in page and "arXiv 1, table 2" in page
    assert "61.2" in page  # of a group: on the page of the task, named
    assert page.index("Published for other splits") < page.index("33.9")
    assert "only 4 of 9 items were evaluated" in page
    # A figure of a group stands below ours of that group: German is right in 0 of 1.
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    ours = text.index("· this model, de 0.0 % 1")
    assert text.index("82.1 %") < ours < text.index("61.2 %")


def write_own(folder: Path) -> None:
    """Two languages, three and one item; English is right in 2 of 3, German in 0 of 1."""
    rows = []
    for i, (colour, language, gold) in enumerate(
        [("red", "en", "red"), ("blue", "en", "blue"), ("red", "en", "rouge"), ("blue", "de", "blau")]
    ):
        Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
        row = {"id": f"x{i}", "image": f"{i}.png", "prefix": "What?", "suffix": gold, "language": language}
        rows.append(json.dumps(row))
    (folder / "own.jsonl").write_text("\n".join(rows))
    (folder / "own.yaml").write_text(
        """
name: own
title: a task of one's own
format: jsonl
default_split: test
prompt: "{prefix}"
metrics: [exact_match]
breakdown: [language]
average_over: language
splits:
  test: {expected_items: 9, files: {data: {path: own.jsonl}}}
published:
  - {model: Big, resolution: 448, metric: exact_match, split: test, value: 82.1, source: "arXiv 1, table 2"}
  - {model: Big, metric: exact_match, split: val, value: 33.9, source: "arXiv 1"}
  - {model: Big, metric: exact_match, split: test, group: de, value: 61.2, source: "arXiv 1"}
"""
    )


def test_an_average_over_groups_weighs_groups_and_not_items(tmp_path: Path) -> None:
    write_own(tmp_path)
    outcome = evaluate_tasks(Answers(look), str(tmp_path / "own.yaml"), tmp_path, tmp_path / "out", options=QUIET)
    result = outcome["tasks"]["own"]["metrics"]["exact_match"]
    assert result["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["details"] == {"language de": 0.0, "language en": pytest.approx(2 / 3)}
    assert "computed for each language alone (2 of them) and averaged without weights" in result["rule"]
    # A resample draws English among English: its mean is k/3 with k right of 3, half of that is 0 to 1/2.
    assert result["interval_95"] == pytest.approx([0.0, 0.5])


def test_a_second_run_predicts_nothing_and_a_kill_costs_one_task_only(root: Path, tmp_path: Path) -> None:
    class Stops(Answers):
        def predict(self, images: Any, prompts: Any, *, ids: Any, decoding: Any) -> list[str]:
            if "What" in prompts[0]:
                raise KeyboardInterrupt
            return super().predict(images, prompts, ids=ids, decoding=decoding)

    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(Stops(look), "pope,vqav2", root, tmp_path / "out", options=QUIET)
    second = Answers(look)
    outcome = evaluate_tasks(second, "pope,vqav2", root, tmp_path / "out", options=QUIET)
    assert second.batches == [["0", "1"]] and outcome["tasks"]["pope"]["run"]["resumed_items"] == 12
    whole = evaluate_tasks(Answers(look), "pope,vqav2", root, tmp_path / "whole", options=QUIET)
    for name in ("pope", "vqav2"):
        assert lines_of(tmp_path / "out" / name / "items.jsonl") == lines_of(tmp_path / "whole" / name / "items.jsonl")
        assert outcome["tasks"][name]["metrics"] == whole["tasks"][name]["metrics"]


def test_results_of_several_tasks_are_compared_task_by_task(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answer in (("a", look), ("b", lambda colour, prompt: "red" if "What" in prompt else "yes")):
        evaluate_tasks(Answers(answer), "pope,vqav2", root, tmp_path / name, options=QUIET)
    evaluate_tasks(Answers(look), "pope", root, tmp_path / "c", options=QUIET)
    page = tmp_path / "d.html"
    assert main(["eval", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "vqa_accuracy            1.0000  0.5000  -0.5000" in shown and "pope            0.7500  0.5000" in shown
    assert "Differences on pope" in page.read_text() and "Items that changed on vqav2" in page.read_text()
    assert main(["eval", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"pope", "vqav2"}
    assert main(["eval", "diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "give two folders of the same tasks" in capsys.readouterr().err


def test_decoding_is_the_tasks_unless_it_is_said(root: Path, tmp_path: Path) -> None:
    predictor = Answers(look)
    outcome = evaluate_tasks(predictor, "vqav2", root, tmp_path / "a", options=QUIET)
    assert predictor.decoding.max_new_tokens == 32 and outcome["tasks"]["vqav2"]["task"]["decoding_is_the_tasks"]
    changed = {"max_new_tokens": 3}
    outcome = evaluate_tasks(predictor, "vqav2", root, tmp_path / "b", options=QUIET, decoding=changed)
    assert predictor.decoding.max_new_tokens == 3 and not outcome["tasks"]["vqav2"]["task"]["decoding_is_the_tasks"]


def test_missing_files_and_unknown_tasks_are_refused_before_anything_is_predicted(root: Path, tmp_path: Path) -> None:
    predictor = Answers(look)
    with pytest.raises(DataError, match="gqa"):
        evaluate_tasks(predictor, "pope,gqa", root, tmp_path / "out", options=QUIET)
    with pytest.raises(DataError, match="task 'vqav2', item '0': there is nothing to choose from"):
        evaluate_tasks(predictor, "pope,vqav2", root, tmp_path / "out", options=QUIET, decoding={"by": "likelihood"})
    with pytest.raises(ConfigError, match="unknown task 'popo'"):
        evaluate_tasks(predictor, "popo", root, tmp_path / "out", options=QUIET)
    assert predictor.batches == [] and not (tmp_path / "out").exists()


def test_the_command_line_lists_tasks_and_asks_for_metrics_or_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list-tasks"]) == 0
    shown = {(line.split() or [""])[0] for line in capsys.readouterr().out.splitlines()}
    assert {"vqav2", "pope", "cococap", "zeroshot", "imagenet"} <= shown
    words = ["eval", "--model", "m", "--data", "d", "--out", "o"]
    assert main(words) == 2
    assert "one of the arguments --metrics --tasks is required" in capsys.readouterr().err
    assert main([*words, "--metrics", "cider", "--tasks", "vqav2"]) == 2
    assert "not allowed with argument --metrics" in capsys.readouterr().err
    assert main([*words, "--tasks", "vqav2", "--skip-bad"]) == 2
    assert "--image-root and --skip-bad are for a JSONL file" in capsys.readouterr().err
    assert main([*words, "--metrics", "cider", "--by", "likelihood", "--num-beams", "2"]) == 2
    assert "--by likelihood does not read --num-beams" in capsys.readouterr().err
    assert main([*words, "--metrics", "cider", "--batch", "some"]) == 2
    assert "expected a whole number, got 'some'" in capsys.readouterr().err


# --- likelihood


def test_likelihood_takes_the_candidate_that_the_model_finds_likeliest(root: Path, tmp_path: Path) -> None:
    """Of a real model, through the command line; the reference is the loss of each candidate as a training target."""
    import torch

    model, processor = presets.tiny()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    vlm.save(model, processor, tmp_path / "model")
    words = [
        "eval",
        "--model",
        str(tmp_path / "model"),
        "--tasks",
        "pope@random",
        "--data",
        str(root),
        "--device",
        "cpu",
    ]
    assert main([*words, "--by", "likelihood", "--batch", "auto", "--out", str(tmp_path / "out")]) == 0
    items = lines_of(tmp_path / "out" / "pope@random" / "items.jsonl")
    assert len(items) == 4
    for item in items:
        losses = []
        for candidate in ("yes", "no"):
            batch = processor([item["images"][0]], [item["prefix"]], [candidate])
            out = model(**batch, reduction="token")
            losses.append(out.loss_sum.item())
        assert item["log_likelihoods"] == pytest.approx([-loss for loss in losses], rel=1e-4)
        assert item["prediction"] == ("yes", "no")[losses.index(min(losses))] and item["candidates"] == ["yes", "no"]
    assert main([*words, "--by", "likelihood", "--normalization", "token", "--out", str(tmp_path / "out")]) == 2


def test_likelihood_needs_candidates_and_a_model_that_scores(tmp_path: Path) -> None:
    example = Example("1", Image.new("RGB", (4, 4)), "which?", "a", (), (), "", 0, info={"choices": ["a", "b"]})
    with pytest.raises(ConfigError, match="a Answers has no `score`"):
        evaluate(Answers(look), [example], "exact_match", tmp_path / "a", by="likelihood", progress=False)
    bare = Example("2", Image.new("RGB", (4, 4)), "which?", "a", (), (), "", 0)
    pair = presets.tiny()
    with pytest.raises(DataError, match="item '2' has nothing to choose from"):
        evaluate(pair, [bare], "exact_match", tmp_path / "b", by="likelihood", progress=False)
    outcome = evaluate(pair, [example], "exact_match", tmp_path / "c", by="likelihood", progress=False)
    assert outcome["decoding"] == {"by": "likelihood", "normalization": "none"}
    assert lines_of(tmp_path / "c" / "items.jsonl")[0]["prediction"] in ("a", "b")
