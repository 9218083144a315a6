"""An encoder of the user's own: examples/own_encoder.py, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlm
from vlm.cli import main
from vlm.encoders import use
from vlm.errors import VLMError

ROOT = Path(__file__).resolve().parent.parent
NAME = "own_encoder:PatchTower"


def python(*words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{path}:{ROOT}"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "model"
    done = python(str(ROOT / "examples" / "own_encoder.py"), str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}: encoder {NAME}, 4 patches per image\n"
    return folder


@pytest.mark.slow
def test_opened_on_the_command_line(built: Path) -> None:
    done = python("-m", "vlm", "info", str(built), "--encoder-class", NAME, path=str(ROOT / "examples"))
    assert done.returncode == 0 and NAME in done.stdout, done.stderr
    done = python("-m", "vlm", "check", str(built), "--encoder-class", NAME, path=str(ROOT / "examples"))
    assert done.returncode == 0 and " 0 FAIL" in done.stdout, done.stdout + done.stderr


def test_a_configuration_never_imports(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module could be imported, and would leave a mark; the refusal says how to open the model."""
    mark = tmp_path / "imported"
    (tmp_path / "own_encoder.py").write_text(f"open({str(mark)!r}, 'w').close()\nPatchTower = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(VLMError, match=rf"no configuration can load.*vlm.encoders.use\('{NAME}'\).*--encoder-class"):
        vlm.load(built)
    assert not mark.exists() and "own_encoder" not in sys.modules
    with pytest.raises(VLMError, match="own_encoder has no SPEC"):
        use(NAME)
    assert mark.exists()
    sys.modules.pop("own_encoder")
    with pytest.raises(VLMError, match="no configuration can load"):
        vlm.load(built)  # what was refused is not known


def test_bad_names(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("own", "expected MODULE:CLASS"), ("not_there_xyz:A", "cannot be imported")):
        with pytest.raises(VLMError, match=message):
            use(name)
        assert main(["info", str(built), "--encoder-class", name]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_one_file_is_all_that_an_encoder_of_the_library_needs(tmp_path: Path) -> None:
    """The example's tower as a file in `vlm/encoders`: found by `vlm.new`, `load`, `info`, `check`, and by the contract
    tests, which know nothing of it."""
    source = (ROOT / "examples" / "own_encoder.py").read_text(encoding="utf-8")
    source = source[: source.index("def main(")].replace("    title=", "    tiny=Config,\n    title=")
    source = source.replace('"own_encoder:PatchTower"', '"patchwork"').replace('"patch_tower"', '"patchwork"')
    source = source.replace("import vlm\n", "").replace("from vlm.build.presets import tiny, tiny_decoder\n", "")
    (tmp_path / "patchwork.py").write_text(source, encoding="utf-8")
    code = f"""
import sys, vlm.encoders
vlm.encoders.__path__.append({str(tmp_path)!r})
import pytest, vlm
import vlm.measure.info
from vlm import check
from vlm.build import presets
model, processor = presets.tiny("patchwork")
vlm.save(model, processor, {str(tmp_path / "model")!r})
model, processor = vlm.load({str(tmp_path / "model")!r})
assert "patchwork" in vlm.measure.info.table(vlm.measure.info.describe((model, processor)))
assert check.run(model, processor, only=["tower", "patch-order", "tower-gradients", "image-range"]).ok
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_encoders_contract.py", "-k", "patchwork"]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert any(line.startswith(".") and line.count(".") > 10 for line in done.stdout.splitlines()), done.stdout


@pytest.mark.slow
def test_new_from_a_checkpoint_of_its_own(built: Path, tmp_path: Path) -> None:
    """`vlm new --encoder-class`: the tower's weights come from its checkpoint; without the option it is refused."""
    from safetensors.torch import load_file, save_file

    from vlm.build.presets import tiny

    model, processor = tiny()
    model.model.language_model.save_pretrained(tmp_path / "gemma")
    processor.tokenizer.save_pretrained(tmp_path / "gemma")
    prefix = "model.vision_tower."
    stored = {n: t for file in built.glob("*.safetensors") for n, t in load_file(file).items()}
    tower = {n.removeprefix(prefix): t * 2 for n, t in stored.items() if n.startswith(prefix)}
    (tmp_path / "tower").mkdir()
    save_file({**tower, "classifier.weight": tower["norm.weight"].clone()}, tmp_path / "tower" / "model.safetensors")
    (tmp_path / "tower" / "config.json").write_text('{"model_type": "patch_tower", "hidden_size": 32}')
    words = ["new", "--encoder", str(tmp_path / "tower"), "--decoder", str(tmp_path / "gemma")]
    words += ["--out", str(tmp_path / "out")]
    assert main(words) == 2
    done = python("-m", "vlm", *words, "--encoder-class", NAME, path=str(ROOT / "examples"))
    assert done.returncode == 0, done.stderr
    made = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert tower and all((made[prefix + name] == value).all() for name, value in tower.items())


@pytest.mark.slow
def test_a_comparison_of_ones_own_tower(built: Path, tmp_path: Path) -> None:
    """`vlm compare --encoder-class`: known by its checkpoint alone."""
    import yaml
    from safetensors.torch import load_file, save_file
    from traintools import pictures

    from vlm.build.presets import tiny
    from vlm.build.towers import choose

    model, processor = tiny()
    model.model.language_model.save_pretrained(tmp_path / "gemma")
    processor.tokenizer.save_pretrained(tmp_path / "gemma")
    prefix = "model.vision_tower."
    tower = load_file(built / "model.safetensors")
    (tmp_path / "patch").mkdir()
    kept = {name.removeprefix(prefix): value for name, value in tower.items() if name.startswith(prefix)}
    save_file(kept, tmp_path / "patch" / "model.safetensors")
    (tmp_path / "patch" / "config.json").write_text('{"model_type": "patch_tower", "hidden_size": 32}')
    with pytest.raises(VLMError, match="model_type is 'patch_tower', expected"):
        choose(tmp_path / "patch")
    data = pictures(tmp_path / "data", 4)
    stage = {"name": "a", "module": "frozen_encoder", "train": {"projector": 1e-3}, "steps": 1, "batch_size": 2}
    run = {"model": {"decoder": str(tmp_path / "gemma")}, "data": {"train": str(data)}, "accelerator": "cpu"}
    task = {"data": str(data), "metrics": ["exact_match"], "max_new_tokens": 2, "limit": 2, "batch_size": 2}
    values = {"encoders": {"mine": str(tmp_path / "patch")}, "tasks": {"t": task}, "speed_images": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**values, "run": {**run, "stages": [stage]}}))
    words = ["-m", "vlm", "compare", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"), "--plan"]
    done = python(*words, "--encoder-class", NAME, path=str(ROOT / "examples"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "mine+linear" in done.stdout and NAME in done.stdout
