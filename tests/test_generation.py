"""Generation against a reference loop without a cache: prompts longer than the sliding windows, left-padded batches of
different prefix lengths, dynamic and static caches, beams."""

from __future__ import annotations

import ast
import copy
import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import Case, each_case, lay_out, logits, loud, picture, sample, shake
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

import vlm
from vlm.build.presets import tiny
from vlm.errors import DataError, GenerationError
from vlm.generation.decoding import Decoding
from vlm.generation.text import generate_ids, generation_config
from vlm.model.forward import VLM

# Prompts of 4 + 5, 4 + 11 and 6 tokens: the windows are 8.
PROMPTS = [[sample(5, 0, 1)], [sample(11, 0, 2)], [sample(6, 0, 3, image=False)]]
NEW = 12
PROMPT_TEXTS = ["caption en", "answer en what color is the square?", "no"]


def settings(model: VLM, **changes: Any) -> GenerationConfig:
    values = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1, "use_cache": True}
    return GenerationConfig(**{**values, "suppress_tokens": [model.config.image_token_id], **changes})


def run(model: Any, batch: dict[str, Tensor], config: GenerationConfig) -> Any:
    """transformers' generate: the whole sequences."""
    return model.generate(**batch, generation_config=config)


def extend(batch: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
    """The batch with one suffix token more in each row."""
    column = token[:, None]
    return {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], column], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(column)], 1),
        "token_type_ids": torch.cat([batch["token_type_ids"], torch.ones_like(column)], 1),
        "position_ids": torch.cat([batch["position_ids"], batch["position_ids"][:, -1:] + 1], 1),
    }


def reference_greedy(model: VLM, batch: dict[str, Tensor], steps: int = NEW, eos: int = 1) -> list[list[int]]:
    """Greedy decoding that runs the whole sequence again for each token; stops each row after EOS."""
    out: list[list[int]] = [[] for _ in batch["input_ids"]]
    for _ in range(steps):
        scores = logits(model, batch)[:, -1]
        scores[:, model.config.image_token_id] = -torch.inf
        token = scores.argmax(-1)
        for row, value in zip(out, token.tolist(), strict=True):
            if eos not in row:
                row.append(value)
        batch = extend(batch, token)
    return out


def strip(rows: Tensor, start: int, eos: int = 1) -> list[list[int]]:
    """New ids of each row up to and with EOS."""
    result = []
    for row in rows[:, start:].tolist():
        result.append(row[: row.index(eos) + 1] if eos in row else row)
    return result


@pytest.mark.parametrize("cache", [None, "static"])
@each_case
def test_greedy_equals_the_loop_without_cache(case: Case, cache: str | None) -> None:
    model, _ = case.model()
    batch = lay_out(model, PROMPTS, "left")
    expected = reference_greedy(model, batch)
    got = run(model, batch, settings(model, cache_implementation=cache))
    assert strip(got, batch["input_ids"].shape[1]) == expected
    assert len(set(map(tuple, expected))) == 3 and all(len(set(row)) > 2 for row in expected), expected


@each_case
def test_rows_stop_at_their_own_eos(case: Case) -> None:
    """A token that one row emits early is declared to be EOS: the row stops there, is padded, and the rest go on."""
    model, _ = case.model()
    batch = lay_out(model, PROMPTS, "left")
    free = reference_greedy(model, batch)
    eos = next(token for token in free[0][1:4] if token not in free[1][:3])
    expected = reference_greedy(model, batch, eos=eos)
    assert len(expected[0]) < NEW
    got = run(model, batch, settings(model, eos_token_id=eos))
    length = batch["input_ids"].shape[1]
    assert strip(got, length, eos) == expected
    assert set(got[0, length + len(expected[0]) :].tolist()) <= {0}


@pytest.mark.parametrize("cache", [None, "static"])
@each_case
def test_batch_size_does_not_matter(case: Case, cache: str | None) -> None:
    """A batch of one has no padding, and the library then drops the attention mask."""
    model, _ = case.model()
    whole = reference_greedy(model, lay_out(model, PROMPTS, "left"))
    for line, expected in zip(PROMPTS, whole, strict=True):
        batch = lay_out(model, [line])
        got = run(model, batch, settings(model, cache_implementation=cache))
        assert strip(got, batch["input_ids"].shape[1]) == [expected]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@each_case
def test_cached_logits_equal_uncached(case: Case, kind: str) -> None:
    """Step by step over 2 windows of new tokens, not only the argmax."""
    model, _ = case.model()
    batch = lay_out(model, PROMPTS, "left")
    length = batch["input_ids"].shape[1]
    text = model.config.text_config
    cache = DynamicCache(config=text) if kind == "dynamic" else StaticCache(config=text, max_cache_len=length + 16)
    with torch.no_grad():
        step = model(**batch, cache=cache).logits[:, -1]
        for _ in range(16):
            whole = logits(model, batch)[:, -1]
            assert (step - whole).abs().max() < 1e-4
            batch = extend(batch, whole.argmax(-1))
            last = {name: batch[name][:, -1:] for name in ("input_ids", "token_type_ids", "position_ids")}
            step = model(**last, attention_mask=batch["attention_mask"], cache=cache).logits[:, -1]


@each_case
def test_several_suffix_tokens_after_a_cache(case: Case) -> None:
    """A forced answer of several tokens continues a cached prompt; positions come from the attention mask."""
    model, _ = case.model()
    batch = lay_out(model, PROMPTS, "left")
    longer = batch
    for token in (30, 40, 50, 60, 70, 80, 90, 100, 110):
        longer = extend(longer, torch.full((3,), token))
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**batch, cache=cache)
        got = model(
            input_ids=longer["input_ids"][:, -9:],
            token_type_ids=longer["token_type_ids"][:, -9:],
            attention_mask=longer["attention_mask"],
            cache=cache,
        ).logits
    assert (got - logits(model, longer)[:, -9:]).abs().max() < 1e-4


def test_cache_misuse_is_refused() -> None:
    model, _ = loud("siglip", "gemma")
    batch = lay_out(model, PROMPTS, "left")
    cache = DynamicCache(config=model.config.text_config)
    model(**batch, cache=cache)
    text = torch.full((3, 2), 20)
    with pytest.raises(DataError, match="prefix tokens after a filled cache"):
        model(
            input_ids=text,
            token_type_ids=torch.zeros_like(text),
            attention_mask=torch.ones(3, batch["input_ids"].shape[1] + 2),
            cache=cache,
        )
    with pytest.raises(DataError, match="cache holds 15 more"):
        model(
            input_ids=text,
            token_type_ids=torch.ones_like(text),
            attention_mask=torch.ones_like(text),
            cache=cache,
        )


@each_case
def test_beams_equal_beams_without_cache(case: Case) -> None:
    """The cache is reordered with the beams; scores are the sums of log-probabilities of an uncached forward."""
    model, _ = case.model()
    batch = lay_out(model, PROMPTS, "left")
    length = batch["input_ids"].shape[1]
    extra = {"num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    cached = run(model, batch, settings(model, **extra))
    uncached = run(model, batch, settings(model, **extra, use_cache=False))
    assert torch.equal(cached.sequences, uncached.sequences)
    greedy = run(model, batch, settings(model))
    best, first = (
        log_likelihood(model, batch, cached.sequences[:, length:]),
        log_likelihood(model, batch, greedy[:, length:]),
    )
    assert torch.allclose(cached.sequences_scores, best, atol=1e-3)
    assert best.sum() > first.sum() + 0.1  # a beam may lose the greedy path of one row, not of all


def log_likelihood(model: VLM, batch: dict[str, Tensor], new: Tensor) -> Tensor:
    """float[B]: summed log-probability of the new tokens, EOS included, padding not."""
    start = batch["input_ids"].shape[1]
    whole = batch
    for token in new.unbind(1):
        whole = extend(whole, token)
    scores = logits(model, whole)[:, start - 1 : -1]
    each = scores.log_softmax(-1).gather(-1, new[..., None])[..., 0]
    ended = (new == 1).cumsum(-1) - (new == 1).long()
    return (each * (ended == 0)).sum(-1)


def test_beams_keep_the_images_of_a_sample_together() -> None:
    """Samples with two images, one and none: beams see what the sample alone sees."""
    model, processor = loud("siglip", "gemma")
    groups = [[picture(1), picture(2)], [picture(3)], [], [picture(4), picture(5)]]
    prompts = ["caption en", "no", "yes", "answer en what?"]
    together = vlm.generate(model, processor, groups, prompts, num_beams=3, max_new_tokens=6)
    for group, prompt, expected in zip(groups, prompts, together, strict=True):
        images = [group] if group else None
        assert vlm.generate(model, processor, images, [prompt], num_beams=3, max_new_tokens=6) == [expected]
    batch = processor([groups[0]], [prompts[0]])
    exact = generation_config(processor, Decoding(max_new_tokens=6, num_beams=3))
    uncached = copy.deepcopy(exact)
    uncached.use_cache = False
    assert torch.equal(generate_ids(model, batch, exact), generate_ids(model, batch, uncached))


@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
def test_text_of_a_batch_equals_text_one_by_one(encoder: str) -> None:
    """Through the processor: mixed prompts and aspect ratios, greedy and beams, any batch size."""
    model, processor = loud(encoder, "gemma3_text", "sdpa", sliding_window=8)
    images = [picture(1, (70, 40)), picture(2, (30, 90)), picture(3, (50, 50))]
    for beams in (1, 3):
        options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": beams}
        whole = vlm.generate(model, processor, images, PROMPT_TEXTS, **options)
        assert len(set(whole)) == 3 and all(isinstance(text, str) for text in whole)
        pairs = zip(images, PROMPT_TEXTS, strict=True)
        assert whole == [vlm.generate(model, processor, i, t, **options)[0] for i, t in pairs]
        assert whole == vlm.generate(model, processor, images, PROMPT_TEXTS, batch_size=2, **options)


def test_text_only_prompts() -> None:
    model, processor = loud("siglip", "gemma")
    whole = vlm.generate(model, processor, None, PROMPT_TEXTS, max_new_tokens=5)
    assert whole == [vlm.generate(model, processor, None, text, max_new_tokens=5)[0] for text in PROMPT_TEXTS]
    assert vlm.generate(model, processor, [picture(1)] * 3, PROMPT_TEXTS, max_new_tokens=5) != whole


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_new_tokens", "5", "max_new_tokens is '5', expected a whole number"),
        ("max_new_tokens", 2.0, "max_new_tokens is 2.0, expected a whole number"),
        ("num_beams", 1.5, "num_beams is 1.5, expected a whole number"),
        ("num_beams", True, "num_beams is True, expected a whole number"),
        ("batch_size", "5", "batch_size is '5', expected a whole number"),
        ("batch_size", 0, "batch_size is 0, expected at least 1"),
        ("batch_tokens", "many", "batch_tokens is 'many', expected a whole number"),
        ("seed", "a", "seed is 'a', expected a whole number"),
        ("temperature", "hot", "temperature is 'hot', expected a number"),
        ("top_p", None, "top_p is None, expected a number"),
    ],
)
def test_numbers_of_another_kind_are_refused(name: str, value: Any, says: str) -> None:
    model, processor = loud("siglip", "gemma")
    with pytest.raises(GenerationError, match=says):
        vlm.generate(model, processor, None, ["a"], do_sample=name == "seed", **{name: value})


def test_an_answer_says_whether_it_was_cut() -> None:
    """Against the tokens themselves: one row made to end at its second token, one that never ends; beams too."""
    model, processor = loud("siglip", "gemma")
    images = [picture(i) for i in range(3)]
    assert {text.finish for text in vlm.generate(model, processor, images, PROMPT_TEXTS, max_new_tokens=3)} == {
        "length"
    }
    whole = copy.copy(processor)
    whole.tokenizer = copy.deepcopy(processor.tokenizer)
    settings = generation_config(processor, Decoding(max_new_tokens=3, num_beams=1))
    second = generate_ids(model, processor(images, PROMPT_TEXTS), settings)[:, 1].tolist()
    whole.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(second[0])
    for beam_search in ("transformers", "big_vision"):
        found = vlm.generate(model, whole, images, PROMPT_TEXTS, max_new_tokens=3, beam_search=beam_search)
        assert found[0].finish == "eos"
        assert [text.finish == "eos" for text in found] == [token == second[0] for token in second]
    assert pickle.loads(pickle.dumps(found[0])).finish == copy.deepcopy(found[0]).finish == "eos"
    alone = vlm.generate(model, whole, images[0], PROMPT_TEXTS[0], max_new_tokens=2)  # EOS is the last token allowed
    assert alone[0].finish == "eos" and type(str(alone[0])) is str


def test_sampling_is_repeatable_and_leaves_the_random_state() -> None:
    model, processor = loud("siglip", "gemma")
    images = [picture(i) for i in range(3)]

    def draw(seed: int | None, **extra: Any) -> Sequence[str]:
        return vlm.generate(
            model, processor, images, PROMPT_TEXTS, do_sample=True, seed=seed, max_new_tokens=8, **extra
        )

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(3) == first and draw(4) != first
    assert draw(3, top_k=1) == vlm.generate(model, processor, images, PROMPT_TEXTS, max_new_tokens=8)
    assert draw(None) != draw(None)


def test_sampling_follows_the_model_distribution() -> None:
    """4,000 first tokens from a hot row match softmax(logits): no hidden top-k or temperature."""
    model, processor = loud("siglip", "gemma")
    batch = processor([picture(1)], ["caption en"])
    scores = logits(model, {name: batch[name] for name in batch.keys()})[0, -1]
    scores[processor.image_token_id] = -torch.inf
    wanted = scores.softmax(-1)
    config = generation_config(processor, Decoding(max_new_tokens=1, do_sample=True))
    config.num_return_sequences = 4000
    torch.manual_seed(0)
    drawn = generate_ids(model, batch, config)[:, 0]
    counts = torch.bincount(drawn, minlength=len(wanted)) / 4000
    rare = wanted < wanted.topk(50).values[-1]  # beyond the library's default top_k of 50
    assert abs(float(counts[rare].sum() - wanted[rare].sum())) < 0.03
    assert float((counts - wanted).abs().max()) < 0.03


@pytest.mark.parametrize("decoder", ["gemma", "gemma2", "gemma3_text"])
def test_bfloat16_generates(decoder: str) -> None:
    """bfloat16 follows its own uncached loop, up to near ties: the chosen token is within rounding of the best."""
    model = copy.deepcopy(loud("siglip", decoder)[0]).bfloat16()
    batch = lay_out(model, PROMPTS, "left")
    out = run(model, batch, settings(model))
    length = batch["input_ids"].shape[1]
    for step in range(length, out.shape[1]):
        scores = logits(model, batch)[:, -1].float()
        scores[:, model.config.image_token_id] = -torch.inf
        chosen = scores.gather(1, out[:, step : step + 1])[:, 0]
        live = ~(out[:, length:step] == 1).any(1)
        assert (scores.amax(1) - chosen)[live].max() < 0.25
        batch = extend(batch, out[:, step])


def test_a_placeholder_is_never_generated() -> None:
    """The likeliest token is the placeholder: it is skipped, and nothing asks for pixels that are not there."""
    model, processor = tiny(seed=5)
    shake(model)
    text = "caption en"
    batch = processor([picture(1)], [text])
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1][0, -1]
        row = model.lm_head.weight[processor.image_token_id]
        row.copy_(hidden / hidden.norm() * 50)
        assert int(model(**batch).logits[0, -1].argmax()) == processor.image_token_id
    for beams in (1, 2):
        assert "<image>" not in vlm.generate(model, processor, picture(1), text, max_new_tokens=4, num_beams=beams)[0]


def test_training_batch_is_refused() -> None:
    model, processor = loud("siglip", "gemma")
    batch = processor([picture(1)], ["caption en"], ["a red square"])
    config = generation_config(processor, Decoding(max_new_tokens=2, num_beams=1))
    with pytest.raises(GenerationError, match="made for training"):
        generate_ids(model, batch, config)


def test_modes_of_the_parts_survive() -> None:
    """A frozen tower in eval mode inside a model in training mode stays so."""
    model, processor = tiny()
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    vlm.generate(model, processor, picture(1), "no", max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_float16_is_refused_unless_forced() -> None:
    model, processor = tiny()
    half = model.half()
    with pytest.raises(GenerationError, match="float16 overflows in gemma"):
        vlm.generate(half, processor, picture(1), "no")
    assert len(vlm.generate(half, processor, picture(1), "no", max_new_tokens=2, force_fp16=True)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"do_sample": True, "num_beams": 2}, "choose one"),
        ({"do_sample": True, "temperature": 0.0}, "temperature 0.0"),
        ({"do_sample": True, "top_p": 0.0}, "top_p 0.0"),
        ({"ids": ["a", "b"]}, "'ids': 2"),
        ({"temperature": 0.7}, "temperature=0.7 without do_sample=True: .* for greedy decoding"),
        ({"temperature": 0}, "temperature=0 without do_sample=True"),
        ({"top_p": 0.9, "top_k": 5}, "top_p=0.9, top_k=5 without do_sample=True"),
        ({"top_k": 5, "num_beams": 3}, "top_k=5 without do_sample=True: .* for beam search"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1, expected at least 0"),
        ({"seed": 3}, "seed=3 without do_sample=True"),
        ({"length_penalty": 0.5}, "length_penalty=0.5 without beams"),
        ({"length_penalty": 0.5, "do_sample": True}, "length_penalty=0.5 without beams"),
        ({"batch_size": 2, "batch_tokens": 100}, "batch_size=2 beside batch_tokens=100"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    model, processor = loud("siglip", "gemma")
    with pytest.raises(GenerationError, match=message):
        vlm.generate(model, processor, [picture(1)], ["no"], **options)


def test_unequal_numbers_of_images_and_prompts() -> None:
    model, processor = loud("siglip", "gemma")
    with pytest.raises(GenerationError, match="'prompts': 1.*'images': 2"):
        vlm.generate(model, processor, [picture(1)] * 2, ["no"])
    assert vlm.generate(model, processor, [], []) == []


def test_every_case_is_covered() -> None:
    """The prompts exceed the window of 8 and differ in length and in having an image."""
    lengths = [len(line[0].ids(0)) for line in PROMPTS]
    assert max(lengths) > 8 and len(set(lengths)) == 3
    assert len(list(itertools.chain.from_iterable(PROMPTS))) == 3


def test_a_default_of_decoding_stands_once() -> None:
    """No other function or dataclass of the package writes a default of its own for one of the options."""
    options = {"max_new_tokens", "num_beams", "beam_search", "length_penalty", "temperature", "top_p", "top_k"}
    options |= {"normalization", "do_sample"}
    root = Path(vlm.__file__).parent
    found = set()
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            pairs: list[tuple[str, Any]] = []
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                pairs.append((node.target.id, node.value))
            elif isinstance(node, ast.arguments):
                named = [*node.posonlyargs, *node.args][::-1]
                pairs += [(one.arg, value) for one, value in zip(named, node.defaults[::-1], strict=False)]
                pairs += [(one.arg, value) for one, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            wrong = [name for name, value in pairs if name in options and isinstance(value, ast.Constant)]
            found |= {(str(path.relative_to(root)), name) for name in wrong if name is not None}
    # A task says whose beams; a speed is measured with so many tokens whatever is said.
    assert found == {("eval/tasks/task.py", "beam_search"), ("measure/cost.py", "max_new_tokens")}
