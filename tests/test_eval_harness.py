"""The harness with a predictor that answers from the picture: resume, bad images, controls, results on disk."""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.examples import Example
from vlm.errors import ConfigError, DataError
from vlm.eval import evaluate, items, table
from vlm.eval.metrics import official
from vlm.generation.decoding import Decoding
from vlm.generation.predictions import PREDICTIONS, SETTINGS, PredictionStore

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class ColourPredictor:
    """Says the colour of the picture; a stand-in for a model that is right about everything it sees."""

    background = (255, 255, 255)

    def __init__(self, version: int = 1, stop_after: int | None = None) -> None:
        self.version, self.stop_after = version, stop_after
        self.batches: list[list[str]] = []

    def identity(self) -> dict[str, Any]:
        return {"version": self.version}

    def predict(
        self, images: Sequence[Image.Image], prompts: Sequence[str], *, ids: Sequence[str], decoding: Decoding
    ) -> list[str]:
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(list(ids))
        names = {colour: name for name, colour in COLOURS.items()}
        return [names[image.getpixel((0, 0))] for image in images]  # type: ignore[index]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """20 questions about 10 pictures in a JSONL file; prompts of several lengths."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(20):
        name = list(COLOURS)[i // 2 % 4]
        Image.new("RGB", (8, 8), COLOURS[name]).save(folder / f"{i // 2}.png")
        prompt = "answer en what colour is it?" if i % 2 else "answer en which colour does the picture have?"
        lines.append(json.dumps({"id": f"q{i}", "image": f"{i // 2}.png", "prefix": prompt, "suffix": name}))
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "test.jsonl"


def examples_of(colours: Sequence[str]) -> list[Example]:
    return [
        Example(f"e{i}", Image.new("RGB", (4, 4), COLOURS[c]), "what?", c, (), (), "", 0) for i, c in enumerate(colours)
    ]


def as_picture(example: Example) -> Image.Image:
    assert isinstance(example.image, Image.Image)
    return example.image


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_best_constant_answer_stands_beside_the_score(data: Path, tmp_path: Path) -> None:
    """Twenty questions, six of them about red pictures and six about green ones."""
    results = evaluate(ColourPredictor(), data, "exact_match,rouge_l", tmp_path / "out", progress=False)
    assert results["metrics"]["exact_match"]["best_constant"] == {"answer": "red", "value": 0.3}
    assert results["metrics"]["rouge_l"]["best_constant"] is None
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    head, _, line, other = table(results).splitlines()[:4]
    assert "best constant" in head and '0.3000 ("red")' in line and '("' not in other
    page = (tmp_path / "out" / "report.html").read_text()
    assert "best constant answer" in page and "what &quot;red&quot; for every item would score" in page
    assert "best constant" not in table(evaluate(ColourPredictor(), data, "rouge_l", tmp_path / "two", progress=False))


def test_one_image_alone_has_its_reason_in_the_table(data: Path, tmp_path: Path) -> None:
    results = evaluate(ColourPredictor(), data, "cider", tmp_path / "out", limit=1, progress=False)
    assert "cider: CIDEr is 0 here whatever the captions say" in table(results)


def test_results_predictions_and_page_are_written(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = evaluate(ColourPredictor(), data, "exact_match,bleu", out, batch_size=3, progress=False)
    assert results == json.loads((out / "results.json").read_text())
    assert list(results["metrics"]) == ["exact_match", "bleu_1", "bleu_2", "bleu_3", "bleu_4"]
    assert results["metrics"]["exact_match"]["value"] == 1.0 and results["metrics"]["exact_match"]["num_items"] == 20
    assert results["skipped"] == 0 and results["failures"] == []
    assert results["by_kind"]["exact_match"] == {
        "answer: what colour": {"mean": 1.0, "num_items": 10},
        "answer: which colour": {"mean": 1.0, "num_items": 10},
    }
    assert {record["id"] for record in lines_of(out / PREDICTIONS)} == {f"q{i}" for i in range(20)}
    written = lines_of(out / "items.jsonl")
    assert [item["id"] for item in written] == [f"q{i}" for i in range(20)]  # the order of the data, not of prediction
    assert written[3]["scores"]["exact_match"] == 1.0 and written[3]["suffix"] == "green"
    page = (out / "report.html").read_text()
    assert page.count('data-mark="right"') == 20 and "answer: which colour" in page
    assert "exact_match" in table(results) and "1.0000" in table(results)


def test_batches_do_not_change_results(data: Path, tmp_path: Path) -> None:
    values = []
    for size in (1, 3, 20):
        evaluate(ColourPredictor(), data, "exact_match", tmp_path / str(size), batch_size=size, progress=False)
        values.append(lines_of(tmp_path / str(size) / "items.jsonl"))
    assert values[0] == values[1] == values[2]


def test_interrupted_run_goes_on_with_the_same_batches(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(ColourPredictor(stop_after=2), data, "exact_match", out, batch_size=6, progress=False)
    assert len(lines_of(out / PREDICTIONS)) == 12
    second, whole = ColourPredictor(), ColourPredictor()
    results = evaluate(second, data, "exact_match", out, batch_size=6, progress=False)
    evaluate(whole, data, "exact_match", tmp_path / "whole", batch_size=6, progress=False)
    assert second.batches == whole.batches[2:]
    assert results["run"]["resumed_items"] == 12
    assert lines_of(out / PREDICTIONS) == lines_of(tmp_path / "whole" / PREDICTIONS)
    evaluate(third := ColourPredictor(), data, "exact_match", out, progress=False)
    assert third.batches == []  # all there: scored again, nothing predicted


def test_torn_last_line_is_cut_and_predicted_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(ColourPredictor(), data, "exact_match", out, batch_size=4, progress=False)
    complete = (out / PREDICTIONS).read_bytes()
    (out / PREDICTIONS).write_bytes(complete[:-9])
    again = ColourPredictor()
    evaluate(again, data, "exact_match", out, batch_size=4, progress=False)
    assert len(again.batches) == 1 and len(again.batches[0]) == 4  # its whole batch, so that its numbers are the same
    assert (out / PREDICTIONS).read_bytes() == complete


class TellingPredictor(ColourPredictor):
    """Reports every batch through a pipe before it answers."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self.pipe = pipe

    def predict(
        self, images: Sequence[Image.Image], prompts: Sequence[str], *, ids: Sequence[str], decoding: Decoding
    ) -> list[str]:
        os.write(self.pipe, b".")
        time.sleep(0.005)
        return super().predict(images, prompts, ids=ids, decoding=decoding)


def run_and_kill(data: Path, out: Path, num_batches: int, delay: float) -> None:
    """Evaluate in a forked process and send it SIGKILL `delay` seconds after it began batch `num_batches`."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            evaluate(TellingPredictor(write_end), data, "exact_match", out, batch_size=2, report=False, progress=False)
        finally:
            os._exit(0)
    os.close(write_end)
    for _ in range(num_batches):
        assert os.read(read_end, 1) == b"."
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read_end)


def test_killed_process_loses_nothing_and_repeats_nothing(data: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", 0
    for num_batches, delay in ((1, 0.0), (2, 0.003), (1, 0.006), (3, 0.001)):
        run_and_kill(data, out, num_batches, delay)
        now = (out / PREDICTIONS).read_bytes().count(b"\n")
        assert kept <= now < 20
        kept = now
    assert kept >= 2
    evaluate(ColourPredictor(), data, "exact_match", out, batch_size=2, progress=False)
    evaluate(ColourPredictor(), data, "exact_match", tmp_path / "whole", batch_size=2, progress=False)
    assert (out / PREDICTIONS).read_bytes() == (tmp_path / "whole" / PREDICTIONS).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 5}, "decoding.max_new_tokens: there 64, now 5"),
        ({"limit": 7}, r"other items, prompts, images or number of items \(data_sha256\)"),
        ({"shuffle_images": True}, "images_shuffled_with_seed: there null, now 0"),
        ({"model": ColourPredictor(version=2)}, "model.version: there 1, now 2"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": ColourPredictor(), "data": data, "metrics": "exact_match", "progress": False}
    evaluate(**settings, out=tmp_path / "out")
    before = (tmp_path / "out" / PREDICTIONS).read_bytes()
    with pytest.raises(ConfigError, match=message):
        evaluate(**{**settings, **change}, out=tmp_path / "out")
    assert (tmp_path / "out" / PREDICTIONS).read_bytes() == before


def test_corrected_references_only_score_again(data: Path, tmp_path: Path) -> None:
    evaluate(ColourPredictor(), data, "exact_match", tmp_path / "out", progress=False)
    data.write_text(data.read_text().replace('"suffix": "red"', '"suffix": "crimson"'))
    results = evaluate(again := ColourPredictor(), data, "exact_match", tmp_path / "out", progress=False)
    assert again.batches == [] and results["metrics"]["exact_match"]["value"] == pytest.approx(14 / 20)


def test_bad_image_counts_as_wrong_and_is_listed(data: Path, tmp_path: Path) -> None:
    (data.parent / "0.png").write_bytes(b"not a picture")
    results = evaluate(ColourPredictor(), data, "exact_match", tmp_path / "out", batch_size=4, progress=False)
    assert results["metrics"]["exact_match"]["value"] == pytest.approx(18 / 20)
    assert results["num_items"] == 20 and results["skipped"] == 2 and results["num_empty_predictions"] == 2
    assert [failure["id"] for failure in results["failures"]] == ["q0", "q1"]
    assert "2 items count as wrong, because an image could not be decoded" in table(results)
    again = ColourPredictor()
    evaluate(again, data, "exact_match", tmp_path / "out", batch_size=4, progress=False)
    assert again.batches == []  # a failure is a record too; it is not tried for ever


def test_only_bad_images_is_an_error(data: Path, tmp_path: Path) -> None:
    for path in data.parent.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 20 images could be decoded"):
        evaluate(ColourPredictor(), data, "exact_match", tmp_path / "out", progress=False)


def test_shuffled_images_lose_the_right_answers(data: Path, tmp_path: Path) -> None:
    """Pictures of 4 colours: a model that looks falls from 100 % when it is shown the wrong picture."""
    results = evaluate(ColourPredictor(), data, "exact_match", tmp_path / "o", shuffle_images=True, progress=False)
    assert results["metrics"]["exact_match"]["value"] < 0.6
    assert "control" in table(results)


@pytest.mark.parametrize("seed", range(5))
def test_nobody_keeps_the_own_image(seed: int) -> None:
    names = ["a.png"] * 4 + ["b.png"] * 3 + ["c.png"] + ["d.png"] * 2
    original = [Example(str(i), Path("x") / name, "", "", (), (), "", 0) for i, name in enumerate(names)]
    shuffled = items.shuffle_images(original, seed)
    assert [replace(new, image=old.image) for new, old in zip(shuffled, original, strict=True)] == original
    assert sorted(str(example.image) for example in shuffled) == sorted(str(example.image) for example in original)
    assert all(new.image != old.image for new, old in zip(shuffled, original, strict=True))
    assert shuffled == items.shuffle_images(original, seed)
    assert shuffled != items.shuffle_images(original, seed + 1)


def test_equal_pictures_in_memory_count_as_one_image() -> None:
    shuffled = items.shuffle_images(examples_of(["red", "red", "blue", "blue"]), 0)
    assert [as_picture(example).getpixel((0, 0)) for example in shuffled] == [
        COLOURS[c] for c in ("blue", "blue", "red", "red")
    ]
    with pytest.raises(DataError, match="3 of 4 items have the image"):
        items.shuffle_images(examples_of(["red", "red", "red", "blue"]), 0)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        ("vqa_accuracy", DataError, "each question needs at least 4 answers"),
        ("multiple_choice", DataError, "20 of 20 items have no 'choices'"),
        ("meteor", ConfigError, "no Java here"),
    ],
)
def test_what_a_metric_refuses_is_refused_before_anything_is_predicted(
    metric: str, error: type[Exception], message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(official, "missing", lambda: "there is no Java here")
    predictor = ColourPredictor()
    with pytest.raises(error, match=message):
        evaluate(predictor, data, f"exact_match,{metric}", tmp_path / "out", progress=False)
    assert predictor.batches == [] and not (tmp_path / "out").exists()


def test_items_without_gold_and_repeated_ids_are_refused(tmp_path: Path) -> None:
    one, two = examples_of(["red", "blue"])
    with pytest.raises(DataError, match=r"1 items have nothing to be compared with: :0 \(e1\)"):
        evaluate(ColourPredictor(), [one, replace(two, suffix=None)], "exact_match", tmp_path / "o", progress=False)
    with pytest.raises(DataError, match="more than once: e0"):
        evaluate(ColourPredictor(), [one, replace(two, id="e0")], "exact_match", tmp_path / "o", progress=False)
    with pytest.raises(DataError, match="holds no items"):
        evaluate(ColourPredictor(), [], "exact_match", tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()


def test_numbers_and_names_are_checked_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        evaluate("no/model/here", "none.jsonl", "exact_match", tmp_path / "o", batch_size=0)
    with pytest.raises(ConfigError, match="unknown metric 'exact'"):
        evaluate("no/model/here", "none.jsonl", "exact", tmp_path / "o")


def test_metrics_read_their_own_field() -> None:
    example = Example("1", Path("x"), "", "suffix", ("reference",), ("answer",) * 10, "", 0)
    assert items.gold_texts(example, "references") == ("reference",)
    assert items.gold_texts(example, "answers") == ("answer",) * 10
    assert items.gold_texts(replace(example, references=(), answers=()), "answers") == ("suffix",)


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [
        ("caption en", "caption"),
        ("answer en What colour is the cat?", "answer: what colour"),
        ("answer en", "answer: en"),
        ("how many dogs?", "how many"),
        ("", "(empty prompt)"),
    ],
)
def test_kind_of_a_prompt(prefix: str, kind: str) -> None:
    assert items.prompt_kind(prefix) == kind


def test_store_keeps_any_text(tmp_path: Path) -> None:
    texts = ["two\nlines", "\u2028", "lone \ud800 surrogate", "日本語", '"\\', "\x00"]
    with PredictionStore(tmp_path, {}) as store:
        store.append({"id": str(i), "prediction": text} for i, text in enumerate(texts))
    with PredictionStore(tmp_path, {}) as store:
        assert [store.records[str(i)]["prediction"] for i in range(len(texts))] == texts


def test_store_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="out is a file; results are written into a folder"):
        PredictionStore(tmp_path / "out", {})


def test_store_refuses_a_second_writer_and_damage(tmp_path: Path) -> None:
    with PredictionStore(tmp_path, {}) as store:
        store.append([{"id": "1", "prediction": "a"}])
        with pytest.raises(ConfigError, match="another evaluation is writing"):
            PredictionStore(tmp_path, {})
    path = tmp_path / PREDICTIONS
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match=":2: id '1' occurs twice"):
        PredictionStore(tmp_path, {})
    path.write_bytes(b'{"id": 1}\n')
    with pytest.raises(DataError, match=":1: expected an object"):
        PredictionStore(tmp_path, {})
    path.write_bytes(b'{"id": "1", "prediction": "a"}\n')
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(ConfigError, match="is missing"):
        PredictionStore(tmp_path, {})
