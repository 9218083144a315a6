"""`vlm.check` on what goes into a model: special tokens in texts, image tokens, pixels, labels."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud
from PIL import Image

import vlm.model.merge
from vlm import check
from vlm.check.checks.texts import spellings
from vlm.check.report import Result
from vlm.data.examples import Example
from vlm.model.batch import Batch
from vlm.model.forward import VLM
from vlm.model.processor import Processor
from vlm.text.prompts import EncodedText, PromptEncoder
from vlm.text.tokenizer import TextEncoder


def pair(encoder: str = "siglip") -> tuple[VLM, Processor]:
    """A tiny model and a processor of its own, to be broken."""
    model, processor = loud(encoder, "gemma")
    return model, Processor(processor.tokenizer, processor.image_transform)


def one(name: str, model: VLM, processor: Processor, **options: Any) -> Result:
    return check.run(model, processor, only=[name], **options)[name]


each_encoder = pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])


# --- special tokens


def test_special_text_tries_the_known_tokens_in_full_width_too() -> None:
    typed = spellings("<image>")
    assert "<image>" in typed and "\uff1cimage\uff1e" in typed and "<<image>image>" in typed
    assert any("\uff49\uff4d\uff41\uff47\uff45" in text for text in typed)  # all letters full width
    model, processor = pair()
    result = one("special-text", model, processor)
    assert result.status == "ok" and result.measured == 0
    # <image>, <bos>, <eos>, <pad>, <unk>, <mask>
    assert result.detail.startswith(f"of {6 * len(typed)} texts")


def as_the_tokenizer_would(self: TextEncoder, text: str, *, coordinates: bool = True) -> list[int]:
    return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def after_nfkc(self: TextEncoder, text: str, *, coordinates: bool = True) -> list[int]:
    """Filters strings, then a normaliser makes control tokens of full-width ones."""
    if any(token in text for token in self._control):
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return as_the_tokenizer_would(self, unicodedata.normalize("NFKC", text))


def without_special(self: TextEncoder, text: str, *, coordinates: bool = True) -> list[int]:
    """No control id, but the user's text is gone."""
    ids = as_the_tokenizer_would(self, text)
    return [index for index in ids if index not in self._control.values()] or [10]


@pytest.mark.parametrize(
    ("encode", "says"),
    [
        (as_the_tokenizer_would, "a control id from: '<"),
        (after_nfkc, "a control id from: '\uff1c"),
        (without_special, "text lost of: '<"),
    ],
)
def test_special_tokens_that_get_through_fail(
    encode: Callable[..., list[int]], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = pair()
    monkeypatch.setattr(TextEncoder, "__call__", encode)
    result = one("special-text", model, processor)
    assert result.status == "FAIL" and result.detail.startswith(says), result
    assert result.measured is not None and result.measured > 0


def test_only_the_placeholder_getting_through_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair()
    encode = TextEncoder.__call__

    def image_passes(self: TextEncoder, text: str, **named: Any) -> list[int]:
        return [processor.image_token_id] if text == "<image>" else encode(self, text, **named)

    monkeypatch.setattr(TextEncoder, "__call__", image_passes)
    result = one("special-text", model, processor)
    assert result.status == "FAIL" and result.measured == 1


# --- image tokens


@each_encoder
def test_one_placeholder_too_many_fails(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair(encoder)
    assert one("image-tokens", model, processor).status == "ok"
    monkeypatch.setattr(Processor, "num_image_tokens", lambda self, grid: grid[0] * grid[1] + 1)
    result = one("image-tokens", model, processor)
    assert result.status == "FAIL" and result.measured == 1 and "placeholders" in result.detail


def test_counts_that_are_wrong_for_thin_images_only_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair("siglip2_naflex")
    monkeypatch.setattr(Processor, "num_image_tokens", lambda self, grid: max(2, grid[0]) * max(2, grid[1]))
    assert one("image-tokens", model, processor).status == "FAIL"


@each_encoder
def test_a_model_that_takes_any_count_fails(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair(encoder)
    monkeypatch.setattr(vlm.model.merge, "images_per_sample", lambda placeholders, counts: [])
    result = one("image-tokens", model, processor)
    assert result.status == "FAIL" and "one placeholder too few without a word" in result.detail


# --- image range


@each_encoder
@pytest.mark.parametrize(
    "changes",
    [
        {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},  # ImageNet's
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
        {"std": (0.51, 0.5, 0.5)},
    ],
)
def test_another_normalisation_fails(encoder: str, changes: dict[str, Any]) -> None:
    model, processor = pair(encoder)
    processor.image_transform = replace(processor.image_transform, **changes)
    result = one("image-range", model, processor)
    assert result.status == "FAIL" and f"the {encoder} tower expects mean (0.5, 0.5, 0.5)" in result.detail


@each_encoder
def test_any_filter_is_in_range(encoder: str) -> None:
    model, processor = pair(encoder)
    for resample in ("bilinear", "bicubic"):
        processor.image_transform = replace(processor.image_transform, resample=resample)
        assert one("image-range", model, processor).status == "ok"


def test_pixels_of_another_size_fail() -> None:
    cases: list[tuple[str, Any]] = [("siglip", {"image_size": 42}), ("siglip2_naflex", {"patch_size": 16})]
    for encoder, changes in cases:
        model, processor = pair(encoder)
        processor.image_transform = replace(processor.image_transform, **changes)
        result = one("image-range", model, processor)
        assert result.status == "FAIL" and "pixels have the shape" in result.detail


def damage(change: Callable[[Any], Any]) -> Callable[..., Any]:
    call = Processor.__call__

    def changed(self: Processor, *args: Any, **named: Any) -> Batch:
        batch = call(self, *args, **named)
        return batch if batch.pixel_values is None else replace(batch, pixel_values=change(batch.pixel_values))

    return changed


@pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: x.masked_fill(x > 0.9, torch.nan), lambda x: -x])
def test_other_pixels_fail(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair()
    monkeypatch.setattr(Processor, "__call__", damage(change))
    assert one("image-range", model, processor).status == "FAIL"


def test_only_the_photo_out_of_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat images hide a sharpening filter."""
    model, processor = pair()
    monkeypatch.setattr(Processor, "__call__", damage(lambda x: x + 2 * (x - x.mean(-1, keepdim=True))))
    assert one("image-range", model, processor).status == "FAIL"


# --- labels


def examples(*suffixes: str | None) -> list[Example]:
    image = Image.new("RGB", (8, 8))
    return [
        Example(f"e{i}", image, "caption en", suffix, (), (), "train.jsonl", i + 1) for i, suffix in enumerate(suffixes)
    ]


GOOD = examples("a red square", "yes", "a green circle left of a blue triangle", "<eos> \u00e9\U0001f600 <image>")


def test_labels_are_counted() -> None:
    model, processor = pair()
    result = one("labels", model, processor, data=GOOD)
    counts = [
        len(processor.tokenizer(e.suffix, add_special_tokens=False, split_special_tokens=True)["input_ids"]) + 1
        for e in GOOD[:3]
    ]
    assert result.status == "ok" and result.measured == min(counts)
    assert "of 4 examples (mean" in result.detail and result.detail.endswith("0 cut")


def test_labels_from_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "prefix": "caption en", "suffix": text} for text in ("a red square", "no")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, processor = pair()
    result = one("labels", model, processor, data=tmp_path / "train.jsonl")
    assert result.status == "ok" and "of 2 examples" in result.detail


def test_cut_suffixes_are_counted_and_are_no_failure() -> None:
    model, processor = pair()
    head = (
        len(processor(text=["caption en"], suffix=["yes"]).input_ids[0])
        - 1
        - len(processor.tokenizer("yes", add_special_tokens=False)["input_ids"])
    )
    result = one("labels", model, processor, data=GOOD, max_text_length=head + 4)
    assert result.status == "ok" and result.measured is not None and result.measured <= 4
    cut = sum(len(processor(text=[e.prefix], suffix=[e.suffix or ""]).input_ids[0]) > head + 4 for e in GOOD)
    assert cut and f"{cut} cut at {head + 4} text tokens" in result.detail


def test_data_that_supervises_nothing_fails() -> None:
    model, processor = pair()
    result = one("labels", model, processor, data=examples(None, None))
    assert result.status == "FAIL" and result.measured == 0 and "nothing is supervised" in result.detail


def test_a_prefix_that_does_not_fit_fails_by_name() -> None:
    model, processor = pair()
    data = [*GOOD, replace(GOOD[0], id="long", prefix="caption en " * 20)]
    result = one("labels", model, processor, data=data, max_text_length=60)
    assert result.status == "FAIL" and "1 wrong: sample 'long'" in result.detail


def prompt_supervised(batch: Batch) -> Batch:
    assert batch.labels is not None
    return replace(batch, labels=torch.where(batch.attention_mask.bool(), batch.input_ids, -100))


def shifted(batch: Batch) -> Batch:
    """Labels moved by one, as some code expects them."""
    assert batch.labels is not None
    return replace(batch, labels=batch.labels.roll(-1, 1))


def ignored(batch: Batch) -> Batch:
    assert batch.labels is not None
    return replace(batch, labels=torch.full_like(batch.labels, -100))


def newline_supervised(batch: Batch) -> Batch:
    """The boundary one token too early, types and labels alike."""
    assert batch.labels is not None
    types, labels = batch.token_type_ids.clone(), batch.labels.clone()
    for row in range(len(types)):
        first = int((types[row] == 1).int().argmax())
        types[row, first - 1] = 1
        labels[row, first - 1] = batch.input_ids[row, first - 1]
    return replace(batch, token_type_ids=types, labels=labels)


def types_everywhere(batch: Batch) -> Batch:
    return replace(batch, token_type_ids=torch.ones_like(batch.token_type_ids))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (prompt_supervised, "supervised tokens and suffix"),
        (shifted, "a label is not the token at its place"),
        (ignored, "no token is supervised"),
        (newline_supervised, "supervised text is"),
        (types_everywhere, "supervised tokens and suffix"),
    ],
)
def test_wrong_labels_fail(change: Callable[[Batch], Batch], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair()
    call = Processor.__call__
    monkeypatch.setattr(Processor, "__call__", lambda self, *a, **k: change(call(self, *a, **k)))
    result = one("labels", model, processor, data=GOOD[:3])
    assert result.status == "FAIL" and says in result.detail, result
    assert "train.jsonl:1: example 'e0'" in result.detail


def test_labels_that_forget_the_image_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for texts, off by the placeholders where there is an image."""
    model, processor = pair()
    call = Processor.__call__

    def moved(self: Processor, *args: Any, **named: Any) -> Batch:
        batch = call(self, *args, **named)
        assert batch.labels is not None
        labels = batch.labels if batch.pixel_values is None else batch.labels.roll(-4, 1)
        return replace(batch, labels=labels)

    monkeypatch.setattr(Processor, "__call__", moved)
    result = one("labels", model, processor, data=GOOD)
    assert result.status == "FAIL" and "example 'e0' with its image: a label is not the token" in result.detail


def no_eos(encoded: EncodedText) -> EncodedText:
    return replace(encoded, suffix=encoded.suffix[:-1])


def eos_after_a_cut(encoded: EncodedText) -> EncodedText:
    return replace(encoded, suffix=[*encoded.suffix[:-1], 1]) if encoded.truncated else encoded


def no_bos(encoded: EncodedText) -> EncodedText:
    return replace(encoded, prefix=encoded.prefix[1:])


def prefix_cut(encoded: EncodedText) -> EncodedText:
    return replace(encoded, prefix=[encoded.prefix[0], *encoded.prefix[3:]])


@pytest.mark.parametrize(
    ("change", "max_length", "says"),
    [
        (no_eos, None, "the last supervised token is not EOS"),
        (eos_after_a_cut, 8, "EOS after a cut"),
        (no_bos, None, "does not begin with BOS"),
        (prefix_cut, None, "unsupervised text is"),
    ],
)
def test_wrong_prompts_fail(
    change: Callable[[EncodedText], EncodedText], max_length: int | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = pair()
    encode = PromptEncoder.__call__
    monkeypatch.setattr(PromptEncoder, "__call__", lambda self, *a, **k: change(encode(self, *a, **k)))
    result = one("labels", model, processor, data=GOOD[:3], max_text_length=max_length)
    assert result.status == "FAIL" and says in result.detail, result


def test_the_processor_is_not_changed() -> None:
    model, processor = pair()
    before = copy.deepcopy(processor.image_transform), len(processor.tokenizer)
    check.run(model, processor, data=GOOD, only=["labels", "special-text", "image-range", "image-tokens"])
    assert (processor.image_transform, len(processor.tokenizer)) == before
