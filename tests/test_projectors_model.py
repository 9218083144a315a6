"""Whole tiny models with each projector behind a fixed-resolution tower and behind NaFlex: the number of image tokens
follows the projector through processor, model, generation, checks, training, files and the command line."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture, shake
from test_new import VISION, made
from test_new import parts as parts
from traintools import align, config, pictures
from transformers import SiglipVisionConfig, SiglipVisionModel

import vlm
import vlm.train
from vlm import check
from vlm.build.presets import tiny
from vlm.cli import main
from vlm.errors import CheckpointError, ConfigError
from vlm.exchange.exporting import export
from vlm.measure.info import describe, table

PROJECTORS: list[dict[str, Any]] = [
    {"kind": "linear"},
    {"kind": "mlp", "activation": "silu"},
    {"kind": "pixel_shuffle", "factor": 3},
    {"kind": "resampler", "queries": 3, "heads": 4},
    {"kind": "pool", "factor": 3},
    {"kind": "pool", "rows": 2, "columns": 1},
    {"kind": "identity"},
]
each = pytest.mark.parametrize("projector", PROJECTORS, ids=lambda p: "-".join(map(str, p.values())))
each_encoder = pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
SIZES = [(56, 56), (300, 7), (7, 300), (97, 113), (1, 1), (40, 90)]
PROMPTS = ["caption en", "answer en what color is the square?", "detect a red square"]


def make(encoder: str, projector: dict[str, Any]) -> tuple[vlm.VLM, vlm.Processor]:
    return tiny(encoder, "gemma", projector)  # tower and decoder are both 32 wide, as the identity needs


@functools.cache
def _loud(encoder: str, projector: str) -> tuple[vlm.VLM, vlm.Processor]:
    model, processor = make(encoder, json.loads(projector))
    shake(model)
    return model, processor


def loud(encoder: str, projector: dict[str, Any]) -> tuple[vlm.VLM, vlm.Processor]:
    """A model with noise on every weight. Do not change it."""
    return _loud(encoder, json.dumps(projector))


def patches(processor: vlm.Processor, size: tuple[int, int]) -> tuple[int, int]:
    return processor.image_transform.grid(size[1], size[0])


def expected_tokens(projector: dict[str, Any], grid: tuple[int, int]) -> int:
    """Image tokens as the documentation of each projector states them."""
    rows, columns = grid
    if projector["kind"] == "resampler":
        return projector["queries"]
    if "rows" in projector:
        return min(rows, projector["rows"]) * min(columns, projector["columns"])
    factor = projector.get("factor", 1)
    return math.ceil(rows / factor) * math.ceil(columns / factor)


@each
@each_encoder
def test_placeholders_are_the_tokens(encoder: str, projector: dict[str, Any]) -> None:
    """Image by image, and as stated; a batch of all of them is taken by the model."""
    model, processor = loud(encoder, projector)
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    batch = processor(images, ["caption en"] * len(images))
    placeholders = (batch.input_ids == processor.image_token_id).sum(1)
    with torch.no_grad():
        pixels = {name: batch[name] for name in batch.keys() if name.startswith(("pixel", "spatial"))}
        _, counts = model.model.image_tokens(**pixels)
        assert torch.isfinite(model(**batch).logits).all()
    assert torch.equal(counts, placeholders)
    assert counts.tolist() == [expected_tokens(projector, patches(processor, size)) for size in SIZES]
    assert int(counts.max()) <= processor.max_image_tokens


@each
@each_encoder
def test_generation_in_a_batch_is_as_alone(encoder: str, projector: dict[str, Any]) -> None:
    """Greedy and beams, samples with two images, one and none: each image group stays with its sample."""
    model, processor = loud(encoder, projector)
    groups = [[picture(1, (90, 20)), picture(2, (30, 30))], [picture(3, (20, 70))], []]
    for beams in (1, 3):
        options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 5}
        together = vlm.generate(model, processor, groups, PROMPTS, **options)
        single = [
            vlm.generate(model, processor, [group] if group else None, [prompt], **options)[0]
            for group, prompt in zip(groups, PROMPTS, strict=True)
        ]
        assert together == single and any(together)


@each
@each_encoder
def test_logits_in_a_batch_are_as_alone(encoder: str, projector: dict[str, Any]) -> None:
    model, processor = loud(encoder, projector)
    images = [picture(i, size) for i, size in enumerate(SIZES[:3])]
    with torch.no_grad():
        together = model(**processor(images, PROMPTS)).logits[:, -1]
        for row, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
            alone = model(**processor([image], [prompt])).logits[0, -1]
            assert torch.allclose(together[row], alone, atol=1e-4)
        other = model(**processor([picture(9, size) for size in SIZES[:3]], PROMPTS)).logits[:, -1]
    assert ((together - other).abs().amax(-1) > 1e-3).all(), "the image does not matter"


@each
@each_encoder
def test_training_lowers_the_loss(encoder: str, projector: dict[str, Any]) -> None:
    """From a fresh model, the tower and decoder frozen where there is a projector to train."""
    model, processor = make(encoder, projector)
    images = [picture(i, size) for i, size in enumerate(SIZES[:3])]
    batch = processor(images, PROMPTS, ["red", "green", "blue"])
    trained = list(model.parts()["projector"].parameters()) or list(model.parts()["encoder"].parameters())
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0] and losses[-1] < losses[0] - 0.003


@each
@each_encoder
def test_files(tmp_path: Path, encoder: str, projector: dict[str, Any]) -> None:
    """Weights and placeholders come back bit for bit, through our loader and through transformers'."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = loud(encoder, projector)
    vlm.save(model, processor, tmp_path)
    batch = processor([picture(1, (90, 20))], ["caption en"])
    for loaded, opened in (
        vlm.load(tmp_path),
        (AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)),
    ):
        assert opened.projector == processor.projector == model.config.projector_config
        state = loaded.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        again = opened([picture(1, (90, 20))], ["caption en"])
        assert torch.equal(again.input_ids, batch.input_ids)
        with torch.no_grad():
            # Not to the bit: a product with one row depends on how its weights lie in memory.
            assert torch.allclose(loaded(**again).logits, model(**batch).logits, atol=1e-5)


@each
@each_encoder
def test_check_has_no_failure(encoder: str, projector: dict[str, Any]) -> None:
    model, processor = loud(encoder, projector)
    report = check.run(model, processor)
    assert report.ok and not report.failures, report.table()


@each_encoder
def test_check_of_a_fresh_identity(encoder: str) -> None:
    """The only projector that lets the image in before training."""
    report = check.run(*make(encoder, {"kind": "identity"}))
    assert report.ok and not report.failures, report.table()


def test_check_finds_a_processor_for_another_projector() -> None:
    model, processor = loud("siglip2_naflex", {"kind": "pool", "factor": 3})
    wrong = vlm.Processor(processor.tokenizer, processor.image_transform)
    assert [r.name for r in check.run(model, wrong, only=["image-tokens"]).failures] == ["image-tokens"]


# --- facts


@each
@each_encoder
def test_info(encoder: str, projector: dict[str, Any]) -> None:
    model, processor = loud(encoder, projector)
    facts = describe((model, processor))
    side = (4, 4) if encoder == "siglip2_naflex" else (2, 2)
    assert facts["image_tokens_square"] == expected_tokens(projector, side)
    grids = [(rows, 16 // rows) for rows in range(1, 17)] if encoder == "siglip2_naflex" else [(2, 2)]
    assert facts["image_tokens"] == max(expected_tokens(projector, grid) for grid in grids)
    assert facts["parts"]["projector"]["kind"] == projector["kind"]
    assert facts["flops"]["projector"] == model.model.multi_modal_projector.flops(side)
    text = table(facts)
    assert f"{facts['image_tokens']} per image (at most)" in text
    differ = facts["image_tokens"] != facts["image_tokens_square"]
    assert (f"{facts['image_tokens_square']} of a square one" in text) == differ


def test_prefill_is_cheaper_with_fewer_tokens() -> None:
    costs = [
        describe(loud("siglip2_naflex", projector))["flops"]["prefill"]
        for projector in ({"kind": "linear"}, {"kind": "pool", "factor": 3}, {"kind": "pool", "rows": 2, "columns": 1})
    ]
    assert costs[0] > costs[1] > costs[2]


# --- files of other projectors


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize("projector", PROJECTORS[:2], ids=str)
def test_a_processor_from_before_the_choice(tmp_path: Path, projector: dict[str, Any]) -> None:
    """Such files know no projector; their models are linear or mlp, both one token per patch."""
    model, processor = loud("siglip", projector)
    vlm.save(model, processor, tmp_path)
    (tmp_path / "manifest.json").unlink()
    edit(tmp_path / "processor_config.json", projector=None)
    assert vlm.Processor.from_pretrained(tmp_path).projector == {"kind": "linear"}
    opened = vlm.load(tmp_path)
    assert opened[1].projector == projector
    vlm.save(*opened, tmp_path / "again")


def test_a_pair_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, processor = loud("siglip", {"kind": "pool", "factor": 3})
    wrong = vlm.Processor(processor.tokenizer, processor.image_transform, {"kind": "pool", "factor": 2})
    with pytest.raises(CheckpointError, match=r"'factor': 3.*'factor': 2.*model\.config\.projector_config"):
        vlm.save(model, wrong, tmp_path / "x")
    vlm.save(model, processor, tmp_path / "y")
    (tmp_path / "y" / "manifest.json").unlink()
    edit(tmp_path / "y" / "processor_config.json", projector={"kind": "pool", "factr": 3})
    with pytest.raises(CheckpointError, match=r"has no setting 'factr' \(did you mean 'factor'\?\)"):
        vlm.load(tmp_path / "y")


def test_defaults_written_out_or_not_are_the_same(tmp_path: Path) -> None:
    model, processor = make("siglip", {"kind": "mlp"})
    same = vlm.Processor(processor.tokenizer, processor.image_transform, {"kind": "mlp", "depth": 2})
    vlm.save(model, same, tmp_path)
    assert vlm.load(tmp_path)[1].projector == {"kind": "mlp", "depth": 2}


@each
def test_only_linear_is_exported_as_paligemma(tmp_path: Path, projector: dict[str, Any]) -> None:
    model, processor = loud("siglip", projector)
    if projector["kind"] == "linear":
        assert export(model, processor, tmp_path / "out").ok
        return
    with pytest.raises(ConfigError, match=f"its projector is '{projector['kind']}', PaliGemma's is one linear layer"):
        export(model, processor, tmp_path / "out")
    assert export(model, processor, tmp_path / "tower", to="tower").ok


# --- command line and training


def test_new(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = made(parts, tmp_path / "out", "--projector", "pool", "--set", "projector.factor=2")
    assert model.config.projector_config == processor.projector == {"kind": "pool", "factor": 2}
    assert processor.max_image_tokens == 4  # 42 px, patch 14: 3 x 3 patches
    assert "4 per image" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "out")]) == 0
    assert "image-tokens" in capsys.readouterr().out


def test_new_refuses_an_identity_between_widths(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SiglipVisionModel(SiglipVisionConfig(**{**VISION, "hidden_size": 16})).save_pretrained(tmp_path / "narrow")
    words = ["new", "--encoder", str(tmp_path / "narrow"), "--decoder", str(parts / "gemma"), "--projector", "identity"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "16 wide, the decoder's embeddings 32; they must be equal" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_run(parts: Path, tmp_path: Path) -> None:
    """`projector` in a run's configuration, through a stage, to a model that opens."""
    start = {
        "encoder": str(parts / "siglip"),
        "decoder": str(parts / "gemma"),
        "projector": {"kind": "resampler", "queries": 3, "depth": 1, "heads": 4},
    }
    run = config(tmp_path / "run", align(steps=2), model=start, data={"train": pictures(tmp_path / "data", 8)})
    model, processor = vlm.load(vlm.train.run(run))
    assert processor.projector == start["projector"] and processor.max_image_tokens == 3
    assert model.model.multi_modal_projector.linear.weight.any()
    assert check.run(model, processor).ok
