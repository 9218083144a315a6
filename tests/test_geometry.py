"""A trained model in another geometry: bit for bit what it was, but for what the change concerns."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import traintools
from coretools import loud, picture, shake
from encodertools import needs
from torch import Tensor
from traintools import align, stop_after, tune

import vlm
import vlm.train
from vlm.build.presets import tiny
from vlm.checkpoints.geometry import with_geometry
from vlm.cli import main
from vlm.errors import CheckpointError, ConfigError
from vlm.model.parts import encoder_spec

POSITIONS = "model.vision_tower.embeddings.position_embedding.weight"
PROJECTOR = "model.multi_modal_projector."
PICTURES = [(60, 50), (28, 91)]


def bilinear(table: Tensor, side: int) -> np.ndarray:
    """big_vision's resampling of a position table: linear from corner to corner, one axis after the other."""
    old = int(len(table) ** 0.5)
    grid = table.double().numpy().reshape(old, old, -1)
    places = np.linspace(0, old - 1, side)

    def line(values: np.ndarray) -> np.ndarray:
        return np.interp(places, np.arange(old), values)

    grid = np.apply_along_axis(line, 0, grid)
    return np.apply_along_axis(line, 1, grid).reshape(side * side, -1)


def same(one: dict[str, Tensor], two: dict[str, Tensor], but: str = " ") -> int:
    """How many tensors are equal bit for bit: all that do not start with `but`."""
    kept = [name for name in one if not name.startswith(but)]
    assert set(kept) == {name for name in two if not name.startswith(but)}
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in kept)
    return len(kept)


def saved(folder: Path, kind: str = "siglip", projector: Any = "linear", **settings: Any) -> Path:
    model, processor = tiny(kind, "gemma", projector, **settings)
    shake(model)
    vlm.save(model, processor, folder)
    return folder


def features(model: vlm.VLM, processor: vlm.Processor, sizes: Any = PICTURES) -> list[Tensor]:
    """The tower's features of each picture, on real patches."""
    made = []
    for number, size in enumerate(sizes):
        pixels = processor.image_transform([picture(number, size)])
        inputs = {name: value for name, value in pixels._asdict().items() if isinstance(value, Tensor)}
        with torch.no_grad():
            made.append(model.model.vision_tower(**inputs).features[0])
    return made


# --- image size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rows"), [(56, 4), (42, 3), (70, 5), (14, 1)])
def test_only_the_position_table_changes(size: int, rows: int) -> None:
    """Everything else bit for bit; the table is that of an independent interpolation; the old model is untouched."""
    model, processor = loud("siglip", "gemma")
    before = copy.deepcopy(model.state_dict())
    made, reader = with_geometry(model, processor, image_size=size)
    assert same(model.state_dict(), before) > 50 and same(made.state_dict(), before, but=POSITIONS) > 50
    table = made.state_dict()[POSITIONS]
    assert table.shape == (rows**2, 32)
    if rows > 1:
        assert np.abs(table.numpy() - bilinear(before[POSITIONS], rows)).max() < 1e-6
    assert reader.image_transform == replace(processor.image_transform, image_size=size)
    assert reader.max_image_tokens == rows**2 and made.lm_head.weight is made.get_input_embeddings().weight
    batch = reader([picture(1, (50, 40))], ["caption en"], ["a red square"])
    assert bool(made(**batch).loss.isfinite()) and batch.input_ids.shape[1] > rows**2


def test_each_part_keeps_its_dtype() -> None:
    model, processor = tiny()
    model.model.vision_tower.to(torch.bfloat16)
    made, _ = with_geometry(model, processor, image_size=56)
    assert same(made.state_dict(), model.state_dict(), but=POSITIONS) > 50
    assert made.state_dict()[POSITIONS].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["clip", "dinov2", "dinov3", "fused", "timm", "open_clip"])
def test_other_towers_resample_as_new_ones_do(kind: str, tmp_path: Path) -> None:
    """What `vlm.new` makes of a tower at another size is what a whole model with that tower becomes."""
    needs(kind)
    folder = saved(tmp_path / "model", kind)
    model, processor = vlm.load(folder)
    config = model.config.vision_config
    members = [member for _, member in getattr(config, "towers", ())] or [config]
    sizes = [member.patch_size * 3 for member in members]
    made, reader = with_geometry(model, processor, image_size=sizes if len(sizes) > 1 else sizes[0])
    tower, old = made.model.vision_tower.state_dict(), model.model.vision_tower.state_dict()
    tables = {name for name in old if old[name].shape != tower[name].shape}
    assert len(tables) == (0 if kind == "dinov3" else 1)
    assert all(torch.equal(tower[name], old[name]) for name in old if name not in tables)
    assert reader.image_transform.grid(0, 0) == (3, 3) and reader.image_transform.mode == processor.image_transform.mode
    module = encoder_spec(config.towers[0][0] if len(sizes) > 1 else kind)
    after: Any = members[0] if len(sizes) == 1 else made.config.vision_config.towers[0][1]
    for name in tables:
        assert torch.equal(
            tower[name], module.resample(old[name], made.config.vision_config if len(sizes) == 1 else after)
        )
    assert all(feature.shape[0] == 9 for feature in features(made, reader))
    vlm.save(made, reader, tmp_path / "again")
    again, other = vlm.load(tmp_path / "again")
    assert same(again.state_dict(), made.state_dict()) > 20 and other.image_transform == reader.image_transform


def test_a_crop_keeps_its_proportion() -> None:
    model, processor = tiny("dinov2")
    assert processor.image_transform.resize_shortest == 32  # 28 * 256 / 224
    assert with_geometry(model, processor, image_size=56)[1].image_transform.resize_shortest == 64


# --- NaFlex -----------------------------------------------------------------------------------------------------------


def test_a_budget_is_no_weight() -> None:
    model, processor = loud("siglip2_naflex", "gemma")
    made, reader = with_geometry(model, processor, image={"max_num_patches": 30, "naflex": "native"})
    assert made is model and reader.image_transform.max_num_patches == 30 and reader.image_transform.naflex == "native"
    assert processor.image_transform.max_num_patches == 16


def test_squares_and_naflex_are_one_function() -> None:
    """A NaFlex model goes on in squares and gives what it gave for square images; and the other way round."""
    model, processor = loud("siglip2_naflex", "gemma")
    squares = [(84, 84), (70, 70)]
    for side in (56, 42):
        budget = (side // 14) ** 2
        _, own = with_geometry(model, processor, image={"max_num_patches": budget})
        made, reader = with_geometry(model, processor, encoder_kind="siglip", image_size=side)
        assert (made.config.encoder, reader.image_transform.mode) == ("siglip", "squash")
        pixels = own.image_transform([picture(3, (side, side))])
        shown = reader.image_transform([picture(3, (side, side))])
        with torch.no_grad():
            got = made.model.vision_tower(shown.pixel_values).features
            inputs = {"pixel_attention_mask": pixels.pixel_attention_mask, "spatial_shapes": pixels.spatial_shapes}
            want = model.model.vision_tower(pixels.pixel_values, **inputs).features
        assert want.std() > 0.1 and (got - want).abs().max() < 1e-5
    back, again = with_geometry(made, reader, encoder_kind="siglip2_naflex")
    assert again.image_transform.max_num_patches == 9 and len(features(back, again, squares)[0]) == 9
    assert same(back.state_dict(), model.state_dict(), but="model.vision_tower.embeddings.") > 40
    kernel = "model.vision_tower.embeddings.patch_embedding.weight"
    assert torch.equal(back.state_dict()[kernel], model.state_dict()[kernel])


# --- layers and projectors --------------------------------------------------------------------------------------------


def test_a_lower_feature_layer_of_the_same_width() -> None:
    model, processor = loud("siglip", "gemma")
    made, reader = with_geometry(model, processor, layer=-2)
    assert made.config.vision_config.feature_layers == [1] and len(made.model.vision_tower.encoder.layers) == 1
    pixels = processor.image_transform([picture(1, (60, 50))]).pixel_values
    seen: list[Tensor] = []
    hook = model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        model.model.vision_tower(pixels)
        got = made.model.vision_tower(pixels).features
    hook.remove()
    assert torch.equal(got, seen[0])
    kept = {name: value for name, value in model.state_dict().items() if name in made.state_dict()}
    assert same(made.state_dict(), kept) > 30
    with pytest.raises(ConfigError, match=r"features are the outputs of block 1 of 1, without the final norm.*anew"):
        with_geometry(made, reader, layer=-1)


def test_another_projector_is_new_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    model, processor = loud("siglip", "gemma")
    with caplog.at_level(logging.INFO, "vlm.checkpoints.geometry"):
        made, reader = with_geometry(model, processor, projector={"kind": "pool", "factor": 2}, image_size=56)
    assert "its weights are new" in caplog.text and "image size 28 -> 56" in caplog.text
    assert reader.max_image_tokens == 4 and made.config.projector_config == {"kind": "pool", "factor": 2}
    new = {name: value for name, value in made.state_dict().items() if name.startswith(PROJECTOR)}
    assert new and not any(value.any() for value in new.values())
    kept = [name for name in made.state_dict() if not name.startswith(PROJECTOR) and name != POSITIONS]
    assert all(torch.equal(made.state_dict()[name], model.state_dict()[name]) for name in kept) and len(kept) > 50
    drawn = [with_geometry(model, processor, projector="mlp", seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    assert same(drawn[0], drawn[1]) and not all(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    assert with_geometry(model, processor, projector="linear") == (model, processor)


def test_nothing_asked_is_nothing_changed() -> None:
    model, processor = loud("siglip", "gemma")
    assert with_geometry(model, processor) == (model, processor)
    assert with_geometry(model, processor, image_size=28, layer=-1) == (model, processor)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("siglip", {"image_size": 10}, "image_size is 10, expected a whole number from 14"),
        ("siglip", {"image_size": [28, 56]}, r"image_size is \[28, 56\], expected a whole number"),
        ("siglip", {"image_size": 14 * 40}, "an image would be 1,600 tokens, and the decoder has 512 positions"),
        ("siglip", {"image": {"max_num_patches": 9}}, "max_num_patches is a budget of NaFlex towers"),
        ("siglip", {"image": {"mode": "naflex"}}, "does not fit a siglip tower"),
        ("siglip", {"image": {"resampel": "bicubic"}}, "did you mean 'resample'"),
        ("siglip", {"layer": -3}, "expected numbers from -1, the last, to -2"),
        ("siglip", {"layer": [-2, -1]}, "the features would be 64 wide, the model's projector reads 32"),
        ("siglip", {"projector": "lineer"}, "unknown projector 'lineer'"),
        ("siglip", {"encoder_kind": "clip"}, "cannot be read as 'clip'"),
        ("siglip2_naflex", {"image_size": 56}, r"takes images of any size; set its budget.*max_num_patches\": 16"),
        ("siglip2_naflex", {"layer": -2}, "gives its last layer only"),
        ("siglip2_naflex", {"image": {"mode": "squash"}}, "does not fit a siglip2_naflex tower"),
        ("dinov3", {"encoder_kind": "siglip"}, "cannot be read as 'siglip'"),
        ("fused", {"image_size": 56}, "each member of a fused tower has its own"),
        ("fused", {"image_size": [42, 64]}, "different grids"),
    ],
)
def test_impossible_changes(kind: str, changes: dict[str, Any], says: str) -> None:
    model, processor = loud(kind, "gemma")
    with pytest.raises(ConfigError, match=says):
        with_geometry(model, processor, **changes)


def test_two_layers_with_a_new_projector() -> None:
    model, processor = loud("siglip", "gemma")
    made, _ = with_geometry(model, processor, layer=[-2, -1], projector="mlp")
    assert made.config.vision_config.feature_layers == [1, 2]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_new_from_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = saved(tmp_path / "start")
    words = ["new", "--from", str(start), "--out", str(tmp_path / "larger")]
    assert main([*words, "--image-size", "56", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["image_tokens"] == 16 and "image size 28 -> 56 px" in captured.err
    made, reader = vlm.load(tmp_path / "larger", verify="full")
    old, _ = vlm.load(start)
    assert same(made.state_dict(), old.state_dict(), but=POSITIONS) > 50
    assert np.abs(made.state_dict()[POSITIONS].numpy() - bilinear(old.state_dict()[POSITIONS], 4)).max() < 1e-6
    for options, says in (
        ([], "nothing would change"),
        (["--image-size", "28"], "nothing would change"),
        (["--encoder", str(start), "--image-size", "56"], "has its --encoder already"),
        (["--image-size", "0"], "expected at least 1"),
    ):
        assert main(["new", "--from", str(start), "--out", str(tmp_path / "no"), *options]) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["new", "--encoder", str(start), "--out", str(tmp_path / "no")]) == 2
    assert "--from, a model to go on with" in capsys.readouterr().err


def test_the_commands_read_at_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--image-size` answers as the model that `vlm new --from` writes, and is another model to a cache of answers."""
    start = saved(tmp_path / "start")
    larger = tmp_path / "larger"
    assert main(["new", "--from", str(start), "--out", str(larger), "--image-size", "56"]) == 0
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    lines = []
    for i, file in enumerate(pictures):
        picture(i, (60 + i, 50)).save(file)
        lines.append(json.dumps({"id": str(i), "image": file.name, "prefix": "caption en", "suffix": "a red square"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    said = {}
    for name, words in {
        "small": ["--model", str(start)],
        "asked": ["--model", str(start), "--image-size", "56"],
        "larger": ["--model", str(larger)],
    }.items():
        capsys.readouterr()
        options = [*words, "--max-new-tokens", "6", "--device", "cpu"]
        assert main(["caption", *map(str, pictures), *options, "--json"]) == 0
        said[name] = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
        assert main(["ask", str(pictures[0]), "what?", *options]) == 0
        said[name].append(capsys.readouterr().out)
        data = ["--data", str(tmp_path / "data.jsonl"), "--metrics", "exact_match", "--out", str(tmp_path / name)]
        assert main(["eval", *options, *data]) == 0
        records = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        said[name] += [json.loads(line)["prediction"] for line in records]
    assert said["asked"] == said["larger"] != said["small"]
    data[-1] = str(tmp_path / "small")
    capsys.readouterr()
    assert main(["eval", "--model", str(start), "--image-size", "56", *options[-4:], *data]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["caption", str(pictures[0]), "--model", str(start), "--max-num-patches", "9"]) == 2
    assert "max_num_patches is a budget of NaFlex towers" in capsys.readouterr().err


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_stage_at_another_size(tmp_path: Path) -> None:
    """PaliGemma's stages 1 and 2: the second goes on with all weights of the first, at a larger size; killed in its
    middle and resumed it ends with the same bits."""
    stages = (align(steps=2), tune(steps=4, image_size=56, train={"projector": 1e-3}))
    whole = traintools.config(tmp_path / "whole", *stages, checkpoint_every=1)
    vlm.train.run(whole)
    first, _ = vlm.load(tmp_path / "whole" / "align" / "model")
    model, processor = vlm.load(tmp_path / "whole")
    assert processor.image_transform.image_size == 56 and processor.max_image_tokens == 16
    # The tower is frozen in both: only its positions, by interpolation, are others.
    before = {name: value for name, value in first.state_dict().items() if "vision_tower" in name}
    after = {name: value for name, value in model.state_dict().items() if "vision_tower" in name}
    assert same(after, before, but=POSITIONS) > 30
    assert np.abs(after[POSITIONS].numpy() - bilinear(before[POSITIONS], 4)).max() < 1e-6
    killed = traintools.config(tmp_path / "killed", *stages, checkpoint_every=1)
    assert stop_after(killed, 4) == -9
    vlm.train.run(killed, resume=True)
    assert traintools.difference(tmp_path / "whole" / "model", tmp_path / "killed" / "model") == 0


def test_a_run_goes_on_with_a_model_at_another_size(tmp_path: Path) -> None:
    model, _ = traintools.world()
    run = traintools.config(tmp_path / "run", align(steps=1), model={"path": model, "image_size": 42})
    vlm.train.run(run)
    assert vlm.load(tmp_path / "run")[1].image_transform.image_size == 42


def test_an_impossible_stage_is_refused_before_the_first(tmp_path: Path) -> None:
    run = traintools.config(tmp_path / "run", align(steps=1), tune(steps=1, image_size=10))
    with pytest.raises(ConfigError, match="stage tune: image_size is 10"):
        vlm.train.run(run)
    assert not (tmp_path / "run" / "align").exists()


# --- where a model is -------------------------------------------------------------------------------------------------


def test_a_run_a_stage_and_a_checkpoint_inside_it_are_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (align(steps=2), tune(steps=3, image_size=56, train={"projector": 1e-3}))
    run = tmp_path / "run"
    vlm.train.run(traintools.config(run, *stages, checkpoint_every=1))
    assert same(vlm.load(run)[0].state_dict(), vlm.load(run / "model")[0].state_dict()) > 50
    assert same(vlm.load(run / "align")[0].state_dict(), vlm.load(run / "align" / "model")[0].state_dict()) > 50
    last = sorted((run / "tune" / "checkpoints").glob("step-*"))[-1]
    inside, reader = vlm.load(last)
    final, processor = vlm.load(run)
    assert same(inside.state_dict(), final.state_dict()) > 50 and reader.image_transform == processor.image_transform
    first = sorted((run / "tune" / "checkpoints").glob("step-*"))[0]
    earlier = vlm.load(first)[0].state_dict()
    moved = [name for name in earlier if not torch.equal(earlier[name], final.state_dict()[name])]
    assert moved and all(name.startswith(PROJECTOR) for name in moved)
    picture(1, (60, 50)).save(tmp_path / "a.png")
    for path in (run, run / "tune", first):
        assert main(["caption", str(tmp_path / "a.png"), "--model", str(path), "--max-new-tokens", "3"]) == 0
    (run / "config.yaml").rename(tmp_path / "config.yaml")
    with pytest.raises(CheckpointError, match="the configuration of its run cannot be read"):
        vlm.load(first)
    (tmp_path / "config.yaml").rename(run / "config.yaml")
    weights = first / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="another sha256"):
        vlm.load(first)


def test_a_run_without_a_model_says_what_there_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    vlm.train.run(traintools.config(run, align(steps=1)))
    for folder in (run / "model", run / "align" / "model"):
        folder.rename(folder.with_name("gone"))
    with pytest.raises(CheckpointError, match=r"without a finished model; the newest there is .*step-00000001"):
        vlm.load(run)
