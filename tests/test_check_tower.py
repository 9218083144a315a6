"""`vlm check` on towers of one's own, each broken on purpose: order, gradients, and every part of the contract."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionConfig

import vlm
from vlm import check
from vlm.build.presets import tiny, tiny_decoder
from vlm.check.report import Result
from vlm.cli import main
from vlm.encoders.contract import EncoderOutput, check_output
from vlm.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
TOWER = ["tower", "patch-order", "tower-gradients", "batch-mates"]
Change = Callable[[Any], Any]
NOTHING: Any = None


@pytest.fixture(scope="module")
def fixed() -> Any:
    """A model whose tower has 4 x 4 patches."""
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    return vlm.new(config, "linear", tiny_decoder("gemma"), tiny()[1].tokenizer, seed=3)


def checked(pair: Any, change: Change, only: list[str] = TOWER) -> check.Report:
    """The report on a model whose tower's output is changed on its way out."""
    model, processor = copy.deepcopy(pair[0]), pair[1]
    tower = model.model.vision_tower
    original = tower.forward
    tower.forward = lambda *args, **named: change(original(*args, **named))
    return check.run(model, processor, only=only)


def reordered(order: Callable[[Tensor], Tensor]) -> Change:
    """Features of a 4 x 4 grid in another order: what `order` makes of their numbers, int64[4, 4]."""
    places = order(torch.arange(16).view(4, 4)).flatten()
    return lambda out: out._replace(features=out.features[:, places])


def test_the_healthy_tower_passes(fixed: Any) -> None:
    for pair in (fixed, tiny("siglip2_naflex"), tiny("fused")):
        report = check.run(*pair, only=TOWER)
        assert [result.status for result in report.results] == ["ok"] * 4, report.table()
        assert (report["patch-order"].measured, report["tower-gradients"].measured) == (1.0, 0)


# --- order


@pytest.mark.parametrize(
    "order",
    [
        lambda grid: grid.flatten().flip(0),
        lambda grid: grid.flatten().roll(1),
        lambda grid: grid.T,
        lambda grid: grid.flip(1),
        lambda grid: grid.flip(0),
        lambda grid: grid[[0, 2, 1, 3]],
        lambda grid: grid.view(2, 2, 2, 2).transpose(1, 2),  # window by window
        lambda grid: torch.cat([grid.flatten()[[1, 0]], grid.flatten()[2:]]),  # two patches only
    ],
)
def test_patches_in_another_order(fixed: Any, order: Callable[[Tensor], Tensor]) -> None:
    report = checked(fixed, reordered(order))
    assert report["patch-order"].status == "FAIL" and "features must be in row order" in report["patch-order"].detail
    assert report["tower"].status == report["tower-gradients"].status == "ok"
    # The message names a feature and the patch that it really is.
    places = order(torch.arange(16).view(4, 4)).flatten().tolist()
    first = next(index for index, place in enumerate(places) if place != index)
    named = f"feature {first} (row {first // 4}, column {first % 4}) follows the patch at row {places[first] // 4}"
    assert f"{named}, column {places[first] % 4}" in report["patch-order"].detail


def test_naflex_columns_before_rows() -> None:
    """A transposed grid is seen by the grid, features in the order of a transposed one by the order."""

    def transposed(out: EncoderOutput) -> EncoderOutput:
        features = out.features.clone()
        for image, (rows, columns) in enumerate(out.grid.tolist()):
            cells = features[image, : rows * columns].view(rows, columns, -1)
            features[image, : rows * columns] = cells.transpose(0, 1).reshape(rows * columns, -1)
        return out._replace(features=features)

    report = checked(tiny("siglip2_naflex"), transposed)
    assert (report["tower"].status, report["patch-order"].status) == ("ok", "FAIL")
    report = checked(tiny("siglip2_naflex"), lambda out: out._replace(grid=out.grid.flip(1)))
    assert report["tower"].status == "FAIL" and "its (rows, columns) of patches are" in report["tower"].detail


def test_a_tower_that_sees_no_image(fixed: Any) -> None:
    report = checked(fixed, lambda out: out._replace(features=out.features * 0))
    assert "do not reach the features" in report["patch-order"].detail
    assert "the gradient at the pixels is 0" in report["tower-gradients"].detail
    assert report["patch-order"].status == report["tower-gradients"].status == "FAIL"


# --- gradients


def gradients(pair: Any, hook: Callable[[Any], None]) -> Result:
    model, processor = copy.deepcopy(pair[0]), pair[1]
    hook(model.model.vision_tower)
    return check.run(model, processor, only=["tower-gradients"])["tower-gradients"]


def test_features_without_a_gradient(fixed: Any) -> None:
    report = checked(fixed, lambda out: out._replace(features=out.features.detach()))
    assert report["tower-gradients"].status == "FAIL" and "detaches them" in report["tower-gradients"].detail
    assert report["patch-order"].status == "ok"


def test_a_gradient_that_stops_inside(fixed: Any) -> None:
    def detach(tower: Any) -> None:
        tower.embeddings.register_forward_hook(lambda module, args, output: output.detach())

    def in_training_only(tower: Any) -> None:
        tower.embeddings.register_forward_hook(
            lambda module, args, output: output.detach() if module.training else output
        )

    def unused(tower: Any) -> None:
        tower.extra = torch.nn.Linear(3, 3)

    for hook in (detach, in_training_only):
        result = gradients(fixed, hook)
        assert (result.status, result.measured) == ("FAIL", 4.0)  # pixels, patch weights and bias, positions
        assert "no gradient reaches the pixels, embeddings.patch_embedding.weight" in result.detail
        assert "and 1 more" in result.detail
    result = gradients(fixed, unused)
    assert result.status == "FAIL" and "no gradient reaches extra.weight, extra.bias: " in result.detail


def test_the_tower_is_left_as_it_was() -> None:
    pair = tiny("siglip")
    tower = pair[0].model.vision_tower
    tower.requires_grad_(False)
    tower.norm_statistics = torch.nn.BatchNorm1d(32)
    tower.register_forward_hook(
        lambda module, args, out: out._replace(features=module.norm_statistics(out.features.mT).mT)
    )
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    check.run(*pair, only=["tower-gradients", "patch-order", "tower"])
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert not any(weight.requires_grad for name, weight in tower.named_parameters() if "statistics" not in name)
    assert all(weight.grad is None for weight in tower.parameters())


# --- the contract


def nan_at(out: EncoderOutput) -> EncoderOutput:
    features = out.features.clone()
    features[0, 0, 0] = math.nan
    return out._replace(features=features)


def raising(out: EncoderOutput) -> Any:
    raise KeyError("cls_token")


def one_alone(out: EncoderOutput) -> EncoderOutput:
    """`squeeze` for a batch of one."""
    return out._replace(features=out.features.squeeze(0))


BROKEN: dict[str, tuple[Change, str]] = {
    "tensor": (lambda out: out.features, "returned float32[3, 16, 32], expected vlm.encoders.EncoderOutput"),
    "tuple": (lambda out: tuple(out), "returned a tuple, expected vlm.encoders.EncoderOutput"),
    "none": (lambda out: None, "returned None, expected"),
    "map": (lambda out: out._replace(features=out.features.mT.unflatten(2, (4, 4))), "expected float[M, P, E]"),
    "wide": (
        lambda out: out._replace(features=out.features[..., :30]),
        "features are 30 wide, its configuration says 32",
    ),
    "images": (lambda out: out._replace(features=out.features[:1]), "expected those of 3 images"),
    "alone": (one_alone, "features are float32[16, 32], expected float[M, P, E]"),
    "class token": (
        lambda out: out._replace(features=torch.cat([out.features[:, :1], out.features], 1)),
        "image 0 has 17 real rows of features for 4 x 4 = 16 patches; leave out class and register tokens",
    ),
    "nan": (nan_at, "1 of 1536 features are NaN or infinite"),
    "infinite": (lambda out: out._replace(features=out.features / 0), "1536 of 1536 features are NaN or infinite"),
    "double": (
        lambda out: out._replace(features=out.features.double()),
        "features are float64, its weights float32; return them as features.to(self.dtype)",
    ),
    "mask of ints": (
        lambda out: out._replace(mask=torch.ones(out.features.shape[:2], dtype=torch.int64)),
        "the mask is int64[3, 16], expected None or bool[3, 16]",
    ),
    "mask of another shape": (
        lambda out: out._replace(mask=torch.ones(3, 4, dtype=torch.bool)),
        "the mask is bool[3, 4], expected None or bool[3, 16]",
    ),
    "mask without a patch": (
        lambda out: out._replace(mask=torch.arange(16).expand(len(out.grid), 16) > 0),
        "image 0 has 15 real rows of features for 4 x 4 = 16 patches",
    ),
    "grid as floats": (lambda out: out._replace(grid=out.grid.float()), "the grid is float32[3, 2], expected int64"),
    "grid of one image": (lambda out: out._replace(grid=out.grid[0]), "the grid is int64[2], expected int64[3, 2]"),
    "no grid": (lambda out: EncoderOutput(out.features, None, NOTHING), "the grid is None, expected int64[3, 2]"),
    "another grid": (
        lambda out: out._replace(grid=torch.tensor([[2, 8]]).expand(len(out.grid), 2)),
        "grid of image 0 is [2, 8], its (rows, columns) of patches are [4, 4]",
    ),
    "raises": (raising, "tower raises KeyError: 'cls_token' (test_check_tower.py:"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_is_one_line_and_nothing_else_runs(fixed: Any, name: str) -> None:
    change, says = BROKEN[name]
    # Not the two that write files, and one that does not run the tower is enough.
    names = ("tower", "patch-order", "tower-gradients", "image", "cache", "image-tokens", "tied-weights")
    entries = [entry for entry in check.CHECKS if entry.name in names]
    report = checked(fixed, change, list(names))
    assert report["tower"].status == "FAIL" and says in report["tower"].detail, report["tower"].detail
    assert "siglip tower" in report["tower"].detail and "\n" not in report["tower"].detail
    for entry in entries[1:]:
        result = report[entry.name]
        assert (f"not run: {report['tower'].detail}" == result.detail) == entry.runs_tower
        assert result.status == "FAIL" or not entry.runs_tower


def test_naflex_masks() -> None:
    shifted: Change = lambda out: out._replace(mask=out.mask.flip(1))  # noqa: E731
    report = checked(tiny("siglip2_naflex"), shifted)
    assert "other rows as patches than pixel_attention_mask" in report["tower"].detail


def test_another_image_in_the_batch(fixed: Any) -> None:
    """Features less their mean over the batch: alone, an image has none."""
    report = checked(fixed, lambda out: out._replace(features=out.features - out.features.mean(0) / 2))
    assert report["batch-mates"].status == "FAIL" and report["tower"].status == "ok"


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A file of one's own that returns a tensor: refused in a line by every command that runs it, told by check."""
    from vlm.registry import OWN

    source = (ROOT / "examples" / "own_encoder.py").read_text(encoding="utf-8")
    source = source.replace("own_encoder", "broken_encoder")
    source = source.replace("return square_output(self.config, self.norm(features))", "return self.norm(features)")
    (tmp_path / "broken_encoder.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        sys.modules.pop("broken_encoder", None)
        __import__("broken_encoder").main(str(tmp_path / "model"))
        capsys.readouterr()
        words = [str(tmp_path / "model"), "--encoder-class", "broken_encoder:PatchTower"]
        assert main(["check", *words, "--only", "tower,cache"]) == 1
        said = "the broken_encoder:PatchTower tower returned float32[3, 4, 32], expected vlm.encoders.EncoderOutput"
        captured = capsys.readouterr()
        assert captured.out.count(said) == 2 and "Traceback" not in captured.err
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        assert main(["caption", str(tmp_path / "a.png"), "--model", *words]) == 2
        assert (
            capsys.readouterr().err.count("error: the broken_encoder:PatchTower tower returned float32[1, 4, 32]") == 1
        )
    finally:
        OWN["vlm.encoders"].pop("broken_encoder:PatchTower", None)
        sys.modules.pop("broken_encoder", None)


def test_the_output_is_checked_wherever_the_model_runs(fixed: Any) -> None:
    model, processor = copy.deepcopy(fixed[0]), fixed[1]
    output = EncoderOutput(torch.zeros(1, 16, 31), None, torch.tensor([[4, 4]]))
    with pytest.raises(ConfigError, match="31 wide, its configuration says 32"):
        check_output(output, model.config, 1)
    model.model.vision_tower.forward = lambda *args, **named: output
    with pytest.raises(ConfigError, match="31 wide, its configuration says 32"):
        model(**processor([Image.new("RGB", (40, 30), "red")], ["caption en"]))
