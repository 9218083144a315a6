"""Text rules by family, against sentencepiece and the originals' own words for what happens around it, and against
transformers' tokenizers where these follow them."""

from __future__ import annotations

import logging
import string
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from dualtools import FAMILIES, checkpoint, pieces, tokenizer
from transformers import Siglip2Tokenizer

from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.images.transforms import ImageTransform
from vlm.siglip import RULES, DualProcessor, load
from vlm.siglip.rules import table

TEXTS = [
    "A photo of a Red CAT.",
    "two big dogs, one small bird!",
    "Café  ÉTÉ über\t12",
    "",
    "!?",
    "snake_case_name",
    "the quick brown fox " * 9,
    "猫 <eos> </s> <pad> <unk> <bos>",
]
TRANSFORM = ImageTransform(mode="squash", image_size=28, patch_size=14)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: pieces(tmp_path_factory.mktemp(family), family) for family in ("siglip", "siglip2")}


def processor(models: dict[str, Path], family: str, context: int, **settings: Any) -> DualProcessor:
    return DualProcessor(TRANSFORM, tokenizer(models[family], family, **settings), RULES[family], context)


def sticky(tokens: list[int], eos: int, length: int, pad: int) -> list[int]:
    """big_vision's `tokenize(max_len, eos="sticky", pad_value)`: its own worked examples are the next test."""
    tokens = [*tokens, eos]
    if len(tokens) >= length:
        return [*tokens[: length - 1], tokens[-1]]
    return tokens + [pad] * (length - len(tokens))


def test_the_originals_examples() -> None:
    """Of its docstring, with id("</s>")=1 and id("a")=2."""
    assert [sticky([2] * n, 1, 3, 0) for n in (1, 2, 3)] == [[2, 1, 0], [2, 2, 1], [2, 2, 1]]
    assert [sticky([2] * n, 1, 3, 1) for n in (1, 2, 3)] == [[2, 1, 1], [2, 2, 1], [2, 2, 1]]


def canonical(text: str) -> str:
    """big_vision's `canonicalize_text`, step by step."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower()
    return " ".join(text.split())


@pytest.mark.parametrize("context", [5, 16, 64])
def test_siglip_is_the_original(models: dict[str, Path], context: int) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(models["siglip"]))
    rows = [original.encode(canonical(text)) for text in TEXTS]
    got = processor(models, "siglip", context).texts(TEXTS)
    assert got.input_ids.tolist() == [sticky(row, 1, context, 1) for row in rows]
    assert got.cut == tuple(i for i, row in enumerate(rows) if len(row) + 1 > context)


@pytest.mark.parametrize("context", [5, 16, 64])
def test_siglip2_is_the_original(models: dict[str, Path], context: int) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(models["siglip2"]))
    rows = [original.encode(text.lower()) for text in TEXTS]
    got = processor(models, "siglip2", context).texts(TEXTS)
    assert got.input_ids.tolist() == [sticky(row, 1, context, 0) for row in rows]
    assert got.cut == tuple(i for i, row in enumerate(rows) if len(row) + 1 > context)


def test_siglip_is_transformers_but_for_underscores(models: dict[str, Path]) -> None:
    theirs = tokenizer(models["siglip"], "siglip")
    ours = processor(models, "siglip", 16).texts(TEXTS).input_ids
    rows = theirs(TEXTS, padding="max_length", max_length=16, truncation=True)["input_ids"]
    different = [text for text, one, other in zip(TEXTS, ours.tolist(), rows, strict=True) if one != other]
    # transformers drops the blank of an underscore, and lets typed special tokens through.
    assert different == ["snake_case_name", TEXTS[-1]]


def test_siglip2_is_transformers_own_class(models: dict[str, Path], tmp_path: Path) -> None:
    """Which the NaFlex directories have."""
    tokenizer(models["siglip2"], "siglip2").save_pretrained(tmp_path)
    theirs = Siglip2Tokenizer.from_pretrained(tmp_path, padding_side="right")
    rows = theirs(TEXTS[:-1], padding="max_length", max_length=16, truncation=True)["input_ids"]
    assert processor(models, "siglip2", 16).texts(TEXTS[:-1]).input_ids.tolist() == rows


def test_what_a_plain_gemma_tokenizer_would_give(models: dict[str, Path]) -> None:
    """The trap of FixRes directories: their own tokenizer does not lower-case."""
    plain = tokenizer(models["siglip2"], "siglip2")
    given = plain("Red CAT", padding="max_length", max_length=16, truncation=True)["input_ids"]
    right = plain("red cat", padding="max_length", max_length=16, truncation=True)["input_ids"]
    ours = processor(models, "siglip2", 16).texts(["Red CAT"]).input_ids[0].tolist()
    assert ours == right != given


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [12, 16])
def test_the_length_is_that_of_the_position_table(
    models: dict[str, Path], family: str, context: int, tmp_path: Path
) -> None:
    checkpoint(tmp_path, family, context=context)
    kind = "siglip" if family == "siglip" else "siglip2"
    tokenizer(models[kind], kind, model_max_length=64).save_pretrained(tmp_path)
    model, read = load(tmp_path)
    assert (model.context, read.context, model.family, read.rule.family) == (context, context, kind, kind)
    assert read.texts(["a"]).input_ids.shape == (1, context)


# --- directories that contradict their rule ---------------------------------------------------------------------------


WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "siglip": [
        ({"padding_side": "left"}, "padding_side is left: padded on the right"),
        ({"pad_token": "<pad>"}, "pad_token is '<pad>': padded with '</s>' (id 1), the end token again"),
        ({"model_max_length": 64}, "model_max_length is 64: 12, the rows of the position table"),
        ({"do_lower_case": False}, "do_lower_case is false: lower-cased"),
        ({"model_input_names": ["input_ids", "attention_mask"]}, "attention_mask: no mask"),
        ({"eos_token": "<unk>"}, "eos_token is '<unk>': a text ends with '</s>' (id 1)"),
    ],
    "siglip2": [
        ({"padding_side": "left"}, "padding_side is left: padded on the right"),
        ({"pad_token": "<eos>"}, "pad_token is '<eos>': padded with '<pad>' (id 0)"),
        ({"model_max_length": 77}, "model_max_length is 77: 12, the rows of the position table"),
        ({"add_bos_token": True}, "puts '<bos>' before a text: left out"),
        ({"add_eos_token": False}, "ends a text without '<eos>': put there"),
        ({"model_input_names": ["input_ids", "attention_mask"]}, "attention_mask: no mask"),
    ],
}


@pytest.mark.parametrize(("family", "change", "told"), [(f, *case) for f, cases in WRONG.items() for case in cases])
def test_what_contradicts_the_rule_is_told_and_not_used(
    models: dict[str, Path],
    family: str,
    change: dict[str, Any],
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint(tmp_path, family)
    good = tokenizer(models[family], family, model_max_length=12)
    with caplog.at_level(logging.WARNING):
        right = load(tmp_path, tokenizer=good)[1].texts(TEXTS)
    assert "contradict" not in caplog.text
    broken = tokenizer(models[family], family, model_max_length=12)
    for name, value in change.items():
        setattr(broken, name, value)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        wrong = load(tmp_path, tokenizer=broken)[1].texts(TEXTS)
    assert f"{tmp_path}: the tokenizer's files contradict" in caplog.text and told in caplog.text
    assert torch.equal(right.input_ids, wrong.input_ids)


def test_a_tokenizer_of_another_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    checkpoint(tmp_path, "siglip2", vocabulary=60)
    with pytest.raises(CheckpointError, match="pieces, the text tower knows 60: it is not this checkpoint's"):
        load(tmp_path, tokenizer=tokenizer(models["siglip2"], "siglip2"))


def test_a_token_beyond_the_table_is_refused(models: dict[str, Path]) -> None:
    own = tokenizer(models["siglip2"], "siglip2")
    own.add_tokens(["zebra"])
    read = DualProcessor(TRANSFORM, own, RULES["siglip2"], 12, own.vocab_size)
    assert read.texts(["cat"]).cut == ()
    with pytest.raises(ConfigError, match=r"gives token \d+, the text tower has"):
        read.texts(["cat", "a zebra"])


def test_without_a_tokenizer_images_alone_are_read(tmp_path: Path) -> None:
    checkpoint(tmp_path, "siglip")
    _, read = load(tmp_path)
    with pytest.raises(ConfigError, match=r"no tokenizer, so it can read images only"):
        read.texts(["a"])


def test_texts_that_are_none(models: dict[str, Path]) -> None:
    read = processor(models, "siglip2", 12)
    assert read.texts([]).input_ids.shape == (0, 12)
    with pytest.raises(DataError, match="not valid Unicode"):
        read.texts(["a \ud800"])


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_documented_table_is_that_of_the_code() -> None:
    page = (Path(__file__).parent.parent / "docs" / "siglip.md").read_text()
    assert page.split("<!-- text rules -->\n")[1].split("<!-- end -->")[0].strip() == table()
