"""`vlm.check` on what the model computes: each check passes on healthy tiny models and fails on a broken one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coretools import loud
from torch import Tensor
from transformers.models.gemma import modeling_gemma

import vlm.model.forward
from vlm import check
from vlm.build.presets import tiny
from vlm.check.report import Finding, Result
from vlm.check.subject import SAMPLES, Subject, padded_left
from vlm.encoders.siglip2_naflex import Encoder as NaFlexTower
from vlm.errors import ConfigError
from vlm.model import masks
from vlm.model.forward import VLM, VLMModel
from vlm.model.processor import Processor

NAMES = [entry.name for entry in check.CHECKS]
MASK = "vlm.model.masks.prefix_lm_mask"
IMAGE_TOKENS = 4


def decoder_settings(decoder: str) -> dict[str, Any]:
    # A window longer than the probes: PaliGemma's format has none (see test_check_files).
    return {"sliding_window": 4096} if decoder == "gemma2" else {}


def healthy(encoder: str = "siglip", decoder: str = "gemma") -> tuple[VLM, Processor]:
    """A copy of a noisy tiny model, to be broken."""
    model, processor = loud(encoder, decoder, **decoder_settings(decoder))
    return copy.deepcopy(model), processor


def one(name: str, model: VLM, processor: Processor, **options: Any) -> Result:
    report = check.run(model, processor, only=[name], **options)
    assert [result.name for result in report.results] == [name]
    return report[name]


# --- healthy


@pytest.mark.parametrize("decoder", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
def test_healthy_models_pass(encoder: str, decoder: str) -> None:
    model, processor = loud(encoder, decoder, **decoder_settings(decoder))
    report = check.run(model, processor)
    assert report.ok and not report.failures, report.table()
    skipped = {result.name for result in report.results if result.status == "n/a"}
    expected = {"stage", "labels"}  # no run, no data
    if decoder == "gemma2":
        expected.add("backends")  # sdpa has no soft-cap
    if encoder == "siglip2_naflex" or decoder == "gemma3_text":
        expected.add("export")  # not PaliGemma's
    assert skipped == expected, report.table()
    assert all(
        result.measured is not None and result.limit is not None
        for result in report.results
        if result.name not in skipped
    )


def test_a_fresh_projector_makes_the_image_check_blind() -> None:
    for encoder in ("siglip", "siglip2_naflex"):
        model, processor = tiny(encoder)
        report = check.run(model, processor, only=["image", "batch-mates", "future", "embedding-scale"])
        assert report["image"].status == "n/a" and "does not reach the decoder yet" in report["image"].detail
        assert "does not reach the decoder yet" in report["batch-mates"].detail
        assert report["future"].status == report["embedding-scale"].status == "ok"


def test_bfloat16_has_its_own_limits(tmp_path: Any) -> None:
    model, processor = loud("siglip2_naflex", "gemma3_text")
    vlm.save(model, processor, tmp_path)
    model, processor = vlm.load(tmp_path, dtype="bfloat16")
    report = check.run(model, processor)
    assert report.ok and report.dtype == "bfloat16", report.table()
    limit = report["cache"].limit
    assert limit is not None and limit > 100 * 1e-4


@pytest.mark.parametrize("decoder", ["gemma", "gemma2"])
def test_the_model_is_left_as_it_was(decoder: str) -> None:
    model, processor = healthy("siglip", decoder)
    model.train()
    model.model.vision_tower.eval()
    if decoder == "gemma":
        model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    model.model.multi_modal_projector.requires_grad_(False)

    def state() -> Any:
        config = model.config
        backends = [part._attn_implementation for part in (config, config.text_config, config.vision_config)]
        modes = [module.training for module in model.modules()]
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        flags = [parameter.requires_grad for parameter in model.parameters()]
        grads = [parameter.grad for parameter in model.parameters()]
        return backends, modes, hooks, flags, grads, model.dtype, model.device, torch.get_rng_state().tolist()

    before, weights = state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert check.run(model, processor).ok
    assert state() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_probes_are_what_they_should_be() -> None:
    """Padding on both sides, mixed prefix lengths, and more tokens than the small windows hold."""
    model, processor = loud("siglip", "gemma3_text")
    subject = Subject(model=model, processor=processor)
    right = subject.batch()
    left = padded_left(right)
    lengths = right["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == len(SAMPLES) and int(lengths.min()) > 8
    for row, length in enumerate(lengths.tolist()):
        for name in ("input_ids", "token_type_ids", "position_ids"):
            assert torch.equal(right[name][row, :length], left[name][row, -length:])
        assert left["attention_mask"][row, : -int(length)].sum() == 0
    ids = subject.ordinary_ids
    assert len(ids) > 20 and not set(ids.tolist()) & set(processor.tokenizer.all_special_ids)


# --- masks


def valid_pairs(attention_mask: Tensor) -> Tensor:
    valid = attention_mask.bool()
    return valid[:, :, None] & valid[:, None, :]


def with_diagonal(allowed: Tensor) -> Tensor:
    return allowed | torch.eye(allowed.shape[-1], dtype=torch.bool)


def full(attention_mask: Tensor, types: Tensor, sequence_ids: Tensor | None = None, **_: Any) -> Tensor:
    """Everything sees everything: what transformers did without token_type_ids."""
    return with_diagonal(valid_pairs(attention_mask))


def causal(attention_mask: Tensor, types: Tensor, sequence_ids: Tensor | None = None, **_: Any) -> Tensor:
    return with_diagonal(valid_pairs(attention_mask).tril())


right_mask = masks.prefix_lm_mask


def full_without_padding(attention_mask: Tensor, types: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Wrong only where nothing is padded."""
    chosen = full if bool(attention_mask.all()) else right_mask
    return chosen(attention_mask, types, *rest, **named)


def causal_with_padding(attention_mask: Tensor, types: Tensor, *rest: Any, **named: Any) -> Tensor:
    chosen = right_mask if bool(attention_mask.all()) else causal
    return chosen(attention_mask, types, *rest, **named)


def image_only_bidirectional(attention_mask: Tensor, types: Tensor, *rest: Any, **named: Any) -> Tensor:
    """As vLLM's prefix mask: the image sees itself, the text prefix is causal."""
    image = torch.arange(types.shape[1]) < IMAGE_TOKENS
    return causal(attention_mask, types) | (valid_pairs(attention_mask) & image[:, None] & image[None, :])


def last_label_leaks(attention_mask: Tensor, types: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Each suffix token sees the one after it."""
    allowed = right_mask(attention_mask, types, *rest, **named)
    next_one = torch.diag(torch.ones(types.shape[1] - 1, dtype=torch.bool), 1)
    return allowed | (next_one & (types == 1)[:, :, None] & valid_pairs(attention_mask))


def prefix_sees_padding(attention_mask: Tensor, types: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Padding has token type 0 and passes for prefix (huggingface/transformers#35855)."""
    prefix = types == 0
    return right_mask(attention_mask, types, *rest, **named) | (prefix[:, :, None] & prefix[:, None, :])


def first_slot_is_a_sink(attention_mask: Tensor, types: Tensor, *rest: Any, **named: Any) -> Tensor:
    allowed = right_mask(attention_mask, types, *rest, **named).clone()
    allowed[:, :, 0] = True
    return allowed


@pytest.mark.parametrize(
    ("name", "mask", "decoder"),
    [
        ("future", full, "gemma"),
        ("future", full, "gemma2"),
        ("future", full, "gemma3_text"),
        ("future", full_without_padding, "gemma"),
        ("future", last_label_leaks, "gemma"),
        ("prefix", causal, "gemma"),
        ("prefix", causal, "gemma2"),
        ("prefix", causal, "gemma3_text"),
        ("prefix", causal_with_padding, "gemma"),
        ("prefix", image_only_bidirectional, "gemma"),
        ("pad-content", prefix_sees_padding, "gemma"),
        ("pad-content", prefix_sees_padding, "gemma3_text"),
        ("pad-side", first_slot_is_a_sink, "gemma"),
        ("batch-mates", causal_with_padding, "gemma"),
    ],
)
def test_a_wrong_mask_fails(
    name: str, mask: Callable[..., Tensor], decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = healthy("siglip", decoder)
    assert one(name, model, processor).status == "ok"
    monkeypatch.setattr(MASK, mask)
    result = one(name, model, processor)
    assert result.status == "FAIL", result
    assert result.measured is not None and result.limit is not None
    # Far from the limit: a check that is decided by rounding is none.
    ratio = result.measured / result.limit
    assert ratio > 100 if result.relation == "<=" else ratio < 0.1
    # A model fresh from its initialisation attends weakly, and its projector is zero; the faults show all the same.
    fresh = one(name, *tiny("siglip", decoder, **decoder_settings(decoder)))
    assert fresh.status == "FAIL", fresh


def test_a_causal_mask_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy()
    monkeypatch.setattr(MASK, causal)
    assert one("future", model, processor).status == "ok"


def test_a_leak_in_train_mode_only_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy()
    monkeypatch.setattr(MASK, lambda *a, **k: full(*a) if model.training else right_mask(*a, **k))
    result = one("future", model, processor)
    assert result.status == "FAIL" and "earlier logits move 0.0e+00" in result.detail


def test_dead_attention_is_not_taken_for_a_sound_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check for the absence of an effect says n/a where it could not have seen one."""
    model, processor = healthy()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
    monkeypatch.setattr(MASK, full)
    assert "would not be seen" in one("future", model, processor).detail
    monkeypatch.setattr(MASK, prefix_sees_padding)
    assert "nothing would be seen" in one("pad-content", model, processor).detail
    assert one("prefix", model, processor).status == "FAIL"


# --- padding and batch mates in the tower


def test_a_tower_that_sees_padding_patches_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy("siglip2_naflex")
    forward = NaFlexTower.forward

    def leaky(self: Any, pixel_values: Tensor, *args: Any, **named: Any) -> Any:
        out = forward(self, pixel_values, *args, **named)
        return out._replace(features=out.features + pixel_values.mean((1, 2))[:, None, None])  # padding rows too

    monkeypatch.setattr(NaFlexTower, "forward", leaky)
    for name in ("pad-content", "batch-mates"):
        result = one(name, model, processor)
        assert result.status == "FAIL" and "features" in result.detail, result
    # Even where the projector hides it from the decoder.
    fresh, processor = tiny("siglip2_naflex")
    assert one("batch-mates", fresh, processor).status == "FAIL"


def test_statistics_over_the_batch_fail() -> None:
    model, processor = healthy()
    projector = model.model.multi_modal_projector
    projector.register_forward_hook(lambda _m, _i, out: (out[0] - out[0].mean(0, keepdim=True), out[1]))
    assert one("batch-mates", model, processor).status == "FAIL"


# --- the image


def test_a_model_that_ignores_the_image_fails() -> None:
    model, processor = healthy()
    model.model.multi_modal_projector.register_forward_hook(lambda _m, _i, out: (torch.ones_like(out[0]), out[1]))
    result = one("image", model, processor)
    assert result.status == "FAIL" and "does not move the logits of its own sample" in result.detail


def test_images_in_the_wrong_order_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy()
    project = VLMModel.project

    def shifted(self: VLMModel, encoded: Any) -> tuple[Tensor, Tensor]:
        tokens, counts = project(self, encoded)
        return tokens.roll(IMAGE_TOKENS, 0), counts

    monkeypatch.setattr(VLMModel, "project", shifted)
    result = one("image", model, processor)
    assert result.status == "FAIL" and result.measured is not None and result.measured > 0.1


# --- cache


def test_positions_that_count_padding_break_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy()
    assert one("cache", model, processor).status == "ok"

    def slots(attention_mask: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        return torch.arange(attention_mask.shape[1]).expand_as(attention_mask)

    monkeypatch.setattr(vlm.model.masks, "position_ids", slots)
    assert one("cache", model, processor).status == "FAIL"


@pytest.mark.parametrize("decoder", ["gemma2", "gemma3_text"])
def test_a_window_that_is_one_short_in_decoding_fails(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = copy.deepcopy(loud("siglip", decoder))  # window 8
    assert one("cache", model, processor).status == "ok"
    decode = masks.decode_mask

    def short(*args: Any, window: int | None = None) -> Tensor:
        return decode(*args, window=None if window is None else window - 1)

    monkeypatch.setattr(vlm.model.masks, "decode_mask", short)
    assert one("cache", model, processor).status == "FAIL"


def test_the_models_own_generation_settings_do_not_disturb() -> None:
    model, processor = healthy()
    model.generation_config.repetition_penalty = 5.0
    own = model.generation_config
    assert one("cache", model, processor).status == "ok"
    assert model.generation_config is own


def test_generation_that_is_not_greedy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy()
    generate: Any = VLM.generate

    def other(self: VLM, **named: Any) -> Tensor:
        ids: Tensor = generate(self, **named)
        ids[0, -3] = 50 if ids[0, -3] != 50 else 51
        return ids

    monkeypatch.setattr(VLM, "generate", other)
    result = one("cache", model, processor)
    assert result.status == "FAIL" and "greedy tokens differ" in result.detail


# --- backends


def test_eager_attention_that_forgets_the_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy()
    attend = modeling_gemma.eager_attention_forward

    def unmasked(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **named: Any) -> Any:
        return attend(module, query, key, value, None, **named)

    monkeypatch.setattr(modeling_gemma, "eager_attention_forward", unmasked)
    result = one("backends", model, processor)
    assert result.status == "FAIL" and result.measured is not None and result.measured > 0.01
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_soft_cap_leaves_nothing_to_compare() -> None:
    model, processor = loud("siglip", "gemma2", **decoder_settings("gemma2"))
    result = one("backends", model, processor)
    assert result.status == "n/a" and "caps attention scores at 50" in result.detail


# --- embeddings


def test_an_embedding_without_its_scale_fails() -> None:
    model, processor = healthy()
    table: Any = model.get_input_embeddings()
    table.embed_scale = torch.ones_like(table.embed_scale)
    table.scalar_embed_scale = 1.0
    result = one("embedding-scale", model, processor)
    assert result.status == "FAIL" and "embedding layer: 0.1768 times" in result.detail  # 1 / sqrt(32)


@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
@pytest.mark.parametrize("fresh", [False, True])
def test_scaled_image_tokens_fail(encoder: str, fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers up to 5.3 divided by sqrt(width), and other code still does; a zero projector hides nothing."""
    model, processor = tiny(encoder) if fresh else healthy(encoder)
    project = VLMModel.project

    def divided(self: VLMModel, encoded: Any) -> tuple[Tensor, Tensor]:
        tokens, counts = project(self, encoded)
        return tokens / math.sqrt(32), counts

    monkeypatch.setattr(VLMModel, "project", divided)
    result = one("embedding-scale", model, processor)
    assert result.status == "FAIL" and "image tokens in the decoder: 0.1768 times" in result.detail


def test_a_decoder_that_scales_again_fails() -> None:
    model, processor = healthy()

    def again(_module: Any, args: Any, named: dict[str, Any]) -> Any:
        return args, {**named, "inputs_embeds": named["inputs_embeds"] * math.sqrt(32)}

    model.model.language_model.register_forward_pre_hook(again, with_kwargs=True)
    result = one("embedding-scale", model, processor)
    assert result.status == "FAIL" and "5.657 times" in result.detail


def test_an_untied_head_fails_even_when_it_is_equal() -> None:
    model, processor = healthy()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert one("tied-weights", model, processor).status == "FAIL"
    model.config.tie_word_embeddings = False
    assert one("tied-weights", model, processor).status == "n/a"


# --- report and runner


def test_a_model_of_nan_fails_and_its_report_is_json() -> None:
    model, processor = healthy()
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = torch.nan
    report = check.run(
        model,
        processor,
        only=["future", "prefix", "image", "pad-content", "pad-side", "batch-mates", "cache", "backends"],
    )
    assert {result.status for result in report.results} == {"FAIL"}, report.table()
    values = json.loads(report.to_json())
    assert values["ok"] is False and values["results"][0]["measured"] == "nan"


def test_a_model_that_raises_is_a_failure_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy()

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError("no such size")

    monkeypatch.setattr(VLM, "encode", refuse)
    report = check.run(model, processor, only=["tied-weights", "future"])
    assert (report["tied-weights"].status, report["future"].status) == ("ok", "FAIL")
    assert report["future"].detail == "ConfigError: no such size"


def test_too_little_memory_is_not_a_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = healthy()

    def full_up(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(VLM, "encode", full_up)
    assert one("future", model, processor).status == "n/a"


def test_only_takes_names_and_says_the_nearest() -> None:
    model, processor = loud("siglip", "gemma")
    report = check.run(model, processor, only=["tied-weights", "future"])
    assert [result.name for result in report.results] == ["future", "tied-weights"]  # the table's order
    with pytest.raises(
        ConfigError, match=r"unknown check 'futur' \(did you mean 'future'\?\); known: tower, .*, future, prefix"
    ):
        check.run(model, processor, only=["futur"])


@pytest.mark.parametrize(
    ("finding", "status"),
    [
        (Finding(measured=1, limit=1), "ok"),
        (Finding(measured=1.1, limit=1), "FAIL"),
        (Finding(measured=0, limit=1, relation=">="), "FAIL"),
        (Finding(measured=math.nan, limit=1), "FAIL"),
        (Finding(measured=math.nan, limit=1, relation=">="), "FAIL"),
        (Finding(measured=0, limit=1, problem="else"), "FAIL"),
        (Finding(reason="none"), "n/a"),
    ],
)
def test_status(finding: Finding, status: str) -> None:
    assert finding.status == status


def test_the_table_has_one_line_per_check_and_the_counts() -> None:
    model, processor = loud("siglip", "gemma")
    report = check.run(model, processor, only=["future", "tied-weights", "labels"], path="runs/x")
    lines = report.table().splitlines()
    assert len(lines) == 5 and lines[3] == ""
    assert lines[0].startswith("ok   future        0 <= 1.0e-04  earlier logits move")
    assert lines[2].startswith("n/a  labels")
    assert lines[4] == "runs/x (float32, cpu, sdpa attention): 2 ok, 0 FAIL, 1 n/a"
    assert len(NAMES) == len(set(NAMES))
