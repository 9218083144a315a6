"""An export, opened by transformers' own classes, is the model; and the report notices when it is not."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from coretools import lay_out, loud, picture, sample, shake
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

import vlm
from vlm.build.presets import tiny
from vlm.checkpoints import shards
from vlm.errors import CheckpointError
from vlm.exchange import hub_files, paligemma, probes
from vlm.exchange.exporting import export
from vlm.exchange.parity import LIMITS, Limit, ParityReport, compare
from vlm.model.forward import VLM
from vlm.model.loss import apply_softcap
from vlm.model.masks import prefix_lm_mask
from vlm.model.processor import Processor

ROWS = [[sample(5, 6, 1)], [sample(9, 2, 2)], [sample(2, 9, 3)]]
PROMPTS = ["caption en", "answer en what color is the square?", "detect square ; circle", "", "naïve 東京 12\t3"]
FULL = ["full_attention", "full_attention"]


def source(case: str) -> tuple[VLM, Processor]:
    """Gemma 2 with its window of 8 in the first layer, or without any, as PaliGemma 2 is loaded."""
    if case != "gemma2-full":
        return loud("siglip", case.removesuffix("-window"))
    model, processor = tiny("siglip", "gemma2", layer_types=FULL)
    shake(model)
    return model, processor


@pytest.fixture(scope="module", params=["gemma", "gemma2-window", "gemma2-full"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, processor = source(request.param)
    folder = tmp_path_factory.mktemp("exported") / "out"
    return model, processor, folder, export(model, processor, folder, max_shard_size="60KB")


def opened(folder: Path) -> Any:
    """transformers' model; eager, because the sdpa of 5.17 drops Gemma 2's soft-cap."""
    reader: Any = PaliGemmaForConditionalGeneration
    model, info = reader.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert {key: list(names) for key, names in info.items() if names} == {}
    return model.eval()


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_loss_of_padded_batches_are_equal(exported: Any, side: str) -> None:
    model, _, folder, _ = exported
    theirs = opened(folder)
    batch = lay_out(model, ROWS, side, labels=True)
    inputs = {name: value for name, value in batch.items() if name not in ("position_ids", "labels")}
    real = batch["attention_mask"].bool()
    cap = getattr(model.config.text_config, "final_logit_softcapping", None)
    with torch.no_grad():
        ours = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        raw = theirs.lm_head(theirs.model(**inputs).last_hidden_state)
        assert (ours - apply_softcap(raw, cap))[real].abs().max() < 1e-5 and ours[real].std() > 0.1
        theirs.config.text_config.final_logit_softcapping = None  # 5.23 would put it into the loss
        wanted = theirs(**inputs, labels=batch["labels"]).loss
        assert abs(float(model(**batch).loss - wanted)) < 1e-5


def test_greedy_tokens_of_a_batch_are_equal(exported: Any) -> None:
    model, _, folder, _ = exported
    theirs = opened(folder)
    batch = lay_out(model, [[sample(5, 0, 1)], [sample(9, 0, 2)]], "left")
    inputs = {name: value for name, value in batch.items() if name != "position_ids"}
    length = batch["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    got = model.generate(**batch, **options, suppress_tokens=[model.config.image_token_id])[:, length:]
    # The directory's generation_config.json keeps the placeholder from being generated.
    assert torch.equal(got, theirs.generate(**inputs, **options)[:, length:])
    assert len(set(got.flatten().tolist())) > 5


def test_pixels_and_ids_of_their_processor_are_ours(exported: Any) -> None:
    _, processor, folder, _ = exported
    theirs = AutoProcessor.from_pretrained(folder, backend="pil")
    images = [picture(i, size) for i, size in enumerate([(28, 28), (61, 33), (20, 90), (200, 150), (5, 5)])]
    suffixes = ["a red square", "yes", "<loc0001><loc0512>", "no 7", "é"]
    for suffix in (None, suffixes):
        # transformers pads on the left always, this library on the right for training.
        for rows in [[0], [1], [2], [3], [4], *([list(range(5))] if suffix is None else [])]:
            chosen = None if suffix is None else [suffix[row] for row in rows]
            ours = processor([images[row] for row in rows], [PROMPTS[row] for row in rows], chosen)
            text = [f"<image>{PROMPTS[row]}" for row in rows]
            made = theirs(
                images=[[images[row]] for row in rows], text=text, suffix=chosen, padding=True, return_tensors="pt"
            )
            for name in ("input_ids", "attention_mask", "token_type_ids", *(["labels"] if suffix else [])):
                assert torch.equal(ours[name], made[name]), name
            assert torch.equal(ours["pixel_values"], made["pixel_values"])


def test_the_report_says_what_was_compared_and_is_saved(exported: Any) -> None:
    model, _, folder, report = exported
    assert report.ok and (folder / "parity.json").exists()
    saved = json.loads((folder / "parity.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    names = [row["name"] for row in saved["rows"]]
    wanted = [name for name in LIMITS if name != "logits with soft-cap"]
    assert names[0].endswith("tensors on disk") and [name for name in names if name in wanted] == wanted
    assert "PaliGemmaForConditionalGeneration of transformers" in saved["reader"] and len(saved["texts"]) == 3
    assert report.table() in (folder / "README.md").read_text()
    capped = getattr(model.config.text_config, "final_logit_softcapping", None) is not None
    assert any("without the final soft-cap of 30" in note for note in saved["notes"]) == capped


def test_weights_of_another_dtype_are_compared_as_they_were_written(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export(model, processor, tmp_path / "narrow", dtype="bfloat16")
    assert report.ok and report.dtype == "bfloat16"
    theirs = opened(tmp_path / "narrow")
    assert theirs.dtype == torch.bfloat16
    wanted = before["lm_head.weight"].bfloat16()
    assert torch.equal(theirs.lm_head.weight, wanted) and not torch.equal(wanted.float(), before["lm_head.weight"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    half = copy.deepcopy(model).bfloat16()
    assert export(half, processor, tmp_path / "kept").ok and half.dtype == torch.bfloat16
    assert opened(tmp_path / "kept").dtype == torch.bfloat16


def test_a_model_in_training_is_left_as_it_was(tmp_path: Path) -> None:
    model = copy.deepcopy(loud("siglip", "gemma")[0]).train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    export(model, loud("siglip", "gemma")[1], tmp_path / "out")
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("settings", "word"), [({"antialias": False}, "antialias"), ({"rounding": "down"}, "rounded")])
def test_a_resize_that_the_format_cannot_say_is_measured_and_said(tmp_path: Path, settings: Any, word: str) -> None:
    report = export(*tiny(image=settings), tmp_path / "out")
    (row,) = [row for row in report.rows if row.name == "pixels"]
    assert report.ok and row.ok is None and row.max_abs > 0.9 / 255
    (note,) = [note for note in report.notes if "the format cannot say" in note]
    assert word in note and f"{row.max_abs:.2g}" in note and note in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("case", ["gemma", "gemma2-full"])
def test_a_checkpoint_that_transformers_wrote_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    """export -> transformers -> import -> export -> transformers."""
    export(*source(case), tmp_path / "ours", parity="weights")
    first = opened(tmp_path / "ours")
    first.save_pretrained(tmp_path / "theirs")
    AutoProcessor.from_pretrained(tmp_path / "ours", backend="pil").save_pretrained(tmp_path / "theirs")
    export(*vlm.load(tmp_path / "theirs"), tmp_path / "again", parity="weights")
    again = opened(tmp_path / "again").state_dict()
    assert again.keys() == first.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.state_dict().items())
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "ours" / name).read_text()


# --- the report notices -----------------------------------------------------------------------------------------------


def changed_writer(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[pytest.MonkeyPatch], None]:
    """The safetensors writer, after something was done to the tensors."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        real = shards.save_file

        def save(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
            tensors = dict(tensors)
            change(tensors)
            real(tensors, *args, **kwargs)

        monkeypatch.setattr(shards, "save_file", save)

    return apply


def changed_values(
    name: str, change: Callable[[dict[str, Any]], object], home: ModuleType = paligemma
) -> Callable[[pytest.MonkeyPatch], None]:
    """A function that makes settings, after something was done to them."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(home, name)

        def make(*args: Any) -> dict[str, Any]:
            values: dict[str, Any] = real(*args)
            change(values)
            return values

        monkeypatch.setattr(home, name, make)

    return apply


def swapped_names(first: str, second: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A wrong table of names: the files are read back as they were written, only a model shows it."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        real = paligemma.to_hub
        names = {first: second, second: first}

        def to_hub(name: str) -> str:
            old = next((part for part in names if part in name), None)
            return real(name) if old is None else real(name.replace(old, names[old]))

        monkeypatch.setattr(paligemma, "to_hub", to_hub)

    return apply


def changed_part(part: str, **values: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Other numbers in `vision_config` or `text_config`."""
    return changed_values("config_values", lambda config: config[part].update(values))


def changed_image(**values: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Other numbers in the image processor's settings."""
    return changed_values("common_image_values", lambda settings: settings.update(values), hub_files)


def next_number(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nextafter(torch.tensor(9.0))


OUTPUT = "language_model.model.layers.0.self_attn.o_proj.weight"
ON_DISK = "tensors on disk differ by 1 "
TAMPERED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "transposed": (changed_writer(lambda t: t.update({OUTPUT: t[OUTPUT].T.contiguous()})), ON_DISK),
    "last bits": (changed_writer(lambda t: t.update({OUTPUT: next_number(t[OUTPUT])})), ON_DISK),
    "left out": (changed_writer(lambda t: t.pop(OUTPUT)), ON_DISK),
    "names swapped": (swapped_names("k_proj", "v_proj"), "tower features differ by .* logits differ by .* loss"),
    "norms swapped": (swapped_names("layer_norm1", "layer_norm2"), "tower features differ by"),
    "name unknown": (swapped_names("mlp.fc1", "mlp.fc9"), "does not find every tensor in its place"),
    "erf GELU": (changed_part("vision_config", hidden_act="gelu"), "tower features differ by"),
    "epsilon": (changed_part("text_config", rms_norm_eps=1e-4), "logits differ by"),
    "window": (changed_part("text_config", layer_types=FULL), "logits differ by"),
    "query scale": (changed_part("text_config", query_pre_attn_scalar=9), "logits differ by"),
    "placeholder": (changed_values("config_values", lambda v: v.update(image_token_index=9)), "tokens: 0, features: 4"),
    "mean": (changed_image(image_mean=[0.5, 0.5, 0.51]), "pixels differ by"),
    "filter": (changed_image(resample=1), "pixels differ by"),
    "image tokens": (changed_values("image_values", lambda v: v.update(image_seq_length=5)), "prompt ids differ by"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_wrong_export_fails_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    tamper, message = TAMPERED[case]
    tamper(monkeypatch)
    with pytest.raises(CheckpointError, match=message):
        export(*loud("siglip", "gemma2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["transposed", "left out", "name unknown", "mean"])
def test_without_running_the_models_files_and_names_are_still_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a model was run")

    monkeypatch.setattr(VLM, "forward", never)
    export(*loud("siglip", "gemma2"), tmp_path / "right", parity="weights")
    tamper, message = TAMPERED[case]
    tamper(monkeypatch)
    with pytest.raises(CheckpointError, match=message):
        export(*loud("siglip", "gemma2"), tmp_path / "out", parity="weights")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_too_little_memory_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probes, "in_float32", full)
    with pytest.raises(CheckpointError, match="not enough memory .* use --parity weights"):
        export(*loud("siglip", "gemma"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_pictures_and_prompts_are_told_apart() -> None:
    """A comparison on equal samples would see less."""
    model, processor = loud("siglip", "gemma")
    out = probes.run_paligemma(model, processor)
    for name in ("tower features", "projected features", "loss"):
        first, second, third = out[name]
        assert not torch.allclose(first, second) and not torch.allclose(second, third), name
    assert len({tuple(ids.flatten().tolist()) for ids in out["greedy tokens"]}) == 3


# --- the comparison itself --------------------------------------------------------------------------------------------


def test_differences_are_those_of_the_numbers() -> None:
    ours = [torch.tensor([1.0, -4.0]), torch.tensor([2.0])]
    theirs = [torch.tensor([1.0, -4.0]), torch.tensor([2.5])]
    row = compare("x", ours, theirs, Limit(relative=0.125))
    assert (row.max_abs, row.max_rel, row.ok, row.limit) == (0.5, 0.125, True, "0.125 rel")
    assert compare("x", ours, theirs, Limit(relative=0.12)).ok is False
    assert compare("x", ours, theirs, Limit(absolute=0.4, relative=1)).ok is False
    assert compare("x", ours, theirs, None).ok is None
    zeros = [torch.zeros(2)]
    assert compare("x", zeros, zeros, Limit(relative=1e-9)).ok is True
    assert compare("x", zeros, [torch.ones(2)], Limit(relative=1e9)).ok is False


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_never_passes(bad: float) -> None:
    for place in range(2):
        theirs = [torch.zeros(2), torch.ones(2)]
        theirs[place][1] = bad
        row = compare("x", [torch.zeros(2), torch.ones(2)], theirs, Limit(absolute=9, relative=9))
        assert row.ok is False
        report = ParityReport("paligemma", "out", "", "float32", rows=[row])
        assert not report.ok and "FAIL" in report.table()
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"][0]["max_abs"] is None


def test_shapes_and_lengths_count() -> None:
    assert compare("x", [torch.zeros(2)], [torch.zeros(1, 2)], None).ok is False
    ids = [torch.tensor([[5, 6, 7]])]
    assert compare("x", ids, [torch.tensor([[5, 6, 7]])], Limit(absolute=0.0)).ok is True
    assert compare("x", ids, [torch.tensor([[5, 9]])], Limit(absolute=0.0)).max_abs == 2
    with pytest.raises(ValueError, match="0 tensors against 1"):
        compare("x", [], ids, None)


# --- the documentation ------------------------------------------------------------------------------------------------


def test_the_code_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = loud("siglip", "gemma")
    vlm.save(model, processor, "runs/shapes/model")
    picture(1, (40, 30)).save("cat.jpg")
    text = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/export.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "greedy tokens" in printed and "as in vLLM" in printed and "'missing_keys': []" in printed


def test_token_type_1_for_the_prompt_is_the_mask_of_vllm() -> None:
    """docs/export.md: causal, or both in the image."""
    for image, text in ((4, 5), (1, 1), (6, 2)):
        size = image + text
        types = torch.tensor([[0] * image + [1] * text])
        allowed = prefix_lm_mask(torch.ones(1, size, dtype=torch.int64), types, None)
        wanted = [[key <= query or (key < image and query < image) for key in range(size)] for query in range(size)]
        assert allowed.view(size, size).tolist() == wanted
