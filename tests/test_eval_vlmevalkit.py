"""The registration of a model in VLMEvalKit: with the real package where it is installed, else with its interface."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_eval_model import lively

import vlm

EXAMPLE = Path(__file__).parents[1] / "examples" / "vlmevalkit_model.py"


class BaseModel:
    """What of `vlmeval.vlm.base.BaseModel` a run calls: `generate` checks the message and hands it to the model."""

    INTERLEAVE = False
    allowed_types = ("text", "image")

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        assert isinstance(message, list) and all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`vlmeval.config.supported_VLM`: names with functions that build models."""
    if importlib.util.find_spec("vlmeval") is not None:
        from vlmeval.config import supported_VLM

        installed: dict[str, Any] = supported_VLM
        return installed
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vlmeval.vlm.base"].BaseModel = BaseModel  # type: ignore[attr-defined]
    supported: dict[str, Any] = {}
    sys.modules["vlmeval.config"].supported_VLM = supported  # type: ignore[attr-defined]
    return supported


def test_a_registered_model_answers_messages(registry: dict[str, Any], tmp_path: Path) -> None:
    model, processor = lively("siglip", "gemma")
    vlm.save(model, processor, tmp_path / "model")
    paths = [str(tmp_path / f"{name}.png") for name in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (30, 28), Path(path).stem).save(path)
    spec = importlib.util.spec_from_file_location("vlmevalkit_model", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.register(str(tmp_path / "model"))
    ours = registry["vlm"]()
    text = "what colour is it?\nAnswer the question using a single word or phrase."
    message = [*({"type": "image", "value": path} for path in paths), {"type": "text", "value": text}]
    net, loaded = vlm.load(tmp_path / "model")
    both = vlm.generate(net, loaded, [paths], ["answer en what colour is it?"])
    one = vlm.generate(net, loaded, [paths[:1]], ["answer en what colour is it?"])
    assert ours.generate(message) == both[0] != one[0]
    assert ours.generate(message[:1] + message[2:], "POPE") == one[0]
    example.register(str(tmp_path / "model"), prefix="", name="bare")
    assert registry["bare"]().generate(message) == vlm.generate(net, loaded, [paths], [text])[0]


def test_the_script_registers_and_then_runs_what_it_is_given(tmp_path: Path) -> None:
    """As `python examples/vlmevalkit_model.py run.py --model vlm`, with a package of the interface's names."""
    package = tmp_path / "vlmeval"
    (package / "vlm").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "config.py").write_text("supported_VLM = {}\n")
    (package / "vlm" / "__init__.py").write_text("")
    (package / "vlm" / "base.py").write_text("class BaseModel: pass\n")
    (tmp_path / "helper.py").write_text("text = 'beside run.py'\n")
    (tmp_path / "run.py").write_text(
        "import sys, helper\nfrom vlmeval.config import supported_VLM\n"
        "print(list(supported_VLM), sys.argv[1:], helper.text)\n"
    )
    root = Path(vlm.__file__).parents[1]
    environment = {"VLM_MODEL": "m", "PYTHONPATH": f"{root}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    words = [sys.executable, str(EXAMPLE), str(tmp_path / "run.py"), "--model", "vlm"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "['vlm'] ['--model', 'vlm'] beside run.py", done.stderr
