"""The catalogue of released checkpoints: its numbers against configurations built without memory, its claims against
its own figures."""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from vlm import cli
from vlm.catalogue.choice import BYTES, memory_bytes, picks, uses
from vlm.catalogue.released import Checkpoint, find, load
from vlm.cli.commands import models
from vlm.errors import ConfigError

SIGLIP = [one for one in load().checkpoints if one.decoder is None]
PALIGEMMA = [one for one in load().checkpoints if one.decoder is not None]


def tower(name: str) -> dict[str, int]:
    shape = load().towers[name]
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp,
    }


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # tied ones once


def two_towers(one: Checkpoint) -> Any:
    """Transformers' own model of its configuration, without memory."""
    text = {
        **tower("So400m" if one.tower == "g-opt" else one.tower),
        "vocab_size": one.vocabulary,
        "max_position_embeddings": one.context,
        "projection_size": load().towers[one.tower].width,
    }
    vision = {**tower(one.tower), "patch_size": one.patch}
    with torch.device("meta"):
        if one.image_size is None:
            return Siglip2Model(Siglip2Config(vision_config={**vision, "num_patches": 256}, text_config=text))
        return SiglipModel(SiglipConfig(vision_config={**vision, "image_size": one.image_size}, text_config=text))


@pytest.mark.parametrize("one", SIGLIP, ids=lambda one: one.name)
def test_parameters_of_siglip(one: Checkpoint) -> None:
    model = two_towers(one)
    vision, text = model.vision_model, model.text_model
    assert one.parameters == {
        "vision": count(vision),
        "vision_without_head": count(vision) - count(vision.head),
        "text": count(text),
        "text_without_head": count(text) - count(text.head),
        "total": count(model),
    }


def paligemma(one: Checkpoint) -> Any:
    assert one.decoder is not None
    shape = load().decoders[one.decoder]
    text = {
        "model_type": shape.model_type,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": one.vocabulary,
    }
    vision = {
        "model_type": "siglip_vision_model",
        **tower(one.tower),
        "patch_size": one.patch,
        "image_size": one.image_size,
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=shape.width, image_token_index=257152
    )
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(config)
    model.tie_weights()
    return model


SHAPES = {(one.decoder, one.image_size): one for one in PALIGEMMA}


@pytest.mark.parametrize("one", SHAPES.values(), ids=lambda one: f"{one.decoder} {one.image_size}")
def test_parameters_of_paligemma(one: Checkpoint) -> None:
    model = paligemma(one)
    expected = {
        "vision": count(model.model.vision_tower),
        "projector": count(model.model.multi_modal_projector),
        "decoder": count(model.model.language_model),
        "total": count(model),
    }
    same = [other for other in PALIGEMMA if (other.decoder, other.image_size) == (one.decoder, one.image_size)]
    assert {json.dumps(other.parameters) for other in same} == {json.dumps(expected)}


def test_what_is_released() -> None:
    """As many as Google's lists have: big_vision's two READMEs and the collections on the Hub."""
    families: dict[str, int] = {}
    for one in load().checkpoints:
        key = "fine-tuned" if one.fine_tuned else one.family
        families[key] = families.get(key, 0) + 1
    # SigLIP's ten and MedSigLIP; SigLIP 2's fifteen of one size and two of any; 3 + 2, and 9 + 6 PaliGemmas; 25 tasks
    # at two sizes, six of them at a third, and DOCCI twice.
    expected = {"siglip": 11, "siglip2": 15, "siglip2_naflex": 2, "paligemma": 5, "paligemma2": 15, "fine-tuned": 58}
    assert families == expected
    assert len({one.id for one in load().checkpoints}) == sum(expected.values())


def test_records_agree_with_themselves() -> None:
    catalogue = load()
    for one in catalogue.checkpoints:
        assert one.id.startswith("google/") and catalogue.source(one)
        assert set(one.published) <= set(catalogue.figures), one.id
        if one.image_size is None:
            assert one.imagenet_by_patches["256"] == one.published["imagenet"]
            continue
        assert one.tokens == (one.image_size // one.patch) ** 2
        stated = re.findall(r"patch(\d+)-(\d+)", one.id) or re.findall(r"()-(\d{3})$", one.id)
        assert stated == [(str(one.patch) if stated[0][0] else "", str(one.image_size))], one.id


def best(figure: str, among: Callable[[Checkpoint], bool] = lambda one: True) -> float:
    values = [one.published[figure] for one in load().checkpoints if among(one) and figure in one.published]
    return max(values)


def test_what_the_uses_claim() -> None:
    first = {use: picks(use)[0].checkpoint for use in uses()}
    assert first["retrieval"].published["coco_t2i"] == best("coco_t2i")
    assert first["classification"].published["imagenet"] == best("imagenet")
    assert first["multilingual"].published["xm3600_t2i"] == best("xm3600_t2i")
    assert first["document"].published["docvqa"] == best("docvqa", lambda one: not one.fine_tuned)
    assert first["edge"].tokens == min(one.tokens for one in load().checkpoints)
    fewest = next(pick for pick in picks("edge") if "the fewest" in pick.why).checkpoint
    assert fewest.parameters["total"] == min(one.parameters["total"] for one in load().checkpoints)
    giant, next_best = (pick.checkpoint.published["coco_t2i"] for pick in picks("retrieval")[:2])
    assert math.isclose(giant - next_best, 0.1)
    old = best("coco_t2i", lambda one: one.family == "siglip" and "384" in one.id)
    ours = next(pick for pick in picks("retrieval") if "any SigLIP of the first version" in pick.why).checkpoint
    assert ours.published["coco_t2i"] > best("coco_t2i", lambda one: one.family == "siglip") >= old


def test_sentences_hold_no_unfilled_field() -> None:
    for use in uses():
        reasons = [pick.why for pick in picks(use)]
        assert reasons and all("{" not in why for why in reasons)


def test_memory() -> None:
    (small,) = find(["siglip-base-patch16-224"])
    assert memory_bytes(small) == 2 * 203_155_970 + 750_000_000
    assert memory_bytes(small, "float32") == 4 * 203_155_970 + 750_000_000
    (large,) = find(["google/paligemma-3b-pt-896"])
    # 18 layers, one key and one value of 256 numbers, two bytes each, for 4096 image tokens and 512 of text.
    assert memory_bytes(large) == 2 * 2_927_890_160 + 18 * 2 * 256 * 2 * (4096 + 512) + 750_000_000


def test_names_are_found_by_their_words() -> None:
    assert [one.name for one in find(["siglip2", "naflex"])] == [
        "siglip2-base-patch16-naflex",
        "siglip2-so400m-patch16-naflex",
    ]
    assert [one.id for one in find(["siglip-so400m-patch14-224"])] == ["google/siglip-so400m-patch14-224"]
    with pytest.raises(ConfigError, match="no released checkpoint has 'siglip3'"):
        find(["siglip3"])
    with pytest.raises(ConfigError, match="unknown use 'retrievel' .*retrieval"):
        picks("retrievel")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert cli.main(["models", *words]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_options_name_every_use() -> None:
    hints = typing.get_type_hints(models.Options)
    choices, dtypes = (typing.get_args(typing.get_args(hints["use"])[0]), typing.get_args(hints["dtype"]))
    assert set(choices) == set(uses()) and set(dtypes) == set(BYTES)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "--use", "retrieval", "--fit", "2GB")
    assert out.splitlines()[2].startswith("-> google/siglip2-base-patch16-384")
    assert "3 of 5 need more than 2 GB in bfloat16" in err
    out, _ = run(capsys, "--json", "--use", "multilingual")
    assert [json.loads(out)[0][key] for key in ("id", "licence")] == [
        "google/siglip-so400m-patch16-256-i18n",
        "Apache-2.0",
    ]
    assert "42" not in json.loads(out)[0]["why"] and "50.0 %" in json.loads(out)[0]["why"]


def test_a_size_that_is_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--fit", "foo"]) == 2
    assert "'foo' is not a size; write it as 5GB" in capsys.readouterr().err


def test_the_command_shows_text_rules_and_traps(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "siglip-so400m-patch14-224")
    assert "16 positions" in out and "lower" in out and "trap: 16 text positions" in " ".join(out.split())
    out, _ = run(capsys)
    assert len(out.splitlines()) == 2 + 48 + 2  # heading and rule, all but the 58, an empty line and a note
    assert "58 more are fine-tuned" in out
