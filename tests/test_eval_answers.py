"""The VQA-family metrics: cases worked by hand, and what must not matter."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from vlm.errors import DataError
from vlm.eval import metrics
from vlm.eval.metrics import boxes, chartqa, choices, pope, registry, tallyqa, textvqa, vizwiz, vqa

# --- Worked by hand ---------------------------------------------------------------------------------------------------


def one(name: str, prediction: str, *answers: str, **info: Any) -> metrics.MetricResult:
    return metrics.compute(name, {"q": prediction}, {"q": answers}, {"q": info})


def test_two_of_ten_answers() -> None:
    answers = ["cat"] * 2 + ["dog"] * 8
    for name, expected in [("okvqa", 0.6), ("okvqa_paligemma", 2 / 3), ("aokvqa_da", 2 / 3), ("textvqa", 0.6)]:
        assert one(name, "cat", *answers).value == pytest.approx(expected), name


def test_unanimous_answers_are_not_normalised_except_by_textvqa() -> None:
    assert one("vqa_accuracy", "Yes", *["yes"] * 10).value == 0
    assert one("vqa_accuracy_paligemma", "Yes", *["yes"] * 10).value == 0
    assert one("textvqa_paligemma", "Yes", *["yes"] * 10).value == 0
    assert one("textvqa", "Yes", *["yes"] * 10).value == 1


def test_the_cap_of_32_full_stops_is_official_and_not_big_visions() -> None:
    answers = ["." * 40] * 5 + ["x"] * 5
    assert vqa.normalize("." * 40) == "." * 8
    assert vqa.accuracy("." * 8, answers) == 0  # eight dots are removed from the prediction, 32 from the answers
    assert vqa.normalize_big_vision("." * 40) == ""
    assert vqa.accuracy_big_vision("", answers) == 1
    assert vqa.accuracy("", answers) == 0


def test_digits_are_ascii_in_the_official_script_only() -> None:
    assert vqa.normalize("x.\u0663") == "x\u0663"
    assert vqa.normalize_big_vision("x.\u0663") == "x.\u0663"
    assert textvqa.normalize("x.\u0663") == "x.\u0663"


def test_commas_in_the_three_normalisers() -> None:
    assert (vqa.normalize("one,two"), textvqa.normalize("one,two"), vizwiz.normalize("one,two")) == (
        "1 2",
        "onetwo",
        "1 2",
    )
    assert textvqa.normalize("The dog's, 1,000?") == "dog 's 1000"


def test_vizwiz_normalises_the_prediction_only() -> None:
    assert vizwiz.accuracy("two", ["two"] * 10) == 0
    assert vizwiz.accuracy("2", ["two"] * 10) == 0
    assert vizwiz.accuracy("Two.", ["2"] * 10) == 1
    assert vizwiz.normalize("dont") == "don`t"
    assert vizwiz.normalize("weve") == "we've"  # one of the eight that kept their apostrophe
    assert vizwiz.normalize("couldn'tve") == "couldn`t`ve"
    assert vizwiz.normalize("somebody'd") == "somebody'd"


def test_vizwiz_unanswerable_is_average_precision() -> None:
    """4 of 10 unanswerable, 5 said so, 3 rightly: AP = 3/4 * 3/5 + 1/4 * 4/10 = 0.55, F1 = 6/9."""
    said = [True] * 5 + [False] * 5
    gold = [True] * 3 + [False] * 2 + [True] + [False] * 4
    assert vizwiz.unanswerability(said, gold) == pytest.approx((0.55, 6 / 9))
    assert vizwiz.unanswerability([False] * 10, gold) == pytest.approx((0.4, 0))
    assert vizwiz.unanswerability(said, [False] * 10) == (0, 0)
    answers = {str(i): ("unanswerable",) * 10 for i in range(10)}
    texts = {str(i): "Unanswerable" if claim else "a dog" for i, claim in enumerate(said)}
    info = {str(i): {"answerable": int(not unknown)} for i, unknown in enumerate(gold)}
    details = metrics.compute("vizwiz", texts, answers, info).details
    assert details == pytest.approx({"unanswerable_ap": 0.55, "unanswerable_f1": 6 / 9})
    with pytest.raises(DataError, match="'answerable' of item '0' must be 0 or 1, got 2"):
        metrics.compute("vizwiz", texts, answers, info | {"0": {"answerable": 2}})


@pytest.mark.parametrize(
    ("prediction", "answer", "rrc", "stvqa", "google"),
    [
        ("abc", "abcdef", 0.5, 0.5, 0),  # exactly half
        ("x" + " " * 10, "xy", 10 / 11, 0.5, 0),  # outer blanks lengthen the denominator, or the text
        ("a  b", "a b", 1, 0.75, 0.75),  # runs of blanks
        ("", "", 1, 1, 1),
        ("", "paris", 0, 0, 0),
        ("PARIS", "paris", 1, 1, 1),
        ("stra\u00dfe", "strase", 1 - 1 / 7, 1 - 1 / 6, 1 - 1 / 6),  # RRC: length of "STRASSE"
    ],
)
def test_anls_by_hand(prediction: str, answer: str, rrc: float, stvqa: float, google: float) -> None:
    assert one("anls", prediction, answer).value == pytest.approx(rrc)
    assert one("stvqa_anls", prediction, answer).value == pytest.approx(stvqa)
    assert one("anls_paligemma", prediction, answer).value == pytest.approx(google)


def test_anls_takes_the_best_answer() -> None:
    assert one("anls", "Paris, France", "london", "paris", "paris france").value == pytest.approx(1 - 1 / 13)


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("9.5", "10", True),
        ("10.51", "10", False),
        ("50", "50%", False),
        ("0.5", "50%", True),
        ("1,000", "1000", False),
        ("0.0", "0", False),
        ("0", "0", True),
        ("nan", "nan", False),
        ("1_000", "1e3", True),
        (" 10 ", "10", True),
        (" Yes", "yes", False),
        ("YES", "yes", True),
        ("-10", "10", False),
        ("50%%", "0.5", True),
        ("\u0661\u0660", "10", True),
    ],
)
def test_chartqa_by_hand(prediction: str, target: str, right: bool) -> None:
    assert chartqa.relaxed_match(prediction, target) is right


def test_chartqa_parts() -> None:
    said = {"a": "10", "b": "x", "c": "20", "d": "y"}
    gold = {"a": ("10.1",), "b": ("y",), "c": ("1", "20"), "d": ("y",)}
    info = {"a": {"split": "human"}, "b": {"split": "human"}, "c": {"split": "human"}, "d": {"split": "augmented"}}
    result = metrics.compute("chartqa", said, gold, info)
    assert result.value == 0.75
    assert result.details == pytest.approx({"augmented": 1, "human": 2 / 3, "mean_of_parts": 5 / 6})


@pytest.mark.parametrize("text", ["NO", "No!", "No\n", "doesn't", "Nope", "", "I see. No", "there isn't"])
def test_pope_reads_much_as_yes(text: str) -> None:
    assert pope.answer(text) == "yes"


@pytest.mark.parametrize("text", ["no", "No, there is none", "It is not there.", "I do,no. Yes no", "no."])
def test_pope_reads_no(text: str) -> None:
    assert pope.answer(text) == ("yes" if text == "I do,no. Yes no" else "no")  # "do,no" becomes the word "dono"


def test_pope_of_unanswered_items() -> None:
    """As a file, empty answers are yes; where an item was never answered, it is wrong and no yes."""
    said, gold = {"a": "", "b": "", "c": "yes"}, {"a": ("yes",), "b": ("no",), "c": ("yes",)}
    assert metrics.compute("pope", said, gold).per_item == {"a": 1, "b": 0, "c": 1}
    info = {key: {"answered": key == "c"} for key in said}
    result = metrics.compute("pope", said, gold, info)
    assert result.per_item == {"a": 0, "b": 0, "c": 1}
    assert (result.details["precision"], result.details["recall"], result.details["yes_ratio"]) == (1, 1 / 2, 1 / 3)
    with pytest.raises(DataError, match="have no 'answered'"):
        metrics.compute("pope", said, gold, {"a": {"answered": False}})


def test_pope_never_divides_by_zero() -> None:
    nothing = {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert pope.scores(["no", "no"], ["yes", "no"]) == nothing
    result = metrics.compute("pope_f1", {"a": "no", "b": "no"}, {"a": ("yes",), "b": ("no",)})
    assert (result.value, result.interval) == (0, (0, 0))
    empty = metrics.compute("pope", {"a": " ", "b": ""}, {"a": ("yes",), "b": ("no",)})
    assert (empty.value, empty.details["num_empty"], empty.details["yes_ratio"]) == (0.5, 2, 1)
    all_no = metrics.compute("pope", {"a": "no", "b": "yes"}, {"a": ("no",), "b": ("no",)})
    assert all_no.details["recall"] == 0 and all_no.details["f1"] == 0
    with pytest.raises(DataError, match="pope needs the labels yes and no; 1 of 1 are others, 'a': 'maybe' first"):
        metrics.compute("pope", {"a": "no"}, {"a": ("maybe",)})


def test_pope_splits() -> None:
    said = {"a": "yes", "b": "yes", "c": "no", "d": "yes"}
    gold = {"a": ("yes",), "b": ("no",), "c": ("no",), "d": ("yes",)}
    info = {key: {"split": "random" if key in "ab" else "popular"} for key in said}
    details = metrics.compute("pope", said, gold, info).details
    assert details["random/precision"] == 0.5 and details["random/yes_ratio"] == 1.0 and details["random/recall"] == 1
    assert details["popular/accuracy"] == 1 and details["popular/f1"] == 1 and details["f1"] == pytest.approx(0.8)


def test_tallyqa_readings() -> None:
    assert [tallyqa.count(text) for text in (" 3.", "Three", "none", "3 dogs", "", "-3", "21", "3.5")] == [
        *(3, 3, 0, None, None, -3, 21, None)
    ]
    said = {"a": "three", "b": "5", "c": "lots", "d": "2."}
    gold = {"a": ("3",), "b": ("3",), "c": ("4",), "d": ("2",)}
    info = {key: {"split": "simple" if key in "ab" else "complex"} for key in said}
    result = metrics.compute("tallyqa", said, gold, info)
    assert result.per_item == {"a": 1, "b": 0, "c": 0, "d": 1}
    expected = {"simple": 0.5, "complex": 0.5, "num_not_a_number": 1, "rmse_of_numbers": (4 / 3) ** 0.5}
    assert result.details == pytest.approx(expected)
    assert metrics.compute("tallyqa_paligemma", said, gold, info).per_item == {"a": 1, "b": 0, "c": 0, "d": 0}
    with pytest.raises(DataError, match="gold answer of item 'q' is 'many'"):
        one("tallyqa", "3", "many")


ANIMALS = ["dog", "cat", "bird", "fish"]


def test_science_qa_counts_what_it_cannot_read() -> None:
    said = {"a": "The answer is B.", "b": "B", "c": "The answer is Bat.", "d": "The answer is B. The answer is C."}
    gold = dict.fromkeys(said, ("cat",))
    info = dict.fromkeys(said, {"choices": ANIMALS})
    result = metrics.compute("scienceqa", said, gold, info)
    assert result.per_item == {"a": 1, "b": 0, "c": 1, "d": 0}
    assert result.details == pytest.approx({"num_unparsed": 2, "official_value_on_average": (2 + 2 / 4) / 4})
    assert metrics.compute("scienceqa_llava", said, gold, info).per_item == {"a": 1, "b": 1, "c": 1, "d": 0}
    assert metrics.compute("scienceqa_paligemma", said, gold, info).per_item == {"a": 1, "b": 0, "c": 0, "d": 1}


def test_nobody_guesses_for_an_item_that_was_not_answered() -> None:
    """Both cannot be read; the official script would guess one of four choices for the first alone."""
    said, gold = {"a": "", "b": ""}, {"a": ("cat",), "b": ("cat",)}
    info = {key: {"choices": ANIMALS, "answered": key == "a"} for key in said}
    for name in ("scienceqa", "mmmu"):
        result = metrics.compute(name, said, gold, info)
        assert result.value == 0 and result.details["official_value_on_average"] == 1 / 4 / 2


def test_science_qa_knows_five_letters() -> None:
    assert choices.science_qa("The answer is E.", 6) == 4
    assert choices.science_qa("The answer is F.", 6) == choices.FAILED


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        ("(B)", 1),
        ("A or (C) or (B).", 1),  # the last one in brackets
        ("A B C", 2),  # the middle " B " and the ends, blanks are added around
        ("B.", 1),
        ("b", -1),
        ("cat", -1),  # a text counts in longer predictions only
        ("I am sure that it must be a CAT", 1),
        ("the dog and the cat are both here", 1),
        ("I do not know at all, sorry about that", -1),
        ("", -1),
    ],
)
def test_mmmu_reading(prediction: str, index: int) -> None:
    assert choices.mmmu(prediction, ANIMALS) == index


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        *(("cat", 1), (" Cat. ", 1), ("B", 1), ("b.", 1), ("(b)", 1), ("B) cat", 1), ("B: the cat", 1)),
        *(("E", -1), ("A cat", -1), ("", -1), ("Bird", 2), ("bear", -1), ("B or C", -1)),
    ],
)
def test_our_own_reading_of_choices(prediction: str, index: int) -> None:
    assert choices.by_name(prediction, ANIMALS) == index


def test_a_choice_that_looks_like_a_letter_is_a_text_first() -> None:
    assert choices.by_name("B", ["C", "B", "A"]) == 1
    assert choices.by_name("a", ["x", "A", "a"]) == choices.FAILED  # two texts fit


def test_the_right_choice() -> None:
    for gold in ("cat", "B", "The answer is B."):
        assert one("multiple_choice", "b", gold, choices=ANIMALS).value == 1, gold
    assert one("multiple_choice", "b", "whatever", choices=ANIMALS, answer_index=1).value == 1
    with pytest.raises(DataError, match="gold answer 'cow' of item 'q' is none of its choices: dog, cat"):
        one("multiple_choice", "b", "cow", choices=ANIMALS)
    for texts in (["B", "B"], ["B", "A"]):
        with pytest.raises(DataError, match="gold answer 'B' of item 'q' fits several choices; give 'answer_index'"):
            one("multiple_choice", "b", "B", choices=texts)
    assert one("multiple_choice", "b", "B", choices=["A", "B"]).value == 1
    with pytest.raises(DataError, match="'answer_index' of item 'q' is 4, and it has 4 choices"):
        one("multiple_choice", "b", "cat", choices=ANIMALS, answer_index=4)
    with pytest.raises(DataError, match="1 of 1 items have no 'choices': 'q'"):
        one("scienceqa", "b", "cat")


def test_aokvqa_choice_that_is_none_is_wrong_and_counted() -> None:
    said, gold = {"a": "cat", "b": "Cat"}, {"a": ("cat",), "b": ("cat",)}
    result = metrics.compute("aokvqa_mc", said, gold, dict.fromkeys(said, {"choices": ANIMALS}))
    assert (result.value, result.details) == (0.5, {"num_not_a_choice": 1})


def test_equality_benchmarks_clean_nothing() -> None:
    for name in ("gqa", "ocrvqa", "ai2d", "aokvqa_mc"):
        assert [one(name, text, "left").value for text in ("left", "Left", " left", "left.")] == [1, 0, 0, 0], name
    with pytest.raises(DataError, match="gqa compares with one gold text; item 'q' has 2: left, right"):
        one("gqa", "left", "left", "right")


def test_gqa_kinds_of_questions() -> None:
    said = {"a": "yes", "b": "red", "c": "left"}
    gold = {"a": ("yes",), "b": ("blue",), "c": ("left",)}
    info = {"a": {"structural": "verify"}, "b": {"structural": "query"}, "c": {"structural": "choose"}}
    details = metrics.compute("gqa", said, gold, info).details
    assert details == {"choose": 1, "query": 0, "verify": 1, "binary": 1, "open": 0}


def test_nlvr2_consistency() -> None:
    """Pairs 0 and 1 of sentence 0 of set 7, and one pair of sentence 1: the last part counts, the third does not."""
    said = {"dev-7-0-0": "True", "dev-7-1-0": "false", "dev-7-0-1": "yes", "dev-8-0-1": "TRUE"}
    gold = {"dev-7-0-0": ("True",), "dev-7-1-0": ("False",), "dev-7-0-1": ("True",), "dev-8-0-1": ("True",)}
    result = metrics.compute("nlvr2", said, gold)
    assert result.value == 0.75
    assert result.details == pytest.approx({"num_not_true_or_false": 1, "consistency": 2 / 3})
    assert "consistency" not in one("nlvr2", "True", "True").details
    with pytest.raises(DataError, match="labels True and False; that of item 'q' is 'yes'"):
        one("nlvr2", "True", "yes")


SEGMENTS = "".join(f"<seg{number:03d}>" for number in range(112, 128))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "<loc0001><loc0002><loc0003>",
        "<loc0001><loc0002><loc0003><loc1024>",  # not a token
        "<loc0100><loc0100><loc0100><loc0200>",  # no height
        "<loc0200><loc0100><loc0100><loc0200>",  # upside down
        "<loc12><loc0100><loc0200><loc0300>",
        "<loc0001><loc0002> and <loc0003><loc0004>",
    ],
)
def test_texts_without_a_box(text: str) -> None:
    assert boxes.loc_to_box(text) is None


def test_refcoco_boxes_in_pixels_and_in_tokens() -> None:
    said = "<loc0000><loc0000><loc1023><loc0512> cat"  # the left half of the image, a little more
    pixels = one("refcoco", said, "", box=[0, 0, 100, 50], image_size=[200, 50])
    assert pixels.details["mean_box_iou"] == pytest.approx((100 / 200) / (512 / 1023))
    assert one("refcoco", said, "<loc0000><loc0000><loc1023><loc1023>").value == 1  # 512/1023 is a hit
    third = one("refcoco", "<loc0000><loc0000><loc1023><loc0511>", "<loc0000><loc0000><loc1023><loc1023>")
    assert (third.value, third.details["num_invalid"]) == (0, 0)
    missed = one("refcoco", "no idea", "<loc0000><loc0000><loc1023><loc1023>")
    assert (missed.value, missed.details["num_invalid"]) == (0, 1)
    with pytest.raises(DataError, match="item 'q' has no gold box"):
        one("refcoco", said, "the left half")
    with pytest.raises(DataError, match="'box' in pixels but no 'image_size'"):
        one("refcoco", said, "", box=[0, 0, 100, 50])
    with pytest.raises(DataError, match="'box' of item 'q' must be 4 numbers"):
        one("refcoco", said, "", box=[0, 0, 100], image_size=[1, 1])


def test_paligemmas_segmentation_answers_need_all_twenty_tokens() -> None:
    box = "<loc0100><loc0100><loc0900><loc0900>"
    assert len(SEGMENTS) == 16 * 8
    for text, right in [
        (box + SEGMENTS, 1),
        (box + SEGMENTS + " cat", 1),
        (box, 0),
        (box + SEGMENTS[:-8], 0),
        (" " + box + SEGMENTS, 0),
        (box + SEGMENTS.replace("127", "128"), 0),
    ]:
        assert one("refcoco_paligemma", text, box).value == right, text


# --- What must not matter ---------------------------------------------------------------------------------------------

TEN = ("cat", "cat", "a cat", "dog", "dog", "Two", "two dogs.", "2", "yes", "3.5")
WORDS = ("cat", "Cat", "dog.", "2", "two", "yes", "", "The answer is B.", "B", "<loc0001><loc0001><loc0500><loc0500>")
# metric -> gold texts and facts of every item, where ten answers would not do
GOLD: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    **dict.fromkeys(("exact_match", "exact_match_normalized", "gqa", "ocrvqa", "ai2d", "aokvqa_mc"), (("cat",), {})),
    **dict.fromkeys(("pope", "pope_f1", "pope_paligemma"), (("yes",), {"split": "random"})),
    **dict.fromkeys(("tallyqa", "tallyqa_paligemma"), (("2",), {"split": "simple"})),
    **dict.fromkeys(("scienceqa", "scienceqa_llava", "scienceqa_paligemma"), (("cat",), {"choices": ANIMALS})),
    **dict.fromkeys(("mmmu", "multiple_choice"), (("cat",), {"choices": ANIMALS, "subject": "zoology"})),
    "nlvr2": (("True",), {}),
    **dict.fromkeys(("refcoco", "refcoco_paligemma"), (("<loc0001><loc0001><loc0500><loc0500>",), {})),
}


# Not METEOR: it is a Java program that need not be there, and has no interval.
@pytest.mark.parametrize("name", [name for name in metrics.names() if name != "meteor"])
def test_every_metric_keeps_its_promises(name: str) -> None:
    gold, facts = GOLD.get(name, (TEN, {}))
    keys = [f"{i:03d}" for i in range(60)]
    rng = random.Random(1)
    said = {key: rng.choice(WORDS) for key in keys}
    references, info = dict.fromkeys(keys, gold), dict.fromkeys(keys, facts)
    result = metrics.compute(name, said, references, info)
    assert result.name == name and result.num_items == 60 and list(result.per_item) == keys
    assert len(result.rule) > 30 and result.version and result.normalizer != "described in the rule"
    assert result.interval is not None and result.interval[0] <= result.value <= result.interval[1] + 1e-12
    assert result.maximum is not None and all(0 <= score <= result.maximum for score in result.per_item.values())
    json.dumps(result.summary(), allow_nan=False)

    order = rng.sample(keys, len(keys))
    again = metrics.compute(name, said, {key: references[key] for key in order}, {key: info[key] for key in order})
    assert (again.value, again.interval) == (pytest.approx(result.value, abs=1e-12), result.interval)
    assert again.details == pytest.approx(result.details)

    empty = metrics.compute(name, dict.fromkeys(keys, ""), references, info)
    expected = 1 if name in ("pope", "pope_f1") else 0  # an empty answer is a yes to POPE
    assert empty.value == expected and empty.num_items == 60


@pytest.mark.parametrize("name", ["vqa_accuracy", "okvqa", "textvqa", "vizwiz", "aokvqa_da", "anls", "stvqa_anls"])
def test_the_order_of_answers_does_not_matter(name: str) -> None:
    rng = random.Random(2)
    for word in WORDS:
        shuffled = rng.sample(TEN, len(TEN))
        assert one(name, word, *TEN).value == pytest.approx(one(name, word, *shuffled).value, abs=1e-12)


@pytest.mark.parametrize("name", ["okvqa", "textvqa", "vizwiz", "textvqa_paligemma", "vqa_accuracy_paligemma"])
def test_soft_accuracies_refuse_too_few_answers(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} counts how many people.*'q' with 3"):
        one(name, "cat", "cat", "cat", "cat")


# --- What an answer that is the same for every item would score


def constant_of(name: str, golds: Sequence[tuple[str, ...]], **facts: Sequence[Any]) -> tuple[str, float]:
    references = {str(i): gold for i, gold in enumerate(golds)}
    info = {key: {fact: values[int(key)] for fact, values in facts.items()} for key in references}
    found = registry.best_constant(metrics.get(name), references, info)
    assert found is not None
    return found.answer, found.value


def test_the_best_constant_answer_by_hand() -> None:
    yes_no = [("yes",)] * 11 + [("no",)] * 9
    assert constant_of("exact_match", yes_no) == ("yes", 0.55)
    assert constant_of("pope", yes_no) == ("yes", 0.55)
    assert constant_of("pope_f1", yes_no) == ("yes", pytest.approx(22 / 31))  # 2 hits / (claims + positives)
    assert constant_of("chartqa", [("10",), ("10.4",), ("9.6",), ("7",)]) == ("10", 0.75)  # within 5 % of 9.6 and 10.4
    assert constant_of("tallyqa", [("2",), ("2",), ("0",)]) == ("2", pytest.approx(2 / 3))
    # Three of ten people are worth .9: left out in turn, 7 times min(1, 3/3) and 3 times 2/3.
    people = [("2",) * 3 + ("3",) * 7, ("2",) * 10]
    assert constant_of("okvqa", people) == ("2", pytest.approx((0.9 + 1) / 2))
    assert (
        constant_of("anls", [("aaaaaaaaab",)] * 2 + [("aaaaaaaaaa",), ("aaaaaaaaaa",), ("aaaaaaaaaa",)])[0] == "a" * 10
    )


def test_the_best_constant_of_choices_is_a_letter() -> None:
    golds = [("cat",), ("bird",), ("dog",), ("cow",)]
    choices_of = [["dog", "cat"], ["cat", "bird"], ["dog", "cat"], ["pig", "cow", "cat"]]
    for name, said in [
        ("multiple_choice", "B"),
        ("mmmu", "B"),
        ("scienceqa_llava", "B"),
        ("scienceqa", "The answer is B."),
        ("scienceqa_paligemma", "The answer is B."),
    ]:
        assert constant_of(name, golds, choices=choices_of) == (said, 0.75)


def test_the_best_constant_of_boxes_is_the_whole_image() -> None:
    large, small = (0.0, 0.0, 90.0, 90.0), (0.0, 0.0, 20.0, 20.0)
    boxes_of, sizes = [large, large, small], [(100, 100)] * 3
    found = constant_of("refcoco", [("x",)] * 3, box=list(map(list, boxes_of)), image_size=list(map(list, sizes)))
    assert found == ("<loc0000><loc0000><loc1023><loc1023>", pytest.approx(2 / 3))


def test_captions_have_no_constant_answer() -> None:
    for name in ("bleu_4", "rouge_l", "cider", "meteor"):
        assert registry.best_constant(metrics.get(name), {"1": ("a cat",)}) is None


def test_the_best_constant_of_many_items_is_scored_over_all() -> None:
    """Chosen among candidates on a part, but the value is that of every item; no interval is computed for it."""
    golds = [("yes",) if i % 9 < 5 else ("no",) for i in range(9000)]
    assert constant_of("exact_match", golds) == ("yes", pytest.approx(5 / 9))


def test_a_single_image_has_no_cider_and_the_reason_is_said() -> None:
    one_image = metrics.compute("cider", {"1": "a red cat"}, {"1": ("a red cat", "a cat")})
    assert one_image.value == 0 and "every weight is log(1) = 0" in one_image.notes[0]
    alike = metrics.compute("cider", {"1": "a cat", "2": "a cat"}, {"1": ("a cat",), "2": ("A cat.",)})
    assert alike.value == 0 and alike.notes == one_image.notes
    two = metrics.compute("cider", {"1": "a red cat", "2": "a dog"}, {"1": ("a red cat",), "2": ("a dog",)})
    assert two.value > 1 and two.notes == ()


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        *(("The answer is B.", 1), ("The answer is B", 1), ("the answer is (b).", 1), ("Answer: B because it is", 1)),
        *(("**Answer:** B", 1), ("The correct answer is: B) cat", 1), ("Option B is right", 1), ("[B]", 1)),
        *(("The answer is cat.", 1), ("The answer is a cat.", 1), ('Answer: "bird"', 2), ("B because it meows", 1)),
        *(
            ("B, as it meows", 1),
            ("B\n\nIt meows.", 1),
            ("Answer:\nB", 1),
            ("\\boxed{B}", 1),
            ("A because it barks", 0),
        ),
        *(("The answer is A.", 0), ("Answer: a cat", 1), ("The answer is Z.", -1), ("The answer is not B", -1)),
        *(("The answer is A. No, the answer is B.", -1), ("I think it is a cow", -1), ("an answer to a question", -1)),
    ],
)
def test_answers_that_state_a_choice(prediction: str, index: int) -> None:
    assert choices.by_name(prediction, ["dog", "cat", "bird"]) == index


def test_answers_that_cannot_be_read_are_counted_and_said() -> None:
    said = {"1": "The answer is B.", "2": "who knows", "3": "no idea"}
    info = {key: {"choices": ["dog", "cat"]} for key in said}
    result = metrics.compute("multiple_choice", said, dict.fromkeys(said, ("cat",)), info)
    assert result.value == pytest.approx(1 / 3) and result.details["num_unparsed"] == 2
    assert result.notes == ("2 of 3 answers could not be read as a choice and count as wrong",)
    assert result.summary()["notes"] == list(result.notes)
    assert metrics.compute("multiple_choice", {"1": "b"}, {"1": ("cat",)}, info).notes == ()
