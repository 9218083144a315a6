"""big_vision's beam search against the rule written with lists and an uncached model, and against all sequences."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from coretools import Case, each_case, lay_out, logits, loud, picture, sample, shake
from torch import Tensor
from transformers import GenerationConfig

import vlm
from vlm.build.presets import tiny, tiny_decoder
from vlm.encoders import siglip
from vlm.errors import GenerationError
from vlm.generation import beam
from vlm.generation.decoding import Decoding
from vlm.generation.text import generate_ids, generation_config
from vlm.model.batch import Batch
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM

# Prompts of 9, 15 and 6 tokens: some windows are 8.
PROMPTS = [[sample(5, 0, 1)], [sample(11, 0, 2)], [sample(6, 0, 3, image=False)]]
SHARPEN = 20.0
Scored = tuple[float, list[int]]


def next_log_probs(model: VLM, batch: dict[str, Tensor], new: list[int]) -> Tensor:
    """float64[V] after the prompt and `new`, by running the whole sequence."""
    ones = torch.ones(1, len(new), dtype=torch.int64)
    longer = {
        "input_ids": torch.cat([batch["input_ids"], torch.tensor([new], dtype=torch.int64)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], ones], 1),
        "token_type_ids": torch.cat([batch["token_type_ids"], ones], 1),
    }
    if "pixel_values" in batch:
        longer["pixel_values"] = batch["pixel_values"]
    return logits(model, longer)[0, -1].double().log_softmax(-1)


def by_lists(model: VLM, batch: dict[str, Tensor], beams: int, limit: int, eos: int) -> Scored:
    """The rule without a cache, without stopping early, one sample at a time."""
    live: list[Scored] = [(0.0, [])]
    finished: list[Scored] = []
    for _ in range(limit):
        grown: list[Scored] = []
        for score, new in live:
            after = (score + next_log_probs(model, batch, new)).tolist()
            finished.append((after[eos], [*new, eos]))
            grown += [
                (value, [*new, token])
                for token, value in enumerate(after)
                if token not in (eos, model.config.image_token_id)
            ]
        live = sorted(grown, key=lambda pair: -pair[0])[:beams]
    return max(finished, key=lambda pair: pair[0])


def search(model: VLM, batch: dict[str, Tensor], beams: int, limit: int, eos: int) -> list[Scored]:
    with torch.inference_mode():
        new, scores = beam.beam_search(
            model,
            as_batch(batch),
            num_beams=beams,
            max_new_tokens=limit,
            eos=eos,
            pad=0,
            suppress=[int(model.config.image_token_id or 0)],
        )
    rows = [row[: row.index(eos) + 1] for row in new.tolist()]
    assert [row[len(kept) :] for row, kept in zip(new.tolist(), rows, strict=True)] == [
        [0] * (new.shape[1] - len(kept)) for kept in rows
    ]
    assert max(map(len, rows)) == new.shape[1] <= limit
    return list(zip(scores.tolist(), rows, strict=True))


def as_batch(batch: dict[str, Any]) -> Batch:
    return Batch(**batch)


def peaked(case: Case) -> VLM:
    """A model whose likeliest tokens have most of the probability, so that ending at once does not always win."""
    model = copy.deepcopy(case.model()[0])
    with torch.no_grad():
        model.model.language_model.norm.weight.add_(SHARPEN)
    return model


@each_case
@pytest.mark.parametrize("beams", [2, 3])
def test_it_is_the_rule_written_with_lists(case: Case, beams: int) -> None:
    """Left-padded batch, cache reordered, windows of 8; EOS is a token that the greedy answer of one row meets."""
    model = peaked(case)
    alone = [lay_out(model, [row]) for row in PROMPTS]
    lengths: set[int] = set()
    for eos in (1, answer(model, alone[1])[2]):
        found = search(model, lay_out(model, PROMPTS, "left"), beams, 5, eos)
        wanted = [by_lists(model, batch, beams, 5, eos) for batch in alone]
        assert [row for _, row in found] == [row for _, row in wanted]
        assert torch.allclose(torch.tensor([s for s, _ in found]), torch.tensor([s for s, _ in wanted]), atol=1e-3)
        lengths |= {len(row) for _, row in found}
    assert len(lengths) > 1 and max(lengths) > 2, lengths


def answer(model: VLM, batch: dict[str, Tensor]) -> list[int]:
    """Greedy, 3 tokens."""
    new: list[int] = []
    for _ in range(3):
        scores = next_log_probs(model, batch, new)
        scores[model.config.image_token_id] = -torch.inf
        new.append(int(scores.argmax()))
    return new


def few_words(seed: int = 0) -> VLM:
    """A model with a vocabulary of 7: EOS is 1, the placeholder 6."""
    text = tiny_decoder("gemma", vocab_size=7, pad_token_id=0)
    torch.manual_seed(seed)
    model = VLM(VLMConfig(vision_config=siglip.tiny(), text_config=text, image_token_id=6)).eval()
    shake(model, seed=seed)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_best_of_all_sequences(seed: int) -> None:
    """Up to 2 tokens, 5 beams keep every beginning; beyond, no answer beats the best of all."""
    model = few_words(seed)
    ids = torch.tensor([[6, 6, 6, 6, 2, 3, 4]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    batch |= {"position_ids": torch.arange(7)[None], "pixel_values": torch.rand(1, 3, 28, 28)}
    every: dict[int, Scored] = {}
    for length in range(4):
        for new in itertools.product((0, 2, 3, 4, 5), repeat=length):
            score = sum(float(next_log_probs(model, batch, list(new[:i]))[new[i]]) for i in range(length))
            score += float(next_log_probs(model, batch, list(new))[1])
            every[length + 1] = max(every.get(length + 1, (-1e9, [])), (score, [*new, 1]))
    for limit in (1, 2):
        best = max(every[length] for length in range(1, limit + 1))
        assert search(model, batch, 5, limit, 1)[0][1] == best[1]
    best = max(every.values())
    assert search(model, batch, 5, 4, 1)[0][0] <= best[0] + 1e-5
    assert search(model, batch, 2, 4, 1)[0][0] <= best[0] + 1e-5


def test_ending_is_offered_to_every_beam() -> None:
    """EOS third likeliest and two beams: transformers' beams never see it, this rule ends with it."""
    beams = beam.Beams.start(1, 3, pad=0)
    table = torch.tensor([0.0, 0.1, 0.3, 0.2, 0.2, 0.2]).log()
    beams, parents = beam.advance(beams, table[None, None], 2, eos=1)
    assert beams.tokens.tolist() == [[[2], [3]]] and parents.tolist() == [[0, 0]]
    assert beams.best.tolist() == [[1, 0, 0]] and float(beams.best_scores) == pytest.approx(float(table[1]))
    sure = torch.tensor([0.0, 0.9, 0.02, 0.04, 0.02, 0.02]).log()
    beams, parents = beam.advance(beams, torch.stack([table, sure])[None], 2, eos=1)
    assert beams.best.tolist() == [[3, 1, 0]] and float(beams.best_scores.exp()) == pytest.approx(0.18)
    assert beams.tokens.tolist() == [[[2, 2], [2, 3]]] and parents.tolist() == [[0, 0]] and beams.done()


def test_equal_scores_go_to_the_lower_number() -> None:
    """As in the original's top-k: the earlier finished sequence, then the lower beam and token."""
    beams = beam.Beams.start(1, 3, pad=0)
    even = torch.full((1, 1, 400), 1 / 400).log()
    beams, _ = beam.advance(beams, even, 3, eos=1)
    assert beams.tokens.flatten().tolist() == [0, 2, 3]
    certain = torch.full((1, 3, 400), -torch.inf)
    certain[..., 1] = 0.0
    beams, _ = beam.advance(beams, certain, 3, eos=1)
    assert beams.best.tolist() == [[1, 0, 0]]  # [0, 1], [2, 1] and [3, 1] are as likely, but later


def test_suppression_leaves_the_other_scores() -> None:
    """The placeholder keeps its share of the probability, and is an ordinary token when nothing is suppressed."""
    model = few_words(3)
    ids = torch.tensor([[2, 3, 4, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    batch["position_ids"] = torch.arange(4)[None]
    with torch.no_grad():  # the placeholder is the likeliest continuation, then EOS
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1][0, -1]
        model.lm_head.weight[6] = hidden / hidden.norm() ** 2 * 8
        model.lm_head.weight[1] = hidden / hidden.norm() ** 2 * 5
    first = next_log_probs(model, batch, [])
    assert first.topk(2).indices.tolist() == [6, 1] and first[1] < -2
    with torch.inference_mode():
        held, scores = beam.beam_search(
            model, as_batch(batch), num_beams=3, max_new_tokens=4, eos=1, pad=0, suppress=[6]
        )
        free, _ = beam.beam_search(model, as_batch(batch), num_beams=3, max_new_tokens=4, eos=1, pad=0)
    assert held.tolist() == [[1]] and float(scores) == pytest.approx(float(first[1]), abs=1e-4)
    assert free[0, 0] == 6 and free[0, -1] == 1


@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
def test_text_of_a_batch_equals_text_one_by_one(encoder: str) -> None:
    """Through `vlm.generate`: mixed prompts, several images a sample, any batch size; and the rule is not the other."""
    model, processor = loud(encoder, "gemma3_text", "sdpa", sliding_window=8)
    images = [[picture(1, (70, 40)), picture(2, (20, 20))], [picture(3, (30, 90))], [picture(4, (50, 50))]]
    prompts = ["caption en", "answer en what color is the square?", "no"]
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "beam_search": "big_vision"}
    whole = vlm.generate(model, processor, images, prompts, **options)
    assert whole == [
        vlm.generate(model, processor, [i], [t], **options)[0] for i, t in zip(images, prompts, strict=True)
    ]
    assert whole == vlm.generate(model, processor, images, prompts, batch_size=2, **options)
    assert whole != vlm.generate(model, processor, images, prompts, max_new_tokens=8, num_beams=3)


def test_one_beam_is_greedy() -> None:
    model, processor = loud("siglip", "gemma")
    args: Any = model, processor, picture(1), "caption en"
    assert vlm.generate(*args, beam_search="big_vision", max_new_tokens=5) == vlm.generate(*args, max_new_tokens=5)


def test_the_mode_of_the_model_survives() -> None:
    model, processor = tiny()
    model.train()
    vlm.generate(model, processor, picture(1), "no", max_new_tokens=2, num_beams=2, beam_search="big_vision")
    assert all(module.training for module in model.modules())


def test_bad_settings() -> None:
    model, processor = loud("siglip", "gemma")
    for options, message in (
        ({"beam_search": "bigvision"}, "unknown beam_search 'bigvision'.*did you mean 'big_vision'"),
        ({"beam_search": "big_vision", "do_sample": True}, "do_sample=True: it is a search"),
        ({"beam_search": "big_vision", "num_beams": 2, "length_penalty": 0.5}, "never normalises by length"),
        ({"beam_search": "big_vision", "num_beams": 10_000}, "num_beams=10000 needs more tokens than the"),
    ):
        with pytest.raises(GenerationError, match=message):
            vlm.generate(model, processor, picture(1), "no", **options)
    batch = processor([picture(1)], ["no"])
    config: GenerationConfig = generation_config(processor, Decoding(max_new_tokens=2, num_beams=2))
    config.eos_token_id = [1, 5]
    with pytest.raises(GenerationError, match=r"one eos_token_id and max_new_tokens, got eos_token_id=\[1, 5\]"):
        generate_ids(model, batch, config, beam_search="big_vision")


def test_settings_of_another_search_are_refused() -> None:
    model, processor = loud("siglip", "gemma")
    batch = processor([picture(1)], ["no"])
    for name, value in (("repetition_penalty", 2.0), ("num_return_sequences", 2), ("min_new_tokens", 2)):
        config: GenerationConfig = generation_config(processor, Decoding(max_new_tokens=2, num_beams=2))
        setattr(config, name, value)
        with pytest.raises(GenerationError, match=f"does not read {name}={value}"):
            generate_ids(model, batch, config, beam_search="big_vision")
    assert generate_ids(model, batch, config).shape == (1, 2)
