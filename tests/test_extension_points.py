"""Each extension point takes one more part from outside, with one new file and nothing else: the one that
docs/adding.md shows, read from the page, put on the path of its room and used as a user does."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import traintools
from coretools import loud, shake
from PIL import Image
from transformers import Qwen2ForCausalLM

import vlm
import vlm.eval.metrics
import vlm.train
from vlm import check
from vlm.build.presets import tiny, tiny_decoder
from vlm.check import runner
from vlm.cli import main
from vlm.data.order import Mixture, stage_seed
from vlm.errors import ConfigError, DataError
from vlm.eval import evaluate_tasks, tasks
from vlm.eval.metrics import registry
from vlm.eval.tasks import catalogue
from vlm.measure import info
from vlm.model import decoder
from vlm.registry import kinds
from vlm.train import step_log

ROOT = Path(__file__).resolve().parent.parent
POINTS = {
    "Encoder": "vlm/encoders/patches.py",
    "Projector": "vlm/projectors/mean.py",
    "Decoder": "vlm/decoders/qwen2.py",
    "Metric": "vlm/eval/metrics/first_letter.py",
    "Task": "vlm/eval/tasks/colours.yaml",
    "Data format": "vlm/data/formats/pipes.py",
    "Benchmark reader": "vlm/data/benchmarks/birds.py",
    "Check": "vlm/check/checks/finite.py",
    "Objective": "vlm/train/objectives/mean_one.py",
    "Command": "vlm/cli/commands/hello.py",
}
"""Heading of docs/adding.md -> the file that it shows."""
Put = Callable[[str], Path]


def page() -> str:
    return (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")


def shown(point: str) -> tuple[Path, str]:
    """The path and the text of the one file that a section shows."""
    (section,) = re.findall(rf"^## {point}\n(.*?)(?=^## |\Z)", page(), re.M | re.S)
    ((path, code),) = re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", section, re.M | re.S)
    return Path(path), code


def test_the_page_shows_one_file_for_each_point() -> None:
    assert re.findall(r"^## (.*)$", page(), re.M) == list(POINTS)
    assert {point: shown(point)[0].as_posix() for point in POINTS} == POINTS
    rooms = re.findall(r"^\| \[([a-z ]+)\]\(#[a-z-]+\) \| `(\S+)/NAME\.\w+` \|", page(), re.M)
    assert rooms == [(point.lower(), Path(path).parent.as_posix()) for point, path in POINTS.items()]
    for path in POINTS.values():
        assert (ROOT / path).parent.is_dir() and not (ROOT / path).exists()


def test_tests_that_the_page_names_are_there() -> None:
    for text in page().split("**Tests that pick it up**")[1:]:
        named = re.findall(r"`(tests/\w+\.py)`", text.split("\n## ")[0])
        assert all((ROOT / name).is_file() for name in named), named
        assert bool(named) != text.startswith(": none")


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """Writes the file of a section, alone, into a folder of its own, and puts that on the path of the room."""
    made = []

    def to_room(point: str) -> Path:
        path, code = shown(point)
        name = ".".join(path.parent.parts)
        assert path.stem not in kinds(name)
        file = tmp_path / "added" / path
        file.parent.mkdir(parents=True)
        file.write_text(code, encoding="utf-8")
        room = importlib.import_module(name)
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(file.parent)])
        made.append((room, path.stem))
        importlib.invalidate_caches()
        assert [one for one in kinds(name) if one == path.stem] == ([path.stem] if path.suffix == ".py" else [])
        return file

    yield to_room
    decoder.named.cache_clear()
    for room, name in made:
        sys.modules.pop(f"{room.__name__}.{name}", None)
        if hasattr(room, name):
            delattr(room, name)


def test_an_encoder(put: Put, tmp_path: Path) -> None:
    """Each channel 0 is made the mean of the patch: white and black halves are 1 and -1, row by row."""
    tokenizer, text = tiny()[1].tokenizer, tiny_decoder("gemma")
    with pytest.raises(ConfigError, match="patches"):
        vlm.new({"model_type": "patches"}, "linear", text, tokenizer)
    put("Encoder")
    model, processor = vlm.new({"model_type": "patches", "hidden_size": 8}, "linear", text, tokenizer)
    assert model.config.encoder == "patches" and model.model.multi_modal_projector.linear.in_features == 8
    shake(model)
    patches = model.model.vision_tower.patches
    model.model.vision_tower.blocks.apply(lambda module: [one.data.zero_() for one in module.parameters()])
    with torch.no_grad():
        patches.weight[0], patches.bias[0] = 1 / patches.weight[0].numel(), 0.0
    picture = Image.new("RGB", (28, 28), "black")
    picture.paste("white", (0, 0, 14, 28))
    batch = processor([picture], ["caption en"], ["a red square"])
    assert int((batch.input_ids == processor.image_token_id).sum()) == 4
    assert batch.pixel_values is not None
    features, mask, grid = model.encode(batch.pixel_values)
    torch.testing.assert_close(features[0, :, 0], torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert mask is None and grid.tolist() == [[2, 2]]
    loss = model(**batch).loss
    loss.backward()
    assert bool(loss.isfinite()) and bool((patches.weight.grad != 0).any())
    vlm.save(model, processor, tmp_path / "model")
    again, _ = vlm.load(tmp_path / "model")
    torch.testing.assert_close(again(**batch).loss, loss, rtol=0, atol=0)


def test_a_projector(put: Put, tmp_path: Path) -> None:
    put("Projector")
    assert "contract" not in kinds("vlm.projectors")
    model, processor = tiny("siglip", "gemma", {"kind": "mean", "scale": 2.0})
    torch.nn.init.ones_(model.model.multi_modal_projector.linear.weight)
    batch = processor([Image.new("RGB", (28, 28), (200, 30, 30))], ["caption en"], ["a red square"])
    assert int((batch.input_ids == processor.image_token_id).sum()) == 1
    assert batch.pixel_values is not None
    features = model.encode(batch.pixel_values).features
    seen = model(**batch).image_hidden_states  # the sum over the channels of the mean patch, twice
    torch.testing.assert_close(seen, (2 * features.mean(1).sum(-1, keepdim=True)).expand_as(seen))
    vlm.save(model, processor, tmp_path / "model")
    again, _ = vlm.load(tmp_path / "model")
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss, rtol=0, atol=0)


def test_a_projector_counts_no_padding(put: Put) -> None:
    put("Projector")
    projector = tiny("siglip", "gemma", {"kind": "mean"})[0].model.multi_modal_projector
    torch.nn.init.ones_(projector.linear.weight)
    features = torch.zeros(1, 3, projector.linear.in_features)
    features[0, :, 0] = torch.tensor([1.0, 3.0, torch.nan])
    tokens, _ = projector(features, torch.tensor([[True, True, False]]), torch.tensor([[1, 2]]))
    assert tokens.shape[1] == 1 and torch.equal(tokens, torch.full_like(tokens, 2.0))


def test_a_decoder(put: Put, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown decoder 'qwen2'; known: gemma, gemma2, gemma3_text"):
        tiny("siglip", "qwen2")
    put("Decoder")
    model, processor = tiny("siglip", "qwen2")
    assert "Qwen2DecoderLayer" in (model._no_split_modules or [])
    shake(model)
    picture = Image.new("RGB", (28, 28), (200, 30, 30))

    # Without a picture it is transformers' own language model, with the labels shifted there.
    batch = processor(text=["caption en", "is it red?"], suffix=["a red square", "yes"])
    ours = model.eval()(**batch, skip_logits=False)
    theirs = Qwen2ForCausalLM(model.config.text_config).eval()
    theirs.load_state_dict(
        {
            **{f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()},
            "lm_head.weight": model.lm_head.weight,
        }
    )
    plain = theirs(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "labels")})
    real = batch.attention_mask.bool()
    torch.testing.assert_close(ours.logits[real], plain.logits[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, plain.loss)

    # Causal: what follows changes nothing before it, though all of it is prefix. Gemma's prefix sees both ways.
    for net, unchanged in ((model, True), (loud("siglip", "gemma")[0], False)):
        batch = processor([picture], ["caption en"])
        before = net(**batch).logits[:, :-3]
        batch.input_ids[:, -2] = 5
        assert torch.equal(net(**batch).logits[:, :-3], before) == unchanged

    # Its matrices have the shapes of Gemma's.
    assert info.flops(model, (2, 2))["prefill"] == info.flops(loud("siglip", "gemma")[0], (2, 2))["prefill"]

    # It is saved, opened and asked like any other, in float16 too, which Gemma refuses.
    vlm.save(model, processor, tmp_path / "model")
    again, reader = vlm.load(tmp_path / "model", attn_implementation="eager")
    assert vlm.generate(again, reader, [picture], ["caption en"], max_new_tokens=4) == vlm.generate(
        model, processor, [picture], ["caption en"], max_new_tokens=4
    )
    assert vlm.load(tmp_path / "model", dtype="float16")[0].dtype == torch.float16


def test_a_metric(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    with pytest.raises(ConfigError, match="first_letter"):
        vlm.eval.metrics.get("first_letter")
    put("Metric")
    vlm.eval.metrics.find()
    said = {"1": "Apple", "2": "an owl", "3": ""}
    gold = {"1": ("big dog", "a cat"), "2": ("bird", "owl"), "3": ("",)}
    found = vlm.eval.metrics.compute("first_letter", said, gold)
    assert found.value == pytest.approx(1 / 3) and found.per_item == {"1": 1.0, "2": 0.0, "3": 0.0}
    # `vlm score` finds it by its name too.
    (tmp_path / "said.json").write_text(json.dumps(said))
    lines = [{"id": id, "prefix": "", "suffix": texts[-1]} for id, texts in gold.items()]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["-p", str(tmp_path / "said.json"), "-r", str(tmp_path / "gold.jsonl")]
    assert main(["score", "-m", "first_letter", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["first_letter"]["value"] == pytest.approx(1 / 3)
    assert main(["score", "--list"]) == 0 and "\nfirst_letter " in capsys.readouterr().out


SQUARES = {"a": "red", "b": "blue"}


class Sees:
    """Says `red` to every picture, and keeps what it was asked."""

    background = (255, 255, 255)

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def identity(self) -> dict[str, str]:
        return {"model": "sees"}

    def predict(self, images: Any, prompts: Any, *, ids: Any, decoding: Any) -> list[str]:
        self.asked += [(prompt, decoding.max_new_tokens) for prompt in prompts]
        return ["red"] * len(prompts)


def test_a_task(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A YAML in the folder of the tasks is one by its name."""
    request.addfinalizer(catalogue.get.cache_clear)
    with pytest.raises(ConfigError, match="unknown task 'colours'"):
        tasks.get("colours")
    monkeypatch.setattr(catalogue, "_HERE", put("Task").parent)
    data = tmp_path / "data" / "squares"
    data.mkdir(parents=True)
    for name, colour in SQUARES.items():
        Image.new("RGB", (8, 8), colour).save(data / f"{name}.png")
    lines = [{"id": name, "image": f"{name}.png", "prefix": "which?", "suffix": said} for name, said in SQUARES.items()]
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tasks.names() == ["colours"]
    loaded = tasks.get("colours").load(tmp_path / "data")
    assert [(ex.prefix, ex.suffix) for ex in loaded] == [("answer en which?", "red"), ("answer en which?", "blue")]
    sees = Sees()
    found = evaluate_tasks(sees, "colours", tmp_path / "data", tmp_path / "out")["tasks"]["colours"]
    assert sees.asked == [("answer en which?", 3)] * 2
    assert found["metrics"]["exact_match"]["value"] == 0.5 and found["task"]["title"] == "Colours of squares"


def test_a_data_format(put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("Data format")
    file = tmp_path / "train.txt"
    file.write_text("#pipes\na.png|caption en|a cat\nb.png|answer en what?|a dog\n")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    # Annotations: told from the content, and checked as ours are.
    examples, problems = vlm.data.read(file)
    assert [(ex.id, ex.prefix, ex.suffix, ex.line) for ex in examples] == [
        ("2", "caption en", "a cat", 2),
        ("3", "answer en what?", "a dog", 3),
    ]
    assert [ex.image for ex in examples] == [(tmp_path / name).resolve() for name in ("a.png", "b.png")]
    assert problems == [] and vlm.data.read(file, "pipes")[0] == examples
    with pytest.raises(DataError, match=r"train.txt:4: not-three: 1 cells"):
        file.write_text(file.read_text() + "half\n")
        vlm.data.read(file)
    file.write_text(file.read_text().replace("half\n", ""))
    # A task.
    (tmp_path / "tasks.yaml").write_text(
        "mine:\n  title: mine\n  format: pipes\n  default_split: all\n  metrics: [exact_match]\n"
        '  prompt: "please {prefix}"\n  splits: {all: {files: {data: {path: train.txt}}}}\n'
    )
    [task] = tasks.load_file(tmp_path / "tasks.yaml")
    assert [(ex.id, ex.prefix, ex.suffix) for ex in task.load(tmp_path)] == [
        ("2", "please caption en", "a cat"),
        ("3", "please answer en what?", "a dog"),
    ]
    # References of `vlm score`, for which no image is needed.
    (tmp_path / "a.png").unlink()
    said = tmp_path / "said.json"
    said.write_text('{"2": "a cat", "3": "a cow"}')
    assert main(["score", "-m", "exact_match", "-p", str(said), "-r", str(file), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["metrics"]["exact_match"]["value"] == 0.5
    assert f"{file} read as pipes" in printed.err


def test_a_benchmark_reader(put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("Benchmark reader")
    gold, said = tmp_path / "birds.json", tmp_path / "said.json"
    birds = [{"bird": 1, "species": "crow"}, {"bird": 2, "species": "owl"}]
    gold.write_text(json.dumps({"birds": birds}))
    said.write_text(json.dumps([{"bird": 1, "guess": "crow"}, {"bird": 2, "guess": "crow"}]))
    # The gold texts alone are enough for `vlm score`: no picture, no question.
    assert main(["score", "-m", "exact_match", "-p", str(said), "-r", str(gold), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["metrics"]["exact_match"]["value"] == 0.5
    assert printed.err.splitlines() == [f"predictions: {said} read as birds", f"references: {gold} read as birds"]
    # A task shows pictures and questions.
    (tmp_path / "tasks.yaml").write_text(
        "birds:\n  title: birds\n  format: birds\n  default_split: all\n  metrics: [exact_match]\n"
        '  prompt: "answer en {question}"\n  splits:\n    all:\n'
        "      files: {birds: {path: birds.json}, images: {path: pictures}}\n"
    )
    [task] = tasks.load_file(tmp_path / "tasks.yaml")
    with pytest.raises(DataError, match="no 'picture'; it has 'bird', 'species'. Is this the official file"):
        task.load(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "1.png")
    gold.write_text(json.dumps({"birds": [{**birds[0], "picture": "1.png", "question": "which bird?"}]}))
    [example] = task.load(tmp_path)
    assert (example.id, example.prefix, example.answers) == ("1", "answer en which bird?", ("crow",))
    assert example.image == tmp_path / "pictures" / "1.png"


def test_a_check(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = [entry.name for entry in runner.CHECKS]
    put("Check")
    monkeypatch.setattr(runner, "CHECKS", runner.find())
    assert [entry.name for entry in runner.CHECKS] == [*known, "finite"]
    model, processor = tiny("siglip", "gemma")
    vlm.save(model, processor, tmp_path / "model")
    assert main(["check", str(tmp_path / "model"), "--only", "finite", "--json"]) == 0
    assert re.findall(r'"(?:name|status)": "(.*?)"', capsys.readouterr().out) == ["finite", "ok"]
    with torch.no_grad():
        next(model.parameters()).view(-1)[:3] = torch.nan
    result = check.run(model, processor, only=["finite", "tied-weights"])["finite"]
    assert result.status == "FAIL" and result.measured == 3


def distance(folder: Path, pictures: list[Path]) -> float:
    """What the objective computes, by hand: the mean over images of (mean of their image tokens - 1) squared."""
    model, processor = vlm.load(folder, dtype="float32")
    pixels = processor(pictures, ["caption en"] * len(pictures)).pixel_values
    assert pixels is not None
    with torch.no_grad():
        features, line = model.encode(pixels).features, model.model.multi_modal_projector.linear
        return float(((features @ line.weight.T + line.bias).mean((1, 2)) - 1).square().mean())


def test_an_objective(put: Put, tmp_path: Path) -> None:
    """Two steps, and the loss is the mean over images however a step is cut; only the projector moves, and closer."""
    put("Objective")
    start, data = traintools.world()
    rows, count = {}, len(data.read_text().splitlines())
    for cuts in (1, 2):
        stage = traintools.align(objective="mean_one", steps=2, accumulate=cuts)
        vlm.train.run(traintools.config(tmp_path / str(cuts), stage))
        rows[cuts] = step_log.read(tmp_path / str(cuts) / "metrics.csv")
    assert [row["step"] for row in rows[1]] == ["1", "2"]
    assert [row["seen"] for row in rows[1]] == [row["seen"] for row in rows[2]]
    order = Mixture((count,), (1.0,), stage_seed(0, 0))
    pictures = [data.parent / "images" / f"{order.example(position)}.png" for position in range(count)]
    expected = distance(start, pictures[:4])
    for found in rows.values():
        assert float(found[0]["loss"]) == pytest.approx(expected, rel=1e-5)
    assert distance(tmp_path / "1" / "model", pictures) < distance(start, pictures)
    changed, before = traintools.weights(tmp_path / "1" / "model"), traintools.weights(start)
    moved = {name for name in before if not torch.equal(before[name], changed[name])}
    assert moved == {name for name in before if "projector" in name}


def test_an_objective_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = traintools.config(tmp_path / "out", traintools.align(objective="captoining"))
    with pytest.raises(ConfigError, match="unknown objective 'captoining'.*'captioning'"):
        vlm.train.run(run)
    assert not (tmp_path / "out").exists()


def test_a_command(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hello"]) == 2 and "unknown command: hello" in capsys.readouterr().err
    put("Command")
    assert main(["hello"]) == 0 and capsys.readouterr().out == "hello, world\n"
    assert main(["hello", "Ada", "--loud"]) == 0 and capsys.readouterr().out == "HELLO, ADA\n"
    assert main(["hello", "--lout"]) == 2 and "--loud" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert re.search(r"^    hello +greet$", capsys.readouterr().out, re.M)
    assert main(["hello", "--help"]) == 0 and "who is greeted" in capsys.readouterr().out
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (options,) = re.findall(r"^    hello\)\n        options='(.*)';;$", script, re.M)
    assert "--loud" in options.split() and " hello " in script
