"""`vlm demo --prepare`: data, towers and configuration of a comparison of vision towers."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import vlm
from vlm import settings
from vlm.cli import main as cli
from vlm.demo import dataset, prepare, pretrain, scenes
from vlm.demo.recipe import Size
from vlm.errors import ConfigError
from vlm.train.config import RunConfig

KINDS = ["clip", "dinov2", "dinov3", "siglip", "siglip2_naflex"]
SMALL = Size(4, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared for every kind, with new weights, in this process."""
    out = tmp_path_factory.mktemp("prepared") / "deep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "run_jobs", lambda jobs: [job(*arguments) for job, arguments in jobs])
        patch.setattr(prepare, "PROBE_TRAIN", 2)
        patch.setattr(prepare, "PROBE_TEST", 1)
        prepare.prepare(out, KINDS, steps=0, size=SMALL)
    return out


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((folder / "compare.yaml").read_text())
    return values


def test_every_tower_opens_from_where_the_file_says(folder: Path, config: dict[str, Any]) -> None:
    assert list(config["encoders"]) == KINDS
    for kind, tower in config["encoders"].items():
        tower = dict(tower)
        model, processor = vlm.new(folder / tower.pop("encoder"), "linear", folder / "gemma", **tower)
        assert model.config.encoder == kind
        assert processor.image_transform.max_patches == 36
    assert config["encoders"]["siglip2_naflex"]["encoder"] == "towers/siglip"
    assert not (folder / "towers" / "siglip2_naflex").exists()


def test_every_path_exists_and_the_run_is_a_run(folder: Path, config: dict[str, Any]) -> None:
    run = settings.from_dict(
        RunConfig, {**config["run"], "out": "x", "model": {**config["run"]["model"], "encoder": "y"}}
    )
    assert [stage.name for stage in run.stages] == ["align", "tune"]
    paths = [run.model.decoder, run.data.train, *config["probes"].values()]
    paths += [task["data"] for task in config["tasks"].values()]
    for path in paths:
        assert not Path(path).is_absolute() and (folder / path).exists(), path
    lines = dataset.read_lines(folder / config["tasks"]["questions"]["data"])
    assert lines and all((folder / "data" / line["image"]).is_file() for line in lines)


def test_labelled_pictures(folder: Path, config: dict[str, Any]) -> None:
    """Every class, as often as every other; the test's things stand in their held-out places, training's never."""
    labels = [" ".join(pair) for pair in scenes.PAIRS]
    for name, count in (("train", 2), ("test", 1)):
        lines = dataset.read_lines(folder / config["probes"][name])
        assert sorted(line["label"] for line in lines) == sorted(labels * count)
        for line in lines:
            colour, shape = line["label"].split()
            with Image.open(folder / "data" / line["image"]) as picture:
                cell = darkest_cell(picture)
            assert (cell == scenes.HELD_OUT[colour, shape]) == (name == "test")


def darkest_cell(picture: Image.Image) -> int:
    """Where the one thing stands: the cell that differs most from the light background."""
    blue = [min(picture.reduce(scenes.CELL).getpixel((c, r))) for r in range(3) for c in range(3)]  # type: ignore[arg-type]
    return blue.index(min(blue))


def test_going_on_keeps_towers_and_other_settings_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(pretrain, "run_jobs", asked.extend)
    monkeypatch.setattr(prepare, "write_labelled", lambda *_: None)
    prepare.prepare(folder, ["clip"], steps=0, size=SMALL)
    assert asked == []
    with pytest.raises(ConfigError, match="prepared with"):
        prepare.prepare(folder, ["clip"], steps=1, size=SMALL)


def test_naflex_alone_is_a_tower_of_its_own() -> None:
    encoders = prepare.comparison(["siglip2_naflex"])["encoders"]
    assert encoders == {"siglip2_naflex": {"encoder": "towers/siglip2_naflex", "image": {"max_num_patches": 36}}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prepare", "p", "--encoders", "clap"], "did you mean 'clip'"),
        (["--prepare", "p", "--encoders", "clip", "clip"], "different kinds"),
        (["--encoders", "clip"], "--prepare"),
    ],
)
def test_misuse(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["demo", *(str(tmp_path / a) if a == "p" else a for a in arguments)]) == 2
    assert message in capsys.readouterr().err
