"""The lmms-eval adapter: its work with requests as lmms-eval makes them, and a whole run where it is installed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlm
from vlm.build import presets
from vlm.errors import ConfigError, DataError
from vlm.eval import lmms

COLOURS = ("red", "blue", "green", "white", "black", "red", "blue")
QUESTION = "what colour is it?"
INSTRUCTION = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says something else about each colour."""
    net, processor = presets.tiny()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("model")
    vlm.save(net, processor, folder)
    return folder


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (30 + i, 28), colour) for i, colour in enumerate(COLOURS)]


def direct(folder: Path, prompt: str, **settings: Any) -> list[str]:
    """What `vlm.generate` says about each picture alone."""
    net, processor = vlm.load(folder)
    return [vlm.generate(net, processor, [image], [prompt], **settings)[0] for image in pictures()]


@dataclass
class Request:
    """As lmms_eval.api.instance.Instance, of which only `args` is read."""

    args: tuple[Any, ...]


def requests(settings: list[dict[str, Any]]) -> list[Request]:
    return [
        Request((QUESTION + INSTRUCTION, given, lambda doc: [doc["image"]], i, "toy", "test"))
        for i, given in enumerate(settings)
    ]


def answerer(folder: Path, **settings: Any) -> lmms.Answers:
    made = lmms.Answers(str(folder), device="cpu", **settings)
    made.task_dict = {"toy": {"test": [{"image": image} for image in pictures()]}}
    return made


def test_answers_are_those_of_generate_in_the_order_of_the_requests(model: Path) -> None:
    """Batches of 2, and two kinds of settings among each other."""
    short: dict[str, Any]
    long: dict[str, Any]
    short, long = {"max_new_tokens": 2, "until": ["\n\n"], "temperature": 0}, {"max_new_tokens": 5, "do_sample": False}
    mixed = [short if i % 3 else long for i in range(len(COLOURS))]
    said = answerer(model, batch_size=2, prefix="answer en", first_line=True).generate_until(requests(mixed))
    prompt = f"answer en {QUESTION}"
    expected = {n: direct(model, prompt, max_new_tokens=n) for n in (2, 5)}
    assert said == [expected[given["max_new_tokens"]][i] for i, given in enumerate(mixed)]
    assert len(set(expected[5])) > 2, "a model that says one thing about everything proves nothing"
    whole = answerer(model).generate_until(requests([short] * len(COLOURS)))
    assert whole == direct(model, QUESTION + INSTRUCTION, max_new_tokens=2)


def test_the_text_ends_at_the_first_stop() -> None:
    assert lmms._until("a cat\n\nand", ["\n\n", "dog"]) == "a cat"
    assert lmms._until("a cat", "at") == "a c"
    assert lmms._until("a cat", None) == lmms._until("a cat", [""]) == "a cat"


def test_what_cannot_be_answered_is_refused(model: Path) -> None:
    ours = answerer(model)
    for sampling in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ConfigError, match="the task samples"):
            ours.generate_until(requests([sampling]))
    video = Request((QUESTION, {}, lambda doc: ["film.mp4"], 0, "toy", "test"))
    with pytest.raises(DataError, match=r"toy/test/0: vlm models look at images; this request has str"):
        ours.generate_until([video])
    with pytest.raises(ConfigError, match="--model_args: attn is not known"):
        lmms.Answers(str(model), attn="sdpa")
    with pytest.raises(NotImplementedError, match="vlm eval --by likelihood"):
        ours.loglikelihood([])


def test_without_lmms_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(vars(lmms), "Model", raising=False)
    with pytest.raises(ConfigError, match=r"pip install vlm-backbone\[lmms-eval\]"):
        _ = lmms.Model


def test_a_whole_run_of_lmms_eval(model: Path, tmp_path: Path) -> None:
    """A task of its own, whose gold answers are what the model says about 4 of the 7 pictures."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install vlm-backbone[lmms-eval]")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from lmms_eval.tasks import TaskManager

    registry = ModelRegistryV2()
    registry.register_manifest(lmms.manifest())
    assert registry.get_model_class("vlm") is lmms.Model
    said = direct(model, f"answer en {QUESTION}", max_new_tokens=5)
    rows = []
    for i, image in enumerate(pictures()):
        image.save(tmp_path / f"{i}.png")
        gold = said[i].strip() if i < 4 else "nothing it says"
        rows.append({"id": i, "image": str(tmp_path / f"{i}.png"), "question": QUESTION, "answer": gold})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\ndef visual(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n"
    )
    (tmp_path / "toy.yaml").write_text(
        f"""
task: vlm_toy_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "test.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}\\n{INSTRUCTION.strip()}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    ours = lmms.Model.create_from_arg_string(
        f"pretrained={model},prefix=answer en,first_line=True", {"batch_size": "3", "device": "cpu"}
    )
    manager = TaskManager("ERROR", include_path=str(tmp_path))
    results = simple_evaluate(ours, tasks=["vlm_toy_colours"], task_manager=manager, log_samples=True, batch_size=3)
    assert results["results"]["vlm_toy_colours"]["exact_match,none"] == pytest.approx(4 / 7)
    assert [sample["filtered_resps"][0] for sample in results["samples"]["vlm_toy_colours"]] == said
