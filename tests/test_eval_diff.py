"""Comparison of two results: differences, intervals and p worked out by hand."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_eval_harness import COLOURS, ColourPredictor, examples_of

from vlm.cli import main
from vlm.data.examples import Example
from vlm.errors import ConfigError, DataError
from vlm.eval import diff, evaluate, paired


class Says(ColourPredictor):
    """Says what it was given for each item; everything else is right."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers

    def identity(self) -> dict[str, Any]:
        return {"answers": self.answers}

    def predict(self, images: Any, prompts: Any, *, ids: Sequence[str], decoding: Any) -> list[str]:
        right = super().predict(images, prompts, ids=ids, decoding=decoding)
        return [self.answers.get(key, text) for key, text in zip(ids, right, strict=True)]


def results(out: Path, answers: dict[str, str], count: int = 4, metrics: str = "exact_match") -> Path:
    examples = examples_of([list(COLOURS)[i % 4] for i in range(count)])
    evaluate(Says(answers), examples, metrics, out, report=False, progress=False)
    return out


def test_one_item_of_four_is_better(tmp_path: Path) -> None:
    """d = (0, 1, 0, 0): a resample's mean is Binomial(4, 1/4) / 4.

    P(0) = 0.3164, P(<= 1/2) = 0.9492, P(<= 3/4) = 0.9961: the interval is 0 to 3/4. Twice P(mean <= 0) is p = 0.633.
    """
    found = diff.compare(results(tmp_path / "a", {"e1": "mauve"}), results(tmp_path / "b", {}))
    one = found["metrics"]["exact_match"]
    assert (one["a"], one["b"], one["difference"]) == (0.75, 1.0, 0.25)
    assert one["interval_95"] == [0.0, 0.75]
    assert one["p"] == pytest.approx(2 * 0.75**4, abs=0.05)
    assert (one["better"], one["worse"]) == (1, 0)
    (changed,) = found["changed"]
    assert (changed["id"], changed["a"], changed["b"], changed["change"]) == ("e1", "mauve", "green", "better")
    assert changed["scores"] == {"exact_match": [0.0, 1.0]} and changed["gold"] == ["green"]


def test_all_items_are_worse(tmp_path: Path) -> None:
    """Every resample says -1, so p is as small as 2000 resamples can tell: 2 * 1 / 2001."""
    found = diff.compare(results(tmp_path / "a", {}), results(tmp_path / "b", {f"e{i}": "no" for i in range(4)}))
    one = found["metrics"]["exact_match"]
    assert (one["difference"], one["interval_95"], one["worse"]) == (-1.0, [-1.0, -1.0], 4)
    assert one["p"] == pytest.approx(2 / 2001)
    assert "< 0.001" in diff.table({**found, "metrics": {"exact_match": {**one, "p": 0.0005}}})


def test_the_same_results_do_not_differ(tmp_path: Path) -> None:
    found = diff.compare(results(tmp_path / "a", {"e0": "x"}), results(tmp_path / "b", {"e0": "x"}))
    one = found["metrics"]["exact_match"]
    assert (one["difference"], one["interval_95"], one["p"], found["changed"]) == (0.0, [0.0, 0.0], 1.0, [])


def test_pairs_are_what_makes_the_interval_narrow(tmp_path: Path) -> None:
    """Both wrong on the same half, but for one item of 40: unpaired resampling would give about +-0.21 around it."""
    half = {f"e{i}": "x" for i in range(20)}
    less = {key: text for key, text in half.items() if key != "e0"}
    found = diff.compare(results(tmp_path / "a", half, 40), results(tmp_path / "b", less, 40))
    low, high = found["metrics"]["exact_match"]["interval_95"]
    assert low == 0.0 and 0.05 <= high <= 0.1


def test_bleu_is_the_corpus_score_of_every_resample(tmp_path: Path) -> None:
    """BLEU-1 of A is 1; B says one wrong word of two on one item of two: 3 of 4 words are right, of the same length.

    A resample draws that item 0, 1 or 2 times (1/4, 1/2, 1/4): BLEU-1 is 1, 3/4 or 1/2 there, the difference 0 to -1/2.
    The mean of the per-item scores would give the same here, so lengths differ in the second pair.
    """
    gold = ["red cat", "blue dog"]
    first = [Example(f"c{i}", ex.image, "caption", text, (), (), "", 0) for i, (ex, text) in _pairs(gold)]
    evaluate(Says({"c0": "red cat", "c1": "blue dog"}), first, "bleu_1", tmp_path / "a", report=False, progress=False)
    evaluate(Says({"c0": "red cat", "c1": "blue hat"}), first, "bleu_1", tmp_path / "b", report=False, progress=False)
    one = diff.compare(tmp_path / "a", tmp_path / "b")["metrics"]["bleu_1"]
    assert one["difference"] == pytest.approx(-0.25, abs=1e-6)
    assert one["interval_95"] == pytest.approx([-0.5, 0.0], abs=1e-6)
    assert one["p"] == pytest.approx(2 * 0.25, abs=0.05)  # nothing changed in a quarter of the resamples

    long = ["red cat", "a b c d e f g h"]
    second = [Example(f"c{i}", ex.image, "caption", text, (), (), "", 0) for i, (ex, text) in _pairs(long)]
    for name, said in (("c", "red cat"), ("d", "red hat")):
        answers = {"c0": said, "c1": "a b c d e f g h"}
        evaluate(Says(answers), second, "bleu_1", tmp_path / name, report=False, progress=False)
    one = diff.compare(tmp_path / "c", tmp_path / "d")["metrics"]["bleu_1"]
    assert one["difference"] == pytest.approx(-0.1, abs=1e-6)  # 9 of 10 words, not the mean of 1/2 and 1
    assert one["interval_95"] == pytest.approx([-0.5, 0.0], abs=1e-6) and "corpus score" in one["method"]


def _pairs(texts: Sequence[str]) -> Any:
    return enumerate(zip(examples_of(["red", "blue"]), texts, strict=True))


def test_cider_says_that_it_is_an_approximation(tmp_path: Path) -> None:
    a = results(tmp_path / "a", {"e1": "mauve"}, metrics="cider")
    one = diff.compare(a, results(tmp_path / "b", {}, metrics="cider"))["metrics"]["cider"]
    assert "document frequencies stay those of all items, an approximation" in one["method"]
    assert one["interval_95"] is not None and one["difference"] > 0


def test_a_metric_that_is_no_mean_is_computed_anew(tmp_path: Path) -> None:
    """The share of distinct answers: A has four different ones, B the same four times.

    Of 256 equally likely draws of 4 items 4, 84, 144 and 24 hold 1, 2, 3 and 4 different items, so B - A is 0, -1/4,
    -1/2 and -3/4 with 1.6, 32.8, 56.3 and 9.4 %: the interval is -3/4 to -1/4, and p twice 1.6 %.
    """
    from vlm.eval.metrics import MetricResult, register
    from vlm.eval.metrics.registry import _METRICS

    @register("distinct_answers", summary="test", reads="references")
    def distinct(predictions: Any, references: Any) -> MetricResult:
        value = len(set(predictions.values())) / len(predictions)
        return MetricResult("distinct_answers", value, dict.fromkeys(references, 0.0), "rule", "1", None)

    try:
        a = results(tmp_path / "a", {}, metrics="distinct_answers")
        b = results(tmp_path / "b", dict.fromkeys(["e0", "e1", "e2", "e3"], "x"), metrics="distinct_answers")
        one = diff.compare(a, b)["metrics"]["distinct_answers"]
    finally:
        del _METRICS["distinct_answers"]
    assert one["difference"] == -0.75 and one["interval_95"] == [-0.75, -0.25]
    assert one["p"] == pytest.approx(2 * 4 / 256, abs=0.015)
    assert "scored anew" in one["method"]


def test_an_unanswered_item_stays_wrong_in_every_resample(tmp_path: Path) -> None:
    """A could decode no image but one, whose answer is wrong; B is right: the F1 is 0 against 1 on every draw."""
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"torn")
    good = [replace(example, suffix="yes") for example in examples_of(list(COLOURS))]
    bad = [good[0], *(replace(example, image=torn) for example in good[1:])]
    for out, examples, said in (("a", bad, "no"), ("b", good, "yes")):
        says = Says(dict.fromkeys((example.id for example in good), said))
        evaluate(says, examples, "pope_f1", tmp_path / out, report=False, progress=False)
    one = diff.compare(tmp_path / "a", tmp_path / "b")["metrics"]["pope_f1"]
    assert (one["a"], one["b"], one["interval_95"]) == (0.0, 1.0, [1.0, 1.0])


def test_nothing_changed(tmp_path: Path) -> None:
    """BLEU is the corpus score of every resample even where the items' scores happen to have its mean, as here."""
    a = results(tmp_path / "a", {}, metrics="bleu_1")
    found = diff.compare(a, a)
    assert diff.table(found).endswith("\n0 of 4 items changed")
    assert found["metrics"]["bleu_1"]["method"].endswith("corpus score of every resample")


def test_groups_are_resampled_inside_themselves() -> None:
    """Group x has one item with d = 1, y three with d = 0: every resample keeps that, so the mean of means is 1/2.

    Drawn together, the item would sometimes be drawn not at all.
    """
    change = np.array([0.0, 1.0, 0.0, 0.0])
    strata = [np.array([1]), np.array([0, 2, 3])]
    interval, p = paired.bootstrap(lambda draws: change[draws].mean(axis=1), strata, 500)
    assert interval == [0.5, 0.5] and p == pytest.approx(2 / 501)


def test_other_items_are_refused_and_listed(tmp_path: Path) -> None:
    a, b = results(tmp_path / "a", {}, count=4), results(tmp_path / "b", {}, count=6)
    with pytest.raises(DataError, match=r"2 items are only in .*b: e4, e5"):
        diff.compare(a, b)
    other = [replace(example, suffix="teal") for example in examples_of(list(COLOURS))]
    evaluate(Says({}), other, "exact_match", tmp_path / "c", report=False, progress=False)
    with pytest.raises(DataError, match="4 items have other gold texts: e0, e1, e2, e3"):
        diff.compare(a, tmp_path / "c")
    with pytest.raises(ConfigError, match=r"results.json is missing; give a folder that `vlm eval` has written"):
        diff.compare(a, tmp_path / "none")


def test_metrics_of_one_side_and_of_other_rules_are_left_out(tmp_path: Path) -> None:
    a = results(tmp_path / "a", {}, metrics="exact_match,bleu_1")
    b = results(tmp_path / "b", {}, metrics="exact_match")
    found = diff.compare(a, b)
    assert list(found["metrics"]) == ["exact_match"] and found["left_out"] == {"bleu_1": "only one of the two has it"}
    path = b / "results.json"
    path.write_text(path.read_text().replace('"rule": "', '"rule": "another '))
    with pytest.raises(ConfigError, match="exact_match: the two were computed by different rules"):
        diff.compare(a, b)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = results(tmp_path / "a", {"e1": "mauve"}), results(tmp_path / "b", {"e2": "puce"})
    assert main(["eval", "diff", str(a), str(b), "--html", str(tmp_path / "d.html")]) == 0
    shown = capsys.readouterr().out
    assert "exact_match  0.7500  0.7500  +0.0000" in shown and "2 of 4 items changed" in shown
    assert "e1: better (+1.000): 'mauve' -> 'green'" in shown and "e2: worse (-1.000): 'blue' -> 'puce'" in shown
    page = (tmp_path / "d.html").read_text()
    assert "better 1" in page and "worse 1" in page and "A: mauve" in page
    assert main(["eval", "diff", str(a), str(b), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["changed"]) == 2
    assert main(["eval", "diff", str(a), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_in_place_of_a_folder_gets_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = results(tmp_path / "a", {}), tmp_path / "notes.txt"
    other.write_text("x")
    for name in ("results.json", "items.jsonl"):
        with pytest.raises(ConfigError, match=rf"{name} is a file; give its folder, {folder}$"):
            diff.compare(folder, folder / name)
    with pytest.raises(ConfigError, match="notes.txt is a file; give a folder that `vlm eval` has written"):
        diff.pairs(other, folder)
    assert main(["eval", "diff", str(folder / "results.json"), str(folder)]) == 2
    assert capsys.readouterr().err.strip().endswith(f"results.json is a file; give its folder, {folder}")
