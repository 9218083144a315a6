"""The VQA-family metrics against golden values: the official scorers', and those that PaliGemma's metrics follow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import metrics_adapter
import pytest

from vlm.eval import metrics
from vlm.eval.metrics import anls, aokvqa, boxes, chartqa, choices, pope, tallyqa, textvqa, vqa
from vlm.text.locations import box_to_loc

DATA = Path(__file__).parent / "data" / "metrics"


def golden(name: str) -> list[dict[str, Any]]:
    items = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))["items"]
    assert len(items) > 10
    return [item for item in items if item.get("valid", True)]


def differences(
    name: str, score: Callable[[dict[str, Any]], Any], expected: Callable[[dict[str, Any]], Any]
) -> list[Any]:
    pairs = [(item, score(item), expected(item)) for item in golden(name)]
    return [(item, got, want) for item, got, want in pairs if got != pytest.approx(want, abs=1e-9)]


Answers = Callable[[str, list[str]], float]
BY_ANSWERS: dict[str, Answers] = {
    "vqa_v2_official": metrics_adapter.vqa_v2,
    "textvqa_official": metrics_adapter.textvqa,
    "aokvqa_direct_answer": metrics_adapter.aokvqa_direct_answer,
    "vizwiz_vqa": metrics_adapter.vizwiz,
    "anls_docvqa": metrics_adapter.anls,
}


@pytest.mark.parametrize("name", BY_ANSWERS)
def test_scores_against_answers_equal_the_official_scripts(name: str) -> None:
    score = BY_ANSWERS[name]
    assert (
        differences(name, lambda item: score(item["prediction"], item["answers"]), lambda item: item["expected"]) == []
    )


# (file, whose value in `others`, our function): the metrics that follow other scorers, on the same items
FOLLOWERS: list[tuple[str, str, Answers]] = [
    ("vqa_v2_official", "big_vision", vqa.accuracy_big_vision),
    ("textvqa_official", "big_vision", vqa.accuracy_big_vision),
    ("vizwiz_vqa", "paligemma_big_vision_vqa", aokvqa.direct_answer),
    ("aokvqa_direct_answer", "vqa_v2_official(OK-VQA)", vqa.accuracy),
    ("anls_docvqa", "big_vision_to_lower", anls.anls_big_vision),
    ("anls_docvqa", "mmf_stvqa", anls.anls_stvqa),
]


@pytest.mark.parametrize(("name", "whose", "score"), FOLLOWERS, ids=lambda value: str(value)[:20])
def test_metrics_that_follow_other_scorers_equal_them(name: str, whose: str, score: Answers) -> None:
    def expected(item: dict[str, Any]) -> float:
        value = item["others"][whose]
        return 1.0 if value == "ZeroDivisionError" else value  # "" against "": the scorer crashes, ours says 1

    found = differences(name, lambda item: score(item["prediction"], item["answers"]), expected)
    assert found == []


def test_normaliser_equals_the_official_script() -> None:
    assert (
        differences("vqa_v2_normalize", lambda item: vqa.normalize(item["input"]), lambda item: item["expected"]) == []
    )


def test_normaliser_of_text_vqa_equals_the_official_script() -> None:
    def expected(item: dict[str, Any]) -> str:
        return str(item["expected_normalized_prediction"])

    assert differences("textvqa_official", lambda item: textvqa.normalize(item["prediction"]), expected) == []


def test_chartqa_equals_pix2struct_and_paligemma_agrees() -> None:
    def score(item: dict[str, Any]) -> bool:
        return chartqa.relaxed_match(item["prediction"], item["target"])

    assert differences("chartqa_relaxed", score, lambda item: item["expected"]) == []
    assert differences("chartqa_relaxed", score, lambda item: item["others"]["big_vision_to_lower"]) == []


def test_gqa_equals_the_official_script() -> None:
    items = golden("gqa_exact_match")
    said = {str(i): item["prediction"] for i, item in enumerate(items)}
    gold = {str(i): (item["answer"],) for i, item in enumerate(items)}
    result = metrics.compute("gqa", said, gold)
    assert list(result.per_item.values()) == [item["expected"] for item in items]


def test_pope_reads_answers_as_the_official_script() -> None:
    assert differences("pope", lambda item: pope.answer(item["prediction"]), lambda item: item["expected"]) == []


def test_pope_scores_equal_scikit_style_counts_on_the_golden_mix() -> None:
    """Expected from the golden per-item readings by the textbook definitions."""
    items = golden("pope")
    for split in ("random", "popular", "adversarial"):
        part = [item for item in items if item["split"] == split]
        true = sum(i["expected"] == "yes" == i["label"] for i in part)
        false = sum(i["expected"] == "yes" != i["label"] for i in part)
        missed = sum(i["expected"] == "no" != i["label"] for i in part)
        got = metrics_adapter.pope_scores([i["prediction"] for i in part], [i["label"] for i in part])
        assert got["precision"] == pytest.approx(true / (true + false))
        assert got["recall"] == pytest.approx(true / (true + missed))
        assert got["f1"] == pytest.approx(2 * true / (2 * true + false + missed))
        assert got["accuracy"] == pytest.approx(1 - (false + missed) / len(part))
        assert got["yes_ratio"] == pytest.approx((true + false) / len(part))


def test_paligemma_reads_pope_by_equality() -> None:
    items = golden("pope")
    said = {str(i): item["prediction"] for i, item in enumerate(items)}
    gold = {str(i): (item["label"],) for i, item in enumerate(items)}
    result = metrics.compute("pope_paligemma", said, gold)
    theirs = [item["others"]["big_vision"] for item in items]
    assert list(result.per_item.values()) == [float(a == i["label"]) for a, i in zip(theirs, items, strict=True)]
    assert result.details["valid"] == pytest.approx(sum(answer != "invalid" for answer in theirs) / len(items))


def test_tallyqa_of_paligemma_equals_big_vision() -> None:
    def score(item: dict[str, Any]) -> float:
        return float(tallyqa.match_big_vision(item["prediction"], item["answer"]))

    assert differences("tallyqa", score, lambda item: item["expected"]) == []


def test_science_qa_readings_equal_their_scripts() -> None:
    for item in golden("multiple_choice"):
        said, options, others = item["prediction"], item["choices"], item["others"]
        assert choices.science_qa(said, len(options)) == item["expected"]["official_index"], item
        assert float(choices.science_qa_llava(said, len(options)) == item["gold"]) == others["llava_correct"], item
        theirs = others["big_vision_sciqa_parsed"]
        index = -1 if theirs == "failed" else "abcdefgh"[: len(options)].find(theirs)
        assert choices.science_qa_big_vision(said, len(options)) == index, item


def test_boxes_equal_the_reference() -> None:
    def score(item: dict[str, Any]) -> float:
        return boxes.box_iou(item["pred_xyxy"], item["gt_xyxy"])

    assert differences("refcoco_iou", score, lambda item: item["expected"]["iou"]) == []
    for item in json.loads((DATA / "refcoco_iou.json").read_text())["loc_items"]:
        y0, x0, y1, x1 = item["expected_norm_yxyx_1023"]
        assert boxes.loc_to_box(item["text"]) == pytest.approx((x0, y0, x1, y1), abs=1e-12)
        left, top, width, height = item["bbox_xywh"]
        corners = (left, top, left + width, top + height)
        assert box_to_loc(corners, *item["image_wh"]) == item["text"]
