"""Metrics against values of the official scorers, against hand-computed cases, and their refusals."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.errors import ConfigError, DataError
from vlm.eval import metrics
from vlm.eval.metrics import captions, exact, ptb, registry, vqa

DATA = Path(__file__).parent / "data"
VQA = json.loads((DATA / "golden_vqa.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("item", VQA["accuracy"], ids=lambda item: item["prediction"][:20])
def test_vqa_accuracy_equals_official_script(item: dict[str, Any]) -> None:
    assert vqa.accuracy(item["prediction"], item["answers"]) == pytest.approx(item["expected"], abs=1e-12)


@pytest.mark.parametrize(("text", "expected"), VQA["normalize"])
def test_vqa_normaliser_equals_official_script(text: str, expected: str) -> None:
    assert vqa.normalize(text) == expected


def test_vqa_unanimity_switches_normalisation_off() -> None:
    assert vqa.accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa.accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_vqa_steps_of_agreement() -> None:
    """n of 10 annotators agree: n are left out with n-1 others agreeing, 10-n with n others."""
    scores = [vqa.accuracy("red", ["red"] * n + ["blue", "green"] * 5) for n in (0,)]
    scores += [vqa.accuracy("red", ["red"] * n + ["blue"] * (10 - n)) for n in (1, 2, 3, 4, 9)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_vqa_refuses_questions_with_one_answer() -> None:
    with pytest.raises(DataError, match="'q7' with 1"):
        metrics.compute("vqa_accuracy", {"q7": "red"}, {"q7": ("red",)})


def test_vqa_contraction_table_has_the_size_of_the_official_one() -> None:
    """The official table has 120 keys: four start with a capital and never fire, two map a word to itself."""
    table = vqa.CONTRACTIONS
    assert len(table) == 114
    assert not [key for key, value in table.items() if key == value or key != key.lower()]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog's ball, isn't it?", "a dog 's ball is n't it"),
        ("A black-and-white cat (sleeping).", "a black-and-white cat -lrb- sleeping -rrb-"),
        ("They can't; we won't!", "they ca n't we wo n't"),
        ("His/her 3.5 m board costs 1,000 at 10:30...", "his/her 3.5 m board costs 1,000 at 10:30"),
        ("Mr. Smith on 8th Ave.", "mr. smith on 8th ave."),
        ("a cat\non a mat", "a cat on a mat"),
        ("It’s five o'clock", "it 's five o'clock"),
        ("", ""),
        (" ... ", ""),
    ],
)
def test_tokenizer(text: str, tokens: str) -> None:
    assert ptb.tokenize(text) == tokens


def _slow_lcs(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        for j, other in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_bit_parallel_lcs_equals_the_textbook_table() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(0, 90))] for _ in range(2))
        assert captions.longest_common_subsequence(a, b) == _slow_lcs(a, b)


def test_exact_match_is_strict_and_the_normalised_one_is_not() -> None:
    predictions = {"a": " red ", "b": "Red", "c": "two  dogs.", "d": ""}
    references = {"a": ("red",), "b": ("blue", "red"), "c": ("Two dogs",), "d": ("x",)}
    strict = metrics.compute("exact_match", predictions, references)
    loose = metrics.compute("exact_match_normalized", predictions, references)
    assert strict.per_item == {"a": 1, "b": 0, "c": 0, "d": 0}
    assert loose.per_item == {"a": 1, "b": 1, "c": 1, "d": 0}
    assert (strict.value, loose.value) == (0.25, 0.75)
    assert exact.normalize("  A Red\tcat. ") == "a red cat"


def test_the_denominator_never_shrinks() -> None:
    with pytest.raises(DataError, match="1 without a prediction: 'b'"):
        metrics.compute("exact_match", {"a": "x"}, {"a": ("x",), "b": ("y",)})
    with pytest.raises(DataError, match="1 predictions without references: 'z'"):
        metrics.compute("exact_match", {"a": "x", "z": "y"}, {"a": ("x",)})
    with pytest.raises(DataError, match="1 of 1 items have no reference"):
        metrics.compute("exact_match", {"a": "x"}, {"a": ()})
    with pytest.raises(DataError, match="nothing to score"):
        metrics.compute("exact_match", {}, {})


def test_texts_of_another_type_are_refused() -> None:
    with pytest.raises(DataError, match="tuple of texts"):
        metrics.compute("exact_match", {"a": "x"}, {"a": "x"})  # type: ignore[dict-item]
    with pytest.raises(DataError, match="must be a text, got 1"):
        metrics.compute("exact_match", {"a": 1}, {"a": ("1",)})  # type: ignore[dict-item]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'cidr' \(did you mean 'cider'\?\).*exact_match"):
        metrics.get("cidr")
    with pytest.raises(ConfigError, match="no metric was named"):
        metrics.expand(" , ")


def test_groups_and_repeats_are_spelled_out() -> None:
    assert [m.name for m in metrics.expand("bleu, cider,bleu_4")] == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider"]


def test_a_taken_name_cannot_be_registered_again() -> None:
    with pytest.raises(ValueError, match="'cider' exists already"):
        metrics.register("cider", summary="", reads="references")


def test_every_result_states_its_rule_and_its_denominator() -> None:
    """The caption metrics; the others are held to more in test_eval_answers.py."""
    predictions = {str(i): "a cat" for i in range(5)}
    references = {str(i): ("a cat", "a dog", "the cat", f"a cow {i}") for i in range(5)}
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"):
        result = metrics.compute(name, predictions, references)
        assert result.name == name and result.num_items == 5 and len(result.rule) > 30 and result.version
        assert result.interval is not None and result.interval[0] <= result.value <= result.interval[1] + 1e-12
        json.dumps(result.summary())


def test_bootstrap_interval_of_a_mean_has_the_width_theory_gives() -> None:
    scores = np.random.default_rng(1).random(2000)
    interval = metrics.bootstrap(scores)
    assert interval is not None
    low, high = interval
    expected = 2 * 1.96 * scores.std() / math.sqrt(len(scores))
    assert high - low == pytest.approx(expected, rel=0.1)
    assert low < scores.mean() < high
    assert metrics.bootstrap(scores) == (low, high)
    assert metrics.bootstrap(scores[:1]) is None


def test_intervals_do_not_depend_on_the_order_of_items() -> None:
    gold = {str(i): ("a red cat on a mat", "one cat") for i in range(40)}
    said = {key: "a red cat" if int(key) % 3 else "a blue dog on a mat" for key in gold}
    backwards = dict(reversed(gold.items()))
    for name in ("bleu_2", "rouge_l", "exact_match"):
        assert metrics.compute(name, said, gold).interval == metrics.compute(name, said, backwards).interval


@pytest.fixture
def informed() -> Iterator[None]:
    """A metric that needs one fact and uses another."""

    @metrics.register("length_share", summary="", reads="references", needs=("most",), uses=("split",))
    def length_share(
        predictions: metrics.Predictions, references: metrics.References, info: metrics.Info
    ) -> metrics.MetricResult:
        scores = {key: len(predictions[key]) / info[key]["most"] for key in references}
        splits = {str(facts["split"]): 1.0 for facts in info.values() if "split" in facts}
        value = sum(scores.values()) / len(scores)
        return metrics.MetricResult("length_share", value, scores, "", "1", None, details=splits)

    yield
    registry._METRICS.pop("length_share")


@pytest.mark.usefixtures("informed")
def test_a_metric_gets_the_facts_it_asks_for() -> None:
    said, gold = {"a": "xx", "b": ""}, {"a": ("y",), "b": ("y",)}
    info = {"a": {"most": 4, "split": "easy"}, "b": {"most": 1, "split": "hard"}, "c": {}}
    result = metrics.compute("length_share", said, gold, info)
    assert result.per_item == {"a": 0.5, "b": 0.0}
    assert result.summary()["details"] == {"easy": 1.0, "hard": 1.0}
    without = metrics.compute("length_share", said, gold, {"a": {"most": 4}, "b": {"most": 1}})
    assert without.details == {}
    assert metrics.compute("exact_match", said, gold, info).details == {}  # does not ask, is not told


@pytest.mark.usefixtures("informed")
def test_a_missing_fact_is_refused_with_the_items() -> None:
    said, gold = {"a": "xx", "b": ""}, {"a": ("y",), "b": ("y",)}
    with pytest.raises(DataError, match="1 of 2 items have no 'most': 'b'; length_share cannot do without it"):
        metrics.compute("length_share", said, gold, {"a": {"most": 4}})
    with pytest.raises(DataError, match="2 of 2 items have no 'most': 'a', 'b'"):
        metrics.compute("length_share", said, gold)
    with pytest.raises(DataError, match="1 of 2 items have no 'split': 'b'; give it to all items or to none"):
        metrics.compute("length_share", said, gold, {"a": {"most": 4, "split": "x"}, "b": {"most": 1}})
