"""What `vlm classify` is made of: templates, classes as vectors and their cache, calibration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_zero_shot import write

from vlm.errors import ConfigError, DataError
from vlm.siglip.calibration import BINS, COLDEST, WARMEST, calibrate, expected_calibration_error, fit, quality
from vlm.siglip.class_cache import ClassCache, default_folder, worth_keeping
from vlm.siglip.classes import class_embeddings
from vlm.siglip.labels import check_texts, read_labels
from vlm.siglip.loading import load
from vlm.siglip.rules import canonicalize
from vlm.siglip.templates import BEST, OPENAI, TEMPLATES, given, named, prompts

# --- templates


def test_the_81_templates_are_clips_80_and_the_bare_name() -> None:
    """The digest is that of big_vision's `CLIP_PAPER_PROMPT_TEMPLATES`, joined by newlines."""
    import hashlib

    texts = TEMPLATES["imagenet"].texts
    assert (len(texts), len(set(texts)), texts[:80], texts[80]) == (81, 81, OPENAI, "{}")
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert digest == "617764ae37ca494aff67b36e2f3b3919d44fd3eeb5b4dba56f207ad6723c3d05"
    assert set(BEST) < set(OPENAI) and len(BEST) == 7
    assert TEMPLATES["none"].texts == ("{}",) and TEMPLATES["photo"].texts == ("This is a photo of {}.",)


def test_prompts() -> None:
    assert prompts(["Red Cat"], given(["A {label}!", "{}"])) == [("A Red Cat!", "Red Cat")]
    (texts,) = prompts(["St._Bernard"], named("imagenet"))
    assert texts[20] == "a closeup photo of a st bernard" == canonicalize(OPENAI[20].replace("{}", "St._Bernard"))


def test_templates_without_the_place_of_the_class_are_refused() -> None:
    for texts in (["a photo"], ["{} and {}"], []):
        with pytest.raises(ConfigError, match="exactly once"):
            given(texts)
    with pytest.raises(ConfigError, match="did you mean 'imagenet'"):
        named("imagenets")


# --- labels


def test_label_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = tmp_path / "labels.txt"
    lines.write_bytes("\ufeffcat\r\n\n  red   dog \ncat\n".encode())
    assert read_labels(lines) == ["cat", "red dog"]
    assert "count once: cat" in caplog.text
    (tmp_path / "labels.json").write_text('["a, b", "c"]')
    assert read_labels(tmp_path / "labels.json") == ["a, b", "c"]


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "no labels"), (b"[1]", "one label a line"), (b'{"a": 1}', "object"), (b"\xff", "UTF-8")]
)
def test_files_that_hold_no_labels(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_labels(tmp_path / "labels")


def test_labels_that_are_one_text_are_told(caplog: pytest.LogCaptureFixture) -> None:
    check_texts(["Cat", "dog", "cat!"], [("Cat",), ("dog",), ("cat!",)], canonicalize)
    assert "cannot tell them apart: 'Cat', 'cat!'" in caplog.text
    caplog.clear()
    check_texts(["Cat", "cat!"], [("Cat",), ("cat!",)], str.lower)
    assert not caplog.text
    with pytest.raises(DataError, match="'!!' is empty"):
        check_texts(["!!"], [("!!",)], canonicalize)


# --- the cache


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("towers")
    write(folder, "siglip")
    return load(folder)


class Counting:
    """A model that counts the texts it embeds."""

    def __init__(self, model: Any) -> None:
        self.model, self.count = model, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.count += len(input_ids)
        embedded: torch.Tensor = self.model.encode_text(input_ids)
        return embedded

    @property
    def training(self) -> bool:
        return False

    def modules(self) -> Any:
        return self.model.modules()


GROUPS = prompts(["red cat", "blue dog " * 9, "tree"], given(["{}", "a photo of a {}."]))


def test_what_is_kept_comes_back_to_the_last_bit(
    towers: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = Counting(towers[0]), towers[1]
    wanted = class_embeddings(model, processor, GROUPS)
    assert (wanted.norm(dim=-1) - 1).abs().max() < 1e-6
    first = class_embeddings(model, processor, GROUPS, cache=ClassCache(tmp_path / "c", lambda: {"weights": "1"}))
    assert model.count == 12 and torch.equal(first, wanted)
    caplog.clear()
    done: list[int] = []
    again = ClassCache(tmp_path / "c", lambda: {"weights": "1"})
    assert torch.equal(class_embeddings(model, processor, GROUPS, cache=again, advance=done.append), wanted)
    assert model.count == 12 and sum(done) == 6
    assert "longer than the 12 tokens that the model reads, read without their end: 3 (" in caplog.text
    other = ClassCache(tmp_path / "c", lambda: {"weights": "2"})
    class_embeddings(model, processor, GROUPS, cache=other)
    class_embeddings(model, processor, GROUPS[:2], cache=again)
    assert model.count == 12 + 6 + 4


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "folder"])
def test_a_damaged_file_is_made_anew(harm: str, towers: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = towers
    cache = ClassCache(tmp_path, lambda: {})
    wanted = class_embeddings(model, processor, GROUPS, cache=cache)
    path = cache.path(GROUPS)
    data = path.read_bytes()
    if harm == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": data[:-3], "bit": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "empty": b""}[harm])
    assert cache.get(GROUPS, model.embedding_size) is None
    assert torch.equal(class_embeddings(model, processor, GROUPS, cache=cache), wanted)
    if harm != "folder":
        found = cache.get(GROUPS, model.embedding_size)
        assert found is not None and torch.equal(found[0], wanted)


def test_a_disk_that_takes_nothing_is_told_once(
    towers: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = ClassCache(tmp_path / "file" / "c", lambda: {})
    for _ in range(2):
        assert class_embeddings(*towers, GROUPS, cache=cache).shape == (3, 32)
    assert caplog.text.count("are not kept") == 1


def test_the_oldest_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.siglip.class_cache.MOST_FILES", 2)
    cache = ClassCache(tmp_path, lambda: {})
    rows = torch.ones(1, 4)
    for number, name in enumerate("abc"):
        cache.put([(name,)], rows, [])
        os.utime(cache.path([(name,)]), (number, number))
        if name == "b":
            assert cache.get([("a",)], 4) is not None  # used just now
    assert [cache.get([(name,)], 4) is not None for name in "abc"] == [True, False, True]


def test_where_it_lies_and_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/vlm/classes")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder() == Path("/home/me/.cache/vlm/classes")
    assert not worth_keeping(2, torch.device("cpu")) and worth_keeping(81_000, torch.device("cuda"))


# --- calibration


def scores(num_images: int = 60, num_labels: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are too sure of themselves and too low, with one label each."""
    drawn = np.random.default_rng(0)
    truth = np.zeros((num_images, num_labels), dtype=bool)
    truth[np.arange(num_images), drawn.integers(num_labels, size=num_images)] = True
    return (3 * drawn.standard_normal(truth.shape) + 6 * truth - 11).astype(np.float32), truth


@pytest.mark.parametrize("several", [False, True])
def test_the_fit_is_logistic_regression(several: bool) -> None:
    """Whose likelihood is greatest where chances and labels have the same sum, and the same sum weighted by the
    logits. Several labels an image, or none, are pairs like any."""
    logits, truth = scores()
    if several:
        truth |= np.random.default_rng(1).random(truth.shape) < 0.2
        truth[0] = False
    found = fit(logits, truth, "sigmoid")
    assert not found.bounded
    chances = 1 / (1 + np.exp(-found.logits(logits.astype(np.float64))))
    assert (chances - truth).sum() == pytest.approx(0, abs=1e-9)
    assert ((chances - truth) * logits).sum() == pytest.approx(0, abs=1e-8)
    linear_model = pytest.importorskip("sklearn.linear_model")
    pairs = logits.reshape(-1, 1).astype(np.float64)
    theirs = linear_model.LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(pairs, truth.ravel())
    assert found.temperature == pytest.approx(1 / theirs.coef_[0, 0], rel=1e-6)
    assert found.bias == pytest.approx(theirs.intercept_[0], rel=1e-6)


def test_the_temperature_of_a_softmax_is_the_best_of_a_grid() -> None:
    logits, truth = scores()
    found = fit(logits, truth, "softmax")
    grid = np.arange(1, 3, 0.001)
    losses = [quality(logits / one, truth, "softmax").nll for one in grid]
    assert abs(found.temperature - grid[int(np.argmin(losses))]) <= 0.001
    assert found.bias == 0 and not found.bounded


def test_expected_calibration_error_by_hand() -> None:
    """Four bins: 0.25 is in the first, 0.26 in the second, 0 and 1 in the outer ones."""
    confidence = np.array([0.0, 0.25, 0.26, 0.4, 0.9, 1.0, 1.0, 0.8])
    right = np.array([0, 1, 0, 1, 1, 1, 0, 1], dtype=bool)
    bins = [abs(1 - 0.25), abs(1 - 0.66), 0, abs(3 - 3.7)]  # each bin's |number right - sum of confidences|
    assert expected_calibration_error(confidence, right, bins=4) == pytest.approx(sum(bins) / 8)
    assert BINS == 15


def test_quality_by_hand() -> None:
    logits = np.array([[0.0, np.log(3)], [np.log(3), -np.log(3)]])  # 0.5, 0.75; 0.75, 0.25
    truth = np.array([[False, True], [False, False]])
    found = quality(logits, truth, "sigmoid")
    assert found.nll == pytest.approx(-np.mean(np.log([0.5, 0.75, 0.25, 0.75])))
    assert found.ece_top == pytest.approx(abs(1 - 1.5) / 2)
    assert found.ece_pairs == pytest.approx((0.5 + abs(1 - 1.5) + 0.25) / 4)
    softmax = quality(logits, np.array([[False, True], [True, False]]), "softmax")  # 0.25, 0.75; 0.9, 0.1
    assert softmax.nll == pytest.approx(-np.mean(np.log([0.75, 0.9])))


@pytest.mark.parametrize("objective", ["sigmoid", "softmax"])
def test_what_is_said_of_it_comes_from_images_that_it_has_not_seen(objective: Any) -> None:
    logits, truth = scores(40)
    report = calibrate(logits, truth, objective)
    assert report == calibrate(logits, truth, objective)
    assert (report.folds, report.num_images, report.num_labels, report.num_positive) == (5, 40, 5, 40)
    assert report.before == quality(logits, truth, objective)
    assert report.in_sample.nll < report.after.nll < report.before.nll
    assert report.after.ece_top < report.before.ece_top


def test_order_stays() -> None:
    logits, truth = scores()
    found = fit(logits, truth, "sigmoid")
    assert (found.logits(logits).argsort(1) == logits.argsort(1)).all()
    tensor = found.logits(torch.from_numpy(logits))
    assert np.allclose(tensor.numpy(), found.logits(logits), atol=1e-5)


def test_a_perfect_separation_is_bounded_and_said() -> None:
    logits = np.array([[5.0, -5.0], [-4.0, 4.0], [6.0, -3.0]])
    for objective in ("sigmoid", "softmax"):
        found = fit(logits, logits > 0, objective)
        assert found.temperature == COLDEST and "without an error" in found.bounded
    shifted = fit(logits - 20, logits > 0, "sigmoid")
    assert ((shifted.logits(logits - 20) > 0) == (logits > 0)).all()


def test_scores_that_say_nothing_are_bounded_and_said() -> None:
    logits, truth = scores()
    for objective in ("sigmoid", "softmax"):
        assert fit(-logits, truth, objective).temperature == WARMEST
        same = fit(np.zeros_like(logits), truth, objective)
        assert same.temperature == WARMEST and "say nothing" in same.bounded
    alone = fit(np.zeros_like(logits), truth, "sigmoid")  # the bias is still the share of labels that belong
    assert 1 / (1 + np.exp(-alone.bias)) == pytest.approx(truth.mean())


@pytest.mark.parametrize("kind", [True, False])
def test_pairs_of_one_kind_are_refused(kind: bool) -> None:
    with pytest.raises(DataError, match="a calibration needs images that have a label"):
        fit(np.ones((3, 2)), np.full((3, 2), kind), "sigmoid")


def test_softmax_wants_one_label_an_image_and_all_want_numbers() -> None:
    with pytest.raises(DataError, match="exactly one label"):
        fit(np.ones((2, 2)), np.array([[True, True], [True, False]]), "softmax")
    with pytest.raises(DataError, match="NaN"):
        fit(np.array([[np.nan, 1]]), np.array([[True, False]]), "sigmoid")


def test_too_few_images_to_deal() -> None:
    logits, truth = scores(2)
    truth[:] = [[True] + [False] * 4, [False] * 5]
    report = calibrate(logits, truth, "sigmoid")
    assert report.folds == 0 and report.after == report.in_sample
