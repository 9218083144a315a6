"""`vlm.check` on two towers: each check passes on healthy models of every family, and fails where it is broken on
purpose."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from familytools import FAMILIES, dual
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from vlm.check import runner
from vlm.check.report import Result
from vlm.cli import main
from vlm.errors import ConfigError
from vlm.siglip.processor import DualProcessor, Texts
from vlm.siglip.saving import save

NAMES = [check.name for check in runner.DUAL_CHECKS]
NOT_FOR = {"siglip": {"naflex-padding"}, "siglip2": {"naflex-padding"}, "naflex": set(), "clip": {"naflex-padding"}}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, DualProcessor]:
    return (request.param, *dual(request.param))


def one(name: str, model: Any, processor: Any) -> Result:
    report = runner.run_dual(model, processor, only=[name])
    assert [result.name for result in report.results] == [name]
    return report[name]


def test_healthy_models_pass(pair: tuple[str, Any, DualProcessor]) -> None:
    family, model, processor = pair
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = runner.run_dual(model, processor, path="here")
    assert report.ok, report.table()
    assert {result.name for result in report.results if result.status == "n/a"} == NOT_FOR[family], report.table()
    assert json.loads(report.to_json())["results"][0]["name"] == NAMES[0] and report.model == "here"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_checks_are_chosen_by_name(pair: tuple[str, Any, DualProcessor]) -> None:
    _, model, processor = pair
    with pytest.raises(ConfigError, match=r"unknown check 'biass' \(did you mean 'bias'\?\); known: text-case, "):
        runner.run_dual(model, processor, only=["biass"])


# --- texts


class AsWritten(DualProcessor):
    """A processor that gives the text to the tokenizer as it is."""

    def texts(self, texts: Sequence[str]) -> Texts:
        rule = dataclasses.replace(self.rule, clean=str)
        return DualProcessor(self.transform, self.tokenizer, rule, self.context).texts(texts)


class ToTheLongest(DualProcessor):
    """A processor that pads to the longest text of a batch."""

    def texts(self, texts: Sequence[str]) -> Texts:
        ids, cut = super().texts(texts)
        pad = super().texts([""]).input_ids[0, -1]
        used = int((ids != pad).any(0).nonzero().max()) + 2 if bool((ids != pad).any()) else 1
        return Texts(ids[:, :used], cut)


class OnTheLeft(DualProcessor):
    """A processor that pads on the left."""

    def texts(self, texts: Sequence[str]) -> Texts:
        ids, cut = super().texts(texts)
        pad = super().texts([""]).input_ids[0, -1]
        rows = [row.roll(len(row) - 1 - _last(row, pad)) for row in ids]
        return Texts(torch.stack(rows), cut)


def _last(row: Tensor, pad: Tensor) -> int:
    places = (row != pad).nonzero()
    return int(places.max()) if len(places) else 0


def changed(kind: type[DualProcessor], processor: DualProcessor) -> DualProcessor:
    return kind(processor.transform, processor.tokenizer, processor.rule, processor.context)


@pytest.mark.parametrize("family", ["siglip", "siglip2", "naflex"])
def test_capitals_that_reach_the_text_tower(family: str) -> None:
    model, processor = dual(family)
    result = one("text-case", model, changed(AsWritten, processor))
    assert result.status == "FAIL" and result.measured == 4 and "capitals reach the text tower" in result.detail


def test_capitals_that_reach_clips_text_tower() -> None:
    """Its tokenizer makes letters small; one without that step shows."""
    from tokenizers import normalizers

    model, processor = dual("clip")
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    result = one("text-case", model, processor)
    assert result.status == "FAIL" and result.measured == 4


def test_a_family_that_keeps_case() -> None:
    model, processor = dual("siglip2")
    kept = dataclasses.replace(processor, rule=dataclasses.replace(processor.rule, case="kept"))
    assert one("text-case", model, kept).status == "n/a"


def test_padding_to_the_longest(pair: tuple[str, Any, DualProcessor]) -> None:
    _, model, processor = pair
    result = one("text-length", model, changed(ToTheLongest, processor))
    assert result.status == "FAIL" and "the text tower 64 positions" in result.detail


def test_padding_on_the_left(pair: tuple[str, Any, DualProcessor]) -> None:
    _, model, processor = pair
    result = one("text-side", model, changed(OnTheLeft, processor))
    assert result.status == "FAIL" and "does not begin at position" in result.detail


@pytest.mark.parametrize("family", ["siglip", "siglip2", "naflex"])
def test_a_mask_over_the_padding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program does that gives the tokenizer's attention_mask to the model."""
    model, processor = dual(family)
    theirs = model.model.get_text_features

    def masked(input_ids: Tensor) -> Any:
        end = (input_ids == 1).int().argmax(1, keepdim=True)
        return theirs(input_ids=input_ids, attention_mask=(torch.arange(input_ids.shape[1]) <= end).long())

    monkeypatch.setattr(model.model, "get_text_features", masked)
    result = one("text-mask", model, processor)
    assert result.status == "FAIL" and result.measured == 0 and "the padding is masked" in result.detail


def test_a_clip_tower_that_reads_the_last_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = dual("clip")

    def last(input_ids: Tensor) -> Any:
        out = model.model.text_model(input_ids=input_ids)
        out.pooler_output = model.model.text_projection(out.last_hidden_state[:, -1])
        return out

    monkeypatch.setattr(model.model, "get_text_features", last)
    assert one("text-mask", model, processor).status == "FAIL"


# --- logits


def overridden(model: Any, **methods: Callable[..., Any]) -> Any:
    """The model with other methods."""
    made = copy.copy(model)
    made.__class__ = type("Broken", (type(model),), methods)
    return made


def test_a_forgotten_bias(pair: tuple[str, Any, DualProcessor]) -> None:
    family, model, processor = pair

    def logits(self: Any, image: Tensor, text: Tensor) -> Tensor:
        return normalize(image, dim=-1) @ normalize(text, dim=-1).T * self.scale

    result = one("bias", overridden(model, logits=logits), processor)
    assert result.status == ("ok" if family == "clip" else "FAIL")  # CLIP has none


def test_a_bias_of_the_other_sign_and_a_scale_that_is_no_logarithm(pair: tuple[str, Any, DualProcessor]) -> None:
    _, model, processor = pair

    def subtracted(self: Any, image: Tensor, text: Tensor) -> Tensor:
        cosine = normalize(image, dim=-1) @ normalize(text, dim=-1).T
        return cosine * self.scale - (5.0 if self.bias is None else self.bias)

    def no_exponential(self: Any, image: Tensor, text: Tensor) -> Tensor:
        cosine = normalize(image, dim=-1) @ normalize(text, dim=-1).T
        return cosine * self.model.logit_scale + (0.0 if self.bias is None else self.bias)

    for broken in (subtracted, no_exponential):
        assert one("bias", overridden(model, logits=broken), processor).status == "FAIL"


@pytest.mark.parametrize("family", ["siglip", "siglip2", "naflex"])
def test_a_random_start_is_no_trained_model(family: str) -> None:
    model, processor = dual(family)
    with torch.no_grad():
        model.model.logit_scale.zero_()
        model.model.logit_bias.zero_()
    result = one("bias", model, processor)
    assert result.status == "FAIL" and "train from log 10 and -10" in result.detail


def test_the_other_familys_probabilities(pair: tuple[str, Any, DualProcessor]) -> None:
    family, model, processor = pair

    def probabilities(self: Any, logits: Tensor) -> Tensor:
        return logits.sigmoid() if family == "clip" else logits.softmax(-1)

    result = one("probabilities", overridden(model, probabilities=probabilities), processor)
    assert result.status == "FAIL" and ("softmax" if family == "clip" else "sigmoid") in result.detail


def test_another_loss(pair: tuple[str, Any, DualProcessor]) -> None:
    """The mean over all pairs in place of the sum over texts; one direction in place of both."""
    family, model, processor = pair

    def loss(self: Any, image: Tensor, text: Tensor) -> Tensor:
        logits = self.logits(image, text)
        if family == "clip":
            return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
        return self.objective.loss(logits) / len(logits)

    assert one("loss", overridden(model, loss=loss), processor).status == "FAIL"


def test_embeddings_as_long_as_they_come(pair: tuple[str, Any, DualProcessor]) -> None:
    _, model, processor = pair

    def encode_text(self: Any, input_ids: Tensor, *, normalize: bool = True) -> Tensor:
        return type(model).encode_text(self, input_ids, normalize=False)

    def logits(self: Any, image: Tensor, text: Tensor) -> Tensor:
        return image @ text.T * self.scale

    result = one("normalisation", overridden(model, encode_text=encode_text), processor)
    assert result.status == "FAIL" and "lengths in [" in result.detail
    result = one("normalisation", overridden(model, logits=logits), processor)
    assert result.status == "FAIL" and "normalise both first" in result.detail


# --- batches


def test_texts_that_are_not_told_apart(pair: tuple[str, Any, DualProcessor]) -> None:
    """CLIP's text tower looks for an end token that the tokenizer never gives, and reads the first position."""
    _, model, processor = pair

    def text_features(self: Any, input_ids: Tensor) -> Tensor:
        return type(model).text_features(self, input_ids[:1].expand_as(input_ids))

    result = one("distinct", overridden(model, text_features=text_features), processor)
    assert result.status == "FAIL" and "different texts have one embedding" in result.detail


def test_clip_without_its_end_token() -> None:
    model, processor = dual("clip")
    model.model.text_model.eos_token_id = 400
    assert one("distinct", model, processor).status == one("text-mask", model, processor).status == "FAIL"


def test_batch_mates_that_matter(pair: tuple[str, Any, DualProcessor]) -> None:
    _, model, processor = pair

    def encode_image(self: Any, pixel_values: Tensor, *, normalize: bool = True, **naflex: Tensor) -> Tensor:
        rows = type(model).encode_image(self, pixel_values, normalize=False, **naflex)
        return rows - (0.1 * rows.mean(0) if len(rows) > 1 else 0)

    result = one("batch-mates", overridden(model, encode_image=encode_image), processor)
    assert result.status == "FAIL" and "an image moves by" in result.detail


def test_padding_to_the_longest_moves_a_text_among_others() -> None:
    model, processor = dual("siglip")

    def encode_text(self: Any, input_ids: Tensor, *, normalize: bool = True) -> Tensor:
        rows = self.model.get_text_features(input_ids=input_ids).pooler_output
        return torch.nn.functional.normalize(rows, dim=-1) if normalize else rows

    result = one("batch-mates", overridden(model, encode_text=encode_text), changed(ToTheLongest, processor))
    assert result.status == "FAIL"


def test_naflex_padding_that_is_read() -> None:
    model, processor = dual("naflex")

    def encode_image(self: Any, pixel_values: Tensor, *, normalize: bool = True, **naflex: Tensor) -> Tensor:
        naflex["pixel_attention_mask"] = torch.ones_like(naflex["pixel_attention_mask"])
        return type(model).encode_image(self, pixel_values, normalize=normalize, **naflex)

    result = one("naflex-padding", overridden(model, encode_image=encode_image), processor)
    assert result.status == "FAIL" and "noise in them" in result.detail


# --- images


def with_transform(processor: DualProcessor, **changes: Any) -> DualProcessor:
    return dataclasses.replace(processor, transform=dataclasses.replace(processor.transform, **changes))


@pytest.mark.parametrize("family", ["siglip", "siglip2", "clip"])
def test_the_wrong_way_to_a_square(family: str) -> None:
    model, processor = dual(family)
    mode = "squash" if family == "clip" else "crop"
    result = one("image-transform", model, with_transform(processor, mode=mode))
    assert result.status == "FAIL" and f"brought to size by '{mode}'" in result.detail


@pytest.mark.parametrize("family", ["siglip", "naflex"])
def test_another_familys_normalisation(family: str) -> None:
    model, processor = dual(family)
    result = one("image-transform", model, with_transform(processor, mean=(0.485, 0.456, 0.406)))
    assert result.status == "FAIL" and "values in [-1, 1]" in result.detail


def test_images_of_another_size(pair: tuple[str, Any, DualProcessor]) -> None:
    family, model, processor = pair
    if family == "naflex":
        pytest.skip("any size")
    assert one("image-transform", model, with_transform(processor, image_size=42)).status == "FAIL"


def test_pixels_that_are_not_the_pictures(pair: tuple[str, Any, DualProcessor]) -> None:
    """Blue in the place of red, and values of 0 to 255 that were divided twice."""
    _, model, processor = pair

    class Swapped(DualProcessor):
        def images(self, images: Sequence[Any]) -> dict[str, Tensor]:
            return super().images([Image.merge("RGB", image.split()[::-1]) for image in images])

    class Twice(DualProcessor):
        def images(self, images: Sequence[Any]) -> dict[str, Tensor]:
            made = super().images(images)
            return {**made, "pixel_values": made["pixel_values"] / 255}

    for kind in (Swapped, Twice):
        result = one("image-transform", model, changed(kind, processor))
        assert result.status == "FAIL" and result.measured is not None and result.measured > 20


@pytest.mark.parametrize(
    "changes", [{"antialias": False, "resample": "bilinear"}, {"rounding": "down", "resample": "bilinear"}]
)
def test_transforms_that_pillow_cannot_do_pass(changes: dict[str, Any]) -> None:
    model, processor = dual("siglip")
    assert one("image-transform", model, with_transform(processor, **changes)).status == "ok"


# --- half precision


def test_an_overflow_in_float16() -> None:
    model, processor = dual("siglip")
    layer = model.model.text_model.encoder.layers[0].mlp
    with torch.no_grad():  # the same function: what one layer makes large, the next makes small
        layer.fc1.bias.fill_(70_000.0)
        layer.fc2.weight.mul_(1e-6)
    result = one("float16", model, processor)
    assert result.status == "FAIL" and "NaN in float16" in result.detail
    assert one("bfloat16", model, processor).measured == one("bfloat16", model, processor).measured


def test_half_precision_that_drifts(pair: tuple[str, Any, DualProcessor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose rounding is coarser than its limit."""
    _, model, processor = pair

    def encode_text(self: Any, input_ids: Tensor, *, normalize: bool = True) -> Tensor:
        rows = type(model).encode_text(self, input_ids, normalize=False)
        if self.dtype == torch.bfloat16:
            rows = rows + 0.5 * rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        return rows

    broken = overridden(model, encode_text=encode_text)
    assert one("bfloat16", broken, processor).status == "FAIL"


# --- the command


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_the_command_decides_by_the_directory(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = dual(family)
    save(model, processor, tmp_path / "model")
    where = str(tmp_path / "model")
    assert main(["check", where]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[: len(NAMES)]] == NAMES
    assert lines[-1].startswith(f"{where} (float32, cpu, ") and lines[-1].endswith("13 ok, 0 FAIL, 1 n/a")
    assert main(["check", where, "--only", "bias,text-side", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [result["name"] for result in found["results"]] == ["text-side", "bias"] and found["ok"] is True
    for arguments, message in (
        (["--only", "future"], "unknown check 'future'"),
        (["--data", "train.jsonl"], "--data: of a model that writes text"),
    ):
        assert main(["check", where, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_command_on_a_model_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = dual("siglip2")
    with torch.no_grad():
        model.model.logit_scale.zero_()
        model.model.logit_bias.zero_()
    save(model, processor, tmp_path / "model")
    assert main(["check", str(tmp_path / "model"), "--only", "bias"]) == 1
    assert "FAIL  bias" in capsys.readouterr().out


def test_every_check_has_been_broken() -> None:
    """A check that is never seen to fail is worth nothing: a new one needs a test here."""
    own = Path(__file__).read_text()
    assert [name for name in NAMES if own.count(f'one("{name}"') == 0] == []
