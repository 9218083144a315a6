"""The model's own contract: parts, parameters, outputs, placeholders, attention switch, configuration."""

from __future__ import annotations

import copy
import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import IMAGE_TOKENS, lay_out, loud, picture, sample, shake
from torch import Tensor
from transformers import AttentionInterface, AutoModelForImageTextToText, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import vlm
from vlm.build.presets import tiny
from vlm.encoders.contract import EncoderOutput
from vlm.errors import ConfigError, DataError, GenerationError
from vlm.generation.text import generate_ids
from vlm.model.config import VLMConfig
from vlm.model.forward import VLM, VLMModel
from vlm.model.inputs import Inputs

ROWS = [[sample(3, 3, 1)], [sample(5, 2, 2)]]


@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("decoder", ["gemma", "gemma2", "gemma3_text"])
def test_each_parameter_belongs_to_one_part_and_learns(encoder: str, projector: str, decoder: str) -> None:
    model, processor = tiny(encoder, decoder, projector)
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    owners: dict[int, list[str]] = {}
    for name, part in model.parts().items():
        for parameter in part.parameters():
            owners.setdefault(id(parameter), []).append(name)
    assert list(model.parts()) == ["encoder", "projector", "decoder"]
    assert all(len(names) == 1 for names in owners.values())
    assert set(owners) == {id(parameter) for parameter in model.parameters()}
    sizes = [(60, 30), (30, 60)]
    batch = processor([picture(i, s) for i, s in enumerate(sizes)], ["caption en"] * 2, ["a red square", "no"])
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_softcap_in_generation_is_a_choice(tmp_path: Path) -> None:
    """cap * tanh(logits / cap) of the tied vocabulary, or the logits as they are; recorded; greedy is the same."""
    model, processor = tiny("siglip", "gemma2", final_logit_softcapping=0.5)
    shake(model)
    batch = lay_out(model, ROWS)
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    raw = hidden @ model.model.language_model.embed_tokens.weight.T
    assert VLMConfig().softcap_in_generation is True and raw.abs().max() > 1
    assert torch.allclose(model(**batch).logits, 0.5 * torch.tanh(raw / 0.5), atol=1e-5)
    with_cap = vlm.generate(model, processor, picture(1), "no", max_new_tokens=6)
    model.config.softcap_in_generation = False
    assert torch.allclose(model(**batch).logits, raw, atol=1e-5)
    assert vlm.generate(model, processor, picture(1), "no", max_new_tokens=6) == with_cap
    model.config.save_pretrained(tmp_path)
    assert VLMConfig.from_pretrained(tmp_path).softcap_in_generation is False


def test_the_vocabulary_is_tied() -> None:
    model, _ = tiny()
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_a_fresh_projector_is_silent() -> None:
    """Zero-initialised: the image does not matter before training, whichever projector."""
    for projector in ("linear", "mlp"):
        model, processor = tiny(projector=projector)
        with torch.no_grad():
            one, two = (model(**processor([picture(i)], ["no"])).logits for i in (1, 2))
        assert torch.equal(one, two)
        loudly, processor = loud("siglip", "gemma")
    with torch.no_grad():
        one, two = (loudly(**processor([picture(i)], ["no"])).logits for i in (1, 2))
    assert (one - two).abs().max() > 0.01


def test_outputs_with_and_without_labels() -> None:
    model, _ = loud("siglip", "gemma")
    batch = lay_out(model, ROWS, labels=True)
    out = model(**batch)
    assert out.logits is None and out.loss.ndim == out.loss_sum.ndim == out.loss_weight.ndim == 0
    assert torch.allclose(out.loss * out.loss_weight, out.loss_sum) and float(out.loss_weight) == 5
    assert out.image_hidden_states.shape == (2 * IMAGE_TOKENS, 32)
    del batch["labels"]
    out = model(**batch)
    assert out.loss is None and out.loss_sum is None
    assert out.logits.shape == (2, 11, model.config.text_config.vocab_size)
    last = model(**batch, logits_to_keep=1).logits
    assert torch.allclose(last, out.logits[:, -1:], atol=1e-5)
    some = model(**batch, logits_to_keep=torch.tensor([0, 3])).logits
    assert torch.allclose(some, out.logits[:, [0, 3]], atol=1e-5)


def test_precomputed_features_equal_pixels() -> None:
    """Cached tower features give the same loss; the tower is then not run."""
    for encoder in ("siglip", "siglip2_naflex"):
        model, processor = loud(encoder, "gemma")
        images = [picture(1, (60, 30)), picture(2, (20, 90))]
        batch = processor(images, ["caption en", "no"], ["a red square", "yes"])
        with torch.no_grad():
            assert batch.pixel_values is not None
            encoded = model.encode(batch.pixel_values, batch.pixel_attention_mask, batch.spatial_shapes)
            rest = {name: batch[name] for name in batch.keys() if "pixel" not in name and name != "spatial_shapes"}
            called: list[int] = []
            handle = model.model.vision_tower.register_forward_hook(lambda *_, called=called: called.append(1))
            assert torch.equal(model(**rest, encoded=encoded).loss, model(**batch).loss)
            handle.remove()
        assert called == [1]
        assert isinstance(encoded, EncoderOutput)


def test_several_images_and_none_in_one_batch() -> None:
    model, processor = loud("siglip", "gemma")
    groups = [[picture(1), picture(2)], [], [picture(3)]]
    with torch.no_grad():
        whole = processor(groups, ["caption en", "no", "yes"])
        logits = model(**whole).logits
        for row, group in enumerate(groups):
            alone = model(**processor([group] if group else None, [["caption en", "no", "yes"][row]])).logits[0]
            assert torch.allclose(logits[row, whole.attention_mask[row].bool()], alone, atol=2e-5)
        swapped = model(**processor([groups[0][::-1], [], groups[2]], ["caption en", "no", "yes"])).logits
    assert (swapped[0] - logits[0])[whole.attention_mask[0].bool()].abs().max() > 1e-3
    assert (swapped[1:] - logits[1:]).abs().max() < 2e-5


def test_placeholder_counts_are_checked() -> None:
    """The message names the sample, the number of placeholders and the number of tokens."""
    model, _ = loud("siglip", "gemma")
    batch = lay_out(model, ROWS)
    fewer = {**batch, "input_ids": batch["input_ids"].clone()}
    fewer["input_ids"][1, 0] = 20
    with pytest.raises(DataError, match=r"sample 1 .* 3 image placeholders, .* give 4 tokens"):
        model(**fewer)
    with pytest.raises(DataError, match=r"sample 1 .* 4 image placeholders, .* give 0 tokens"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    three = torch.cat([batch["pixel_values"], batch["pixel_values"][:1]])
    with pytest.raises(DataError, match="3 images, but the placeholders of the batch take only the first 2"):
        model(**{**batch, "pixel_values": three})
    with pytest.raises(DataError, match="8 image placeholders but no pixel_values"):
        model(**{name: value for name, value in batch.items() if name != "pixel_values"})


def test_inputs_are_checked() -> None:
    model, _ = loud("siglip", "gemma")
    batch = lay_out(model, ROWS)
    with pytest.raises(DataError, match="token_type_ids is missing"):
        model(**{name: value for name, value in batch.items() if name != "token_type_ids"})
    with pytest.raises(DataError, match="exactly one of"):
        model(token_type_ids=batch["token_type_ids"])
    with pytest.raises(ConfigError, match=r"reads images of 3x28x28, got \(3, 42, 42\)"):
        model(**{**batch, "pixel_values": torch.zeros(2, 3, 42, 42)})


def test_arguments_that_nothing_would_read_are_refused() -> None:
    """Alone or beside the others; the same for the model without its output layer."""
    model, processor = loud("siglip", "gemma")
    naflex, other = loud("siglip2_naflex", "gemma")
    batch = lay_out(model, ROWS, labels=True)
    texts = {name: value for name, value in batch.items() if name not in ("pixel_values", "labels")}
    pixels, mask = batch["pixel_values"], torch.ones(2, 4, dtype=torch.int64)
    shapes = torch.tensor([[2, 2]] * 2)
    with torch.no_grad():
        encoded = model.encode(pixels)
        embeds, _ = model.model.embed(batch["input_ids"], encoded)
    ready = {**texts, "inputs_embeds": embeds, "input_ids": None}
    for given, message in (
        ({**ready, "pixel_values": pixels}, "inputs_embeds beside pixel_values: .* the pictures would be ignored"),
        ({**ready, "encoded": encoded}, "inputs_embeds beside encoded"),
        ({**texts, "pixel_values": pixels, "encoded": encoded}, "encoded beside pixel_values: both are the pictures"),
        ({**texts, "encoded": encoded, "spatial_shapes": shapes}, "encoded beside spatial_shapes"),
        ({**texts, "pixel_attention_mask": mask}, "pixel_attention_mask without pixel_values"),
        ({**texts, "spatial_shapes": shapes}, "spatial_shapes without pixel_values"),
        ({**texts, "pixel_values": pixels, "spatial_shapes": shapes}, "siglip tower does not read spatial_shapes"),
        ({**texts, "pixel_values": pixels, "pixel_value": pixels}, r"reads pixel_value \(did you mean 'pixel_values'"),
        ({**texts, "pixel_values": pixels, "cache_position": mask}, "nothing in the model reads cache_position"),
        ({**batch, "labels": batch["labels"][:, :-1]}, r"labels have shape \(2, 10\), the tokens \(2, 11\)"),
        ({**batch, "cache": 1, "past_key_values": 2}, "two names of one argument"),
    ):
        for forward in (model, model.model):
            with pytest.raises(DataError, match=message):
                forward(**given)
    blank = {**texts, "input_ids": texts["input_ids"].clamp(max=200), "pixel_values": pixels}
    with pytest.raises(DataError, match="2 images, but the placeholders of the batch take only the first 0"):
        model(**blank)
    whole = other([picture(1)], ["no"])
    for missing in ("spatial_shapes", "pixel_attention_mask"):
        with pytest.raises(DataError, match=f"siglip2_naflex tower needs {missing}"):
            naflex(**{name: whole[name] for name in whole if name != missing})
    plain = {name: value for name, value in batch.items() if name != "labels"}
    for given, message in (
        ({**plain, "reduction": "example"}, "reduction='example' without labels"),
        ({**plain, "reduction": "tokens"}, "did you mean 'token'"),
        ({**plain, "skip_logits": True}, "neither a loss nor logits"),
        ({**batch, "skip_logits": True, "logits_to_keep": 1}, "skip_logits=True beside logits_to_keep"),
    ):
        with pytest.raises(ConfigError, match=message):
            model(**given)
    with pytest.raises(ConfigError, match="output_attentions=True with sdpa attention"):
        model(**plain, output_attentions=True)
    with pytest.raises(DataError, match="images beside grids"):
        processor([picture(1)], ["no"], grids=[[(2, 2)]])
    assert model(**plain, output_attentions=None, image_sizes=None).logits is not None
    with pytest.raises(GenerationError, match="packed samples"):
        generate_ids(model, replace(processor([picture(1)], ["no"]), sequence_ids=mask), GenerationConfig())


def test_packed_samples_after_a_cache_are_refused() -> None:
    model, _ = loud("siglip", "gemma")
    packed = lay_out(model, [[sample(3, 0, 1), sample(4, 0, 2)]])
    with torch.no_grad(), pytest.raises(DataError, match="sequence_ids beside a filled cache"):
        model.generate(**packed, max_new_tokens=3, do_sample=False)


ATTENTION = (
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "sdpaa",
    "paged|sdpa",
    "kernels-community/x",
    "",
)


@pytest.mark.parametrize("wanted", ATTENTION)
def test_attention_backends_that_there_are_not(wanted: str, tmp_path: Path) -> None:
    """One error, with what is supported: while a model opens, is built from a configuration, or changes."""
    model, processor = loud("siglip", "gemma")
    message = "is not supported.*supported: sdpa, eager"
    for asked in (wanted, {"text_config": wanted}, {"vision_config": wanted}):
        with pytest.raises(ConfigError, match=message):
            model.set_attn_implementation(asked)
    with pytest.raises(ConfigError, match=message):
        vlm.load(tmp_path / "not-read", attn_implementation=wanted)
    vlm.save(model, processor, tmp_path / "m")
    for asked in (wanted, {"text_config": wanted}):
        with pytest.raises(ConfigError, match=message):
            AutoModelForImageTextToText.from_pretrained(tmp_path / "m", attn_implementation=asked)
    with pytest.raises(ConfigError, match=r"names 'decoder', expected the parts vision_config and text_config"):
        model.set_attn_implementation({"decoder": "eager"})
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_attention_of_ones_own() -> None:
    """A function registered with transformers gets the mask, and may be chosen."""
    model = copy.deepcopy(loud("siglip", "gemma")[0])
    batch = lay_out(model, ROWS)
    seen: list[bool] = []

    def own(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
        seen.append(attention_mask is not None)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)

    AttentionInterface.register("of_ones_own", own)
    try:
        with torch.no_grad():
            wanted = model(**batch).logits
            model.set_attn_implementation({"text_config": "of_ones_own"})
            assert torch.allclose(model(**batch).logits, wanted, atol=1e-5)
    finally:
        del AttentionInterface._global_mapping["of_ones_own"]
    assert seen == [True, True]


def test_embeddings_are_scaled_once() -> None:
    """Text embeddings carry sqrt(D), image tokens do not: the merged sequence, entry by entry."""
    model, _ = loud("siglip", "gemma")
    batch = lay_out(model, ROWS)
    with torch.no_grad():
        encoded = model.encode(batch["pixel_values"])
        merged, tokens = model.model.embed(batch["input_ids"], encoded)
        projected = model.model.multi_modal_projector(encoded.features, None, encoded.grid)[0]
    table = model.model.language_model.embed_tokens.weight
    for row in range(2):
        assert torch.equal(merged[row, :4], projected[row]) and torch.equal(
            tokens[4 * row : 4 * row + 4], projected[row]
        )
        words = table[batch["input_ids"][row, 4:]] * 32**0.5
        assert torch.allclose(merged[row, 4:], words, rtol=1e-5)


def test_attention_switch_reaches_tower_and_decoder() -> None:
    model, _ = tiny()
    for wanted in ("eager", "sdpa"):
        model.set_attn_implementation(wanted)
        assert model.model.language_model.config._attn_implementation == wanted
        assert model.model.vision_tower.config._attn_implementation == wanted


def test_attentions_and_hidden_states_on_request() -> None:
    model, _ = loud("siglip", "gemma", "eager")
    batch = lay_out(model, ROWS)
    with torch.no_grad():
        out = model(**batch, output_attentions=True, output_hidden_states=True)
    length = batch["input_ids"].shape[1]
    assert len(out.attentions) == 2 and out.attentions[0].shape == (2, 4, length, length)
    assert len(out.hidden_states) == 3
    real = batch["attention_mask"].bool()
    for weights in out.attentions:
        rows = weights.transpose(1, 2)[real]  # [R, heads, keys]
        assert torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-5)
        assert weights[0, :, real[0], -1].max() == 0  # the padding key of the shorter row


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": "siglipp"}, "did you mean 'siglip'"),
        ({"encoder": "../evil"}, "unknown encoder"),
        ({"encoder": "os"}, "unknown encoder"),
        ({"projector_config": {"kind": "linaer"}}, "did you mean 'linear'"),
        ({"text_config": {"model_type": "llama"}}, "decoder model_type is 'llama'"),
        ({"text_config": {"hidden_size": 8}}, "decoder model_type is None"),
        ({"text_config": {"model_type": "gemma", "vocab_size": 10}, "image_token_id": 10}, "outside the decoder's"),
        ({"encoder": "siglip", "vision_config": {"model_type": "siglip2_vision_model"}}, "one of the two is wrong"),
    ],
)
def test_configuration_is_checked(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VLMConfig(**values)


def test_projector_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        tiny(projector={"kind": "mlp", "dept": 3})
    with pytest.raises(ConfigError, match="depth is 1"):
        tiny(projector={"kind": "mlp", "depth": 1})
    model, _ = tiny(projector={"kind": "mlp", "depth": 3})
    assert len(model.model.multi_modal_projector.layers) == 3


def test_configuration_round_trip() -> None:
    model, _ = tiny("siglip2_naflex", "gemma3_text", "mlp")
    again = VLMConfig.from_dict(model.config.to_dict())
    assert again.to_dict() == model.config.to_dict()
    assert type(again.text_config) is type(model.config.text_config)
    assert type(again.vision_config) is type(model.config.vision_config)


def test_a_model_needs_its_placeholder() -> None:
    with pytest.raises(ConfigError, match="image_token_id is not set"):
        VLM(VLMConfig(text_config={"model_type": "gemma", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}))


def test_seed_fixes_the_weights_and_leaves_the_random_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, _ = tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    two, three = tiny(seed=1)[0].state_dict(), tiny(seed=2)[0].state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.state_dict().items())
    assert not torch.equal(two["lm_head.weight"], three["lm_head.weight"])
    assert isinstance(one.model, VLMModel)


def test_inputs_carry_every_argument_of_the_inner_forward() -> None:
    """An argument that is in the signature, but not in `Inputs`, would be dropped in silence."""
    named = set(inspect.signature(VLMModel.forward).parameters) - {"self", "kwargs", "past_key_values"}
    assert named == {field.name for field in fields(Inputs)} == set(Inputs().arguments())
    outer = set(inspect.signature(VLM.forward).parameters)
    assert named < outer
