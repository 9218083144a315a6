"""Towers of the demo's size of every kind: what is written, that other readers see the same, that each one trains."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MODEL_MAPPING, AutoModel

import vlm
from vlm import demo
from vlm.demo import learning, scenes, towers
from vlm.demo.recipe import Size
from vlm.demo.start import ASSETS, Choice, make
from vlm.errors import ConfigError
from vlm.model.parts import encoder_spec
from vlm.registry import kinds


def available(kind: str) -> bool:
    """Its library is there."""
    try:
        encoder_spec(kind).tiny()
    except ConfigError:
        return False
    return True


KINDS = [kind for kind in kinds("vlm.encoders") if available(kind)]
each_kind = pytest.mark.parametrize("kind", KINDS)
PICTURES = [scenes.draw(scenes.make_scene(random.Random(i))) for i in range(8)]
QUICK = ("stages.0.steps=1", "stages.1.steps=1", "stages.0.batch_size=4", "stages.1.batch_size=4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of new towers, one for each kind."""
    out = tmp_path_factory.mktemp("towers")
    for kind in KINDS:
        towers.new_tower(kind, out / kind, seed=0)
    return out


@each_kind
def test_every_kind_opens_at_the_demos_size_with_36_tokens(made: Path, kind: str) -> None:
    model, processor = vlm.new(made / kind, "linear", ASSETS / "gemma")
    assert model.config.encoder == kind
    pixels = processor.image_transform(PICTURES)
    assert pixels.grids == [(6, 6)] * len(PICTURES)
    tower = model.model.vision_tower
    features = tower(**{k: v for k, v in pixels._asdict().items() if isinstance(v, torch.Tensor)}).features
    assert features.shape == (8, 36, 128)
    size = sum(parameter.numel() for parameter in tower.parameters())
    assert 200_000 < size < 500_000, "towers are compared at one size"


@each_kind
def test_the_written_tower_is_the_one_in_memory(made: Path, kind: str) -> None:
    """The same seed gives the same weights, and transformers' own class, where there is one, reads the whole file."""
    config = towers.config(kind)
    if type(config) in MODEL_MAPPING:
        whole, info = AutoModel.from_pretrained(made / kind, output_loading_info=True)
        assert whole.config.hidden_size == 128 and not any(info.values()), info
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = encoder_spec(kind).encoder._from_config(config)
    model, _ = vlm.new(made / kind, "linear", ASSETS / "gemma")
    opened = model.model.vision_tower.state_dict()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(opened[name], tensor.half().float()), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "siglip"])
def test_pretraining_teaches_every_kind(kind: str) -> None:
    """Some steps on one batch bring the loss down, and every tensor of the tower moves (the SigLIP: see
    test_demo_pretrain.py)."""
    torch.manual_seed(0)
    words = learning.Words(ASSETS / "gemma")
    batch = towers.tower_batch(random.Random(0), words, 4)
    model, captioner = towers.pair(kind, 501)
    before = {name: tensor.clone() for name, tensor in model.vision_model.tower.named_parameters()}
    parameters = [*model.parameters(), *captioner.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(6):
        loss = towers.tower_loss(model, captioner, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    for name, tensor in model.vision_model.tower.named_parameters():
        assert not torch.equal(before[name], tensor), name


@each_kind
def test_a_kind_sees_in_pretraining_what_its_transform_gives(kind: str) -> None:
    """Pretraining and the model read the same numbers from a picture."""
    if kind == "siglip":
        inputs = {"pixel_values": towers.pixels([scenes.make_scene(random.Random(0))])}
    else:
        tower = towers.AnyTower(kind, torch.nn.Identity())
        inputs = tower.inputs(towers.pixels([scenes.make_scene(random.Random(0))]))
    expected = towers.image_transform(kind)(PICTURES[:1])
    assert torch.allclose(inputs["pixel_values"], expected.pixel_values, atol=1e-5)
    for name in set(inputs) - {"pixel_values"}:
        assert torch.equal(inputs[name], getattr(expected, name))


def test_the_demo_runs_with_another_tower_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.demo.answers.MAX_NEW_TOKENS", 2)
    facts = demo.main(tmp_path / "out", encoder="dinov3", size=Size(12, 3, QUICK))
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["encoder"] == "dinov3" == facts["encoder"]["kind"]
    assert "tower   dinov3: NEW weights" in capsys.readouterr().out
    assert facts["encoder"]["pretrain_steps"] == 0 and "NEW" in facts["encoder"]["weights"]


def test_a_pretrained_start_is_made_once_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.demo import pretrain

    asked: list[Any] = []
    monkeypatch.setattr(pretrain, "run_jobs", asked.extend)
    start = make(Choice("clip", pretrain=True, steps=7), tmp_path, 3)
    assert asked == [(towers.pretrain_tower, ("clip", tmp_path / "clip", ASSETS / "gemma", 3, 7))]
    assert start.model["encoder"] == str(tmp_path / "clip") and start.pretrain_steps == 7
    assert "7 steps" in start.text and not start.shipped


def test_a_checkpoint_is_taken_as_it_is(made: Path, tmp_path: Path) -> None:
    start = make(Choice(str(made / "clip")), tmp_path, 0)
    assert start.model == {"encoder": str(made / "clip"), "decoder": str(ASSETS / "gemma")}
    assert make(Choice(), tmp_path, 0).shipped
    naflex = make(Choice("siglip2_naflex"), tmp_path, 0)
    assert naflex.model["encoder"] == str(ASSETS / "siglip") and naflex.model["encoder_kind"] == "siglip2_naflex"
    assert "read as NaFlex" in naflex.text and naflex.pretrain_steps is None
    assert not list(tmp_path.iterdir()), "nothing is made where weights are there"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("clipp"), "did you mean 'clip'"),
        (Choice("some/checkpoint", pretrain=True), "no kind that can be pretrained"),
        (Choice("some/checkpoint", from_scratch=True), "no kind that can be pretrained"),
    ],
)
def test_wrong_towers_are_refused(choice: Choice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choice.check()
