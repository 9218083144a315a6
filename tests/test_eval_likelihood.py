"""Candidates are scored as a plain forward over the whole text scores them, one at a time."""

import math
from typing import Any

import pytest
import torch
from coretools import CASES, Case, each_case, loud, picture

from vlm.errors import ConfigError, DataError
from vlm.generation import choose, score_candidates
from vlm.model.forward import VLM, VLMModel
from vlm.model.loss import IGNORE
from vlm.model.processor import Processor

PROMPTS = ["answer en is the square red?", "answer en what is it?", "choose from: a \t b"]
CANDIDATES = [["yes", "no"], ["a red square", "blue", "a very long answer, with commas"], ["b"]]
PICTURES = [picture(1), picture(2, (20, 40)), picture(3)]


def alone(model: VLM, processor: Processor, image: Any, prompt: str, candidate: str) -> list[float]:
    """Log-probability of each token of the suffix, from one forward over image, prompt and candidate."""
    batch = processor([image], [prompt], [candidate])
    labels, batch.labels = batch.labels, None
    with torch.inference_mode():
        logits = model(**batch).logits.double().log_softmax(-1)
    assert labels is not None
    where = (labels[0] != IGNORE).nonzero()[:, 0].tolist()
    return [logits[0, position - 1, labels[0, position]].item() for position in where]


@each_case
def test_scores_are_those_of_a_plain_forward(case: Case) -> None:
    model, processor = case.model()
    scores = score_candidates(model, processor, PICTURES, PROMPTS, CANDIDATES)
    for image, prompt, texts, row in zip(PICTURES, PROMPTS, CANDIDATES, scores, strict=True):
        assert row == pytest.approx([sum(alone(model, processor, image, prompt, text)) for text in texts], abs=1e-5)
    assert len({round(value, 3) for row in scores for value in row}) == 6  # the model tells all of them apart


def test_naflex_and_several_images() -> None:
    model, processor = loud("siglip2_naflex", "gemma")
    pair = [picture(1, (30, 50)), picture(2, (64, 20))]
    scores = score_candidates(model, processor, [pair, [picture(3)]], PROMPTS[:2], [["True", "False"], ["True"]])
    expected = sum(alone(model, processor, pair, PROMPTS[0], "False"))
    assert scores[0][1] == pytest.approx(expected, abs=1e-5)


def test_text_only() -> None:
    model, processor = loud("siglip", "gemma")
    scores = score_candidates(model, processor, None, ["is it?"], [["yes", "no"]])
    assert len(scores[0]) == 2 and all(math.isfinite(value) and value < 0 for value in scores[0])


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=lambda c: c.decoder)
def test_the_batch_size_does_not_matter(case: Case) -> None:
    model, processor = case.model()
    reference = score_candidates(model, processor, PICTURES, PROMPTS, CANDIDATES, batch_size=1)
    for batch_size in (2, 3, 100):
        scores = score_candidates(model, processor, PICTURES, PROMPTS, CANDIDATES, batch_size=batch_size)
        for row, expected in zip(scores, reference, strict=True):
            assert row == pytest.approx(expected, abs=1e-5)


def test_an_item_passes_the_encoder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loud("siglip", "gemma")
    seen: list[int] = []
    encode = VLMModel.encode

    def counted(self: VLMModel, pixel_values: torch.Tensor, *rest: torch.Tensor) -> object:
        seen.append(len(pixel_values))
        return encode(self, pixel_values, *rest)

    monkeypatch.setattr(VLMModel, "encode", counted)
    score_candidates(model, processor, PICTURES, PROMPTS, CANDIDATES, batch_size=2)
    assert seen == [2, 1]


def test_normalizations() -> None:
    model, processor = loud("siglip", "gemma")
    texts = ["blue", "ein größeres Wort"]
    parts = [alone(model, processor, PICTURES[0], PROMPTS[0], text) for text in texts]

    def score(normalization: str) -> list[float]:
        return score_candidates(
            model,
            processor,
            PICTURES[:1],
            PROMPTS[:1],
            [texts],
            normalization=normalization,  # type: ignore[arg-type]
        )[0]

    assert score("token") == pytest.approx([sum(part) / len(part) for part in parts], abs=1e-5)
    # ö and ß are two bytes each; EOS is a token, but no byte.
    assert score("byte") == pytest.approx([sum(parts[0]) / 4, sum(parts[1]) / 19], abs=1e-5)


def test_the_soft_cap_is_that_of_generation() -> None:
    model, processor = loud("siglip", "gemma2", "eager", final_logit_softcapping=2.0)
    capped = score_candidates(model, processor, PICTURES[:1], PROMPTS[:1], CANDIDATES[:1])
    model.config.softcap_in_generation = False
    try:
        free = score_candidates(model, processor, PICTURES[:1], PROMPTS[:1], CANDIDATES[:1])
        assert free[0] == pytest.approx(
            [sum(alone(model, processor, PICTURES[0], PROMPTS[0], text)) for text in CANDIDATES[0]], abs=1e-5
        )
    finally:
        model.config.softcap_in_generation = True
    assert abs(free[0][0] - capped[0][0]) > 0.01
    assert capped[0] == pytest.approx(
        [sum(alone(model, processor, PICTURES[0], PROMPTS[0], text)) for text in CANDIDATES[0]], abs=1e-5
    )


def test_training_mode_comes_back() -> None:
    model, processor = loud("siglip", "gemma")
    model.train()
    try:
        model.model.vision_tower.eval()
        score_candidates(model, processor, PICTURES[:1], PROMPTS[:1], CANDIDATES[:1])
        assert model.model.language_model.training and not model.model.vision_tower.training
    finally:
        model.eval()


def test_the_first_of_equal_candidates_is_chosen() -> None:
    assert choose([["a", "b", "c"], ["x"]], [[-2.0, -1.0, -1.0], [-5.0]]) == ["b", "x"]


@pytest.mark.parametrize(
    ("candidates", "scores", "message"),
    [
        ([["a"]], [], "scores of 0 items for candidates of 1"),
        ([["a", "b"]], [[-1.0]], "item 0: 1 scores for 2 candidates"),
        ([["a", "b"]], [[-1.0, math.nan]], "a score is NaN"),
    ],
)
def test_scores_that_cannot_be_compared(candidates: list[list[str]], scores: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose(candidates, scores)


def test_refusals() -> None:
    model, processor = loud("siglip", "gemma")

    def score(candidates: list, **settings: object) -> None:
        score_candidates(model, processor, PICTURES[:1], PROMPTS[:1], candidates, **settings)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"unknown normalization 'tokens' \(did you mean 'token'\?\)"):
        score([["a"]], normalization="tokens")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        score([["a"]], batch_size=0)
    with pytest.raises(DataError, match="item '0': expected a list of candidates to choose from, got \\[\\]"):
        score([[]])
    with pytest.raises(DataError, match="item 'q7': expected a list of candidates to choose from, got 'yes'"):
        score(["yes"], ids=["q7"])
    with pytest.raises(DataError, match="each prompt needs one list of candidates.*'candidates': 2"):
        score([["a"], ["b"]])
