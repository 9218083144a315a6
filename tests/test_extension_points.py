"""Each extension point takes one more from outside, with one new file and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import traintools
from coretools import loud, shake
from PIL import Image
from transformers import Qwen2ForCausalLM

import vlm
import vlm.check.checks
import vlm.data.benchmarks
import vlm.data.formats
import vlm.decoders
import vlm.eval.metrics
import vlm.projectors
import vlm.train
import vlm.train.objectives
from vlm import check
from vlm.build.presets import tiny
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
from vlm.train import metrics

A_CHECK = """
from vlm.check.report import Finding
from vlm.check.subject import Check, Subject


def finite(subject: Subject) -> Finding:
    wrong = sum(int((~weight.isfinite()).sum()) for weight in subject.model.parameters())
    return Finding(measured=wrong, limit=0, detail="weights that are NaN or infinite")


CHECKS = (Check("finite", "every weight is a number", finite, runs_tower=False),)
"""


def test_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finite.py").write_text(A_CHECK)
    monkeypatch.setattr(vlm.check.checks, "__path__", [*vlm.check.checks.__path__, str(tmp_path)])
    known = [entry.name for entry in runner.CHECKS]
    monkeypatch.setattr(runner, "CHECKS", runner.find())
    assert [entry.name for entry in runner.CHECKS] == [*known, "finite"]
    model, processor = tiny("siglip", "gemma")
    assert check.run(model, processor, only=["finite"])["finite"].status == "ok"
    with torch.no_grad():
        next(model.parameters()).view(-1)[:3] = torch.nan
    result = check.run(model, processor, only=["finite", "tied-weights"])["finite"]
    assert result.status == "FAIL" and result.measured == 3


# Causal, without soft-caps, windows or a scaled embedding: nothing that Gemma has.
A_DECODER = """
from transformers import Qwen2Config, Qwen2Model

from vlm.decoders.contract import FULL, SMALL, Facts, Spec

SPEC = Spec(
    title="Qwen 2",
    config=Qwen2Config,
    model=Qwen2Model,
    blocks=("Qwen2DecoderLayer",),
    facts=lambda config: Facts(
        embedding_scale=1.0,
        attention_width=config.hidden_size,
        layer_types=(FULL,) * config.num_hidden_layers,
        context=config.max_position_embeddings,
        bidirectional_prefix=False,
    ),
    small={**SMALL, "tie_word_embeddings": True},
    overflows_float16=False,
)
"""


def test_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(decoder.named.cache_clear)
    with pytest.raises(ConfigError, match="unknown decoder 'qwen2'; known: gemma, gemma2, gemma3_text"):
        tiny("siglip", "qwen2")
    (tmp_path / "qwen2.py").write_text(A_DECODER)
    monkeypatch.setattr(vlm.decoders, "__path__", [*vlm.decoders.__path__, str(tmp_path)])
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


A_PROJECTOR = """
from dataclasses import dataclass

import torch
from torch import nn

from vlm.projectors.contract import Spec


@dataclass(frozen=True, kw_only=True)
class Config:
    scale: float = 1.0


class Mean(nn.Module):
    def __init__(self, config, encoder_width, decoder_width):
        super().__init__()
        self.config, self.linear = config, nn.Linear(encoder_width, decoder_width, bias=False)

    def init_weights(self):
        nn.init.ones_(self.linear.weight)

    def num_tokens(self, grid):
        return 1

    def flops(self, grid):
        return 2 * self.linear.weight.numel()

    def forward(self, features, mask, grid):
        return self.config.scale * self.linear(features.mean(1, keepdim=True)), None


SPEC = Spec(config=Config, build=Mean, num_tokens=lambda config, grid: 1)
"""


def test_a_projector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mean.py").write_text(A_PROJECTOR)
    monkeypatch.setattr(vlm.projectors, "__path__", [*vlm.projectors.__path__, str(tmp_path)])
    assert "mean" in kinds("vlm.projectors") and "contract" not in kinds("vlm.projectors")
    model, processor = tiny("siglip", "gemma", {"kind": "mean", "scale": 2.0})
    batch = processor([Image.new("RGB", (28, 28), (200, 30, 30))], ["caption en"], ["a red square"])
    assert int((batch.input_ids == processor.image_token_id).sum()) == 1
    assert batch.pixel_values is not None
    features = model.encode(batch.pixel_values).features
    seen = model(**batch).image_hidden_states  # ones for weights: the sum over the channels of the mean patch
    torch.testing.assert_close(seen, (2 * features.mean(1).sum(-1, keepdim=True)).expand_as(seen))
    vlm.save(model, processor, tmp_path / "model")
    again, _ = vlm.load(tmp_path / "model")
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss, rtol=0, atol=0)


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModuleType, str, str], None]]:
    """Writes one new file into a folder of its own and puts the folder on the path of a room."""
    made = []

    def to_room(room: ModuleType, name: str, code: str) -> None:
        folder = tmp_path / f"room of {name}"
        folder.mkdir()
        (folder / f"{name}.py").write_text(code)
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(folder)])
        made.append((room, name))

    yield to_room
    for room, name in made:
        sys.modules.pop(f"{room.__name__}.{name}", None)
        if hasattr(room, name):
            delattr(room, name)


A_DATA_FORMAT = """
from vlm.data.formats.contract import AnnotationFormat
from vlm.data.problems import Refused

FORMAT = AnnotationFormat(
    about="a first line #pipes, then image|prefix|suffix a line", recognise=lambda head: head.startswith(b"#pipes")
)


def records(path, name):
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        cells = line.split("|")
        if number > 1:
            keys = ("image", "prefix", "suffix")
            yield number, dict(zip(keys, cells)) if len(cells) == 3 else Refused("not-three", f"{len(cells)} cells")
"""


def test_a_data_format(
    tmp_path: Path, put: Callable[[ModuleType, str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    put(vlm.data.formats, "pipes", A_DATA_FORMAT)
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
    assert [(ex.id, ex.prefix, ex.suffix) for ex in tasks.load(task, tmp_path)] == [
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


A_BENCHMARK = """
from functools import partial

from vlm.data.items import Item, Shown
from vlm.data.benchmarks.contract import Benchmark, inside, Predictions

FORMAT = Benchmark(
    about='Birds: {"birds": [{"bird", "picture", "species"}]}',
    gold="birds",
    recognise=inside("birds", "bird", "species"),
    predictions=(Predictions(name="birds", about='list of {"bird", "guess"}', id="bird", text="guess"),),
)


def read(source):
    folder = source.images()
    for row in source.object("birds").rows("birds"):
        yield Item(id=row.key("bird"), answers=(row.text("species"),), show=partial(_show, folder, row))


def _show(folder, row):
    return Shown(images=(folder / row.text("picture"),), fields={"question": row.text("question")})
"""


def test_a_benchmark_reader(
    tmp_path: Path, put: Callable[[ModuleType, str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    put(vlm.data.benchmarks, "birds", A_BENCHMARK)
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
        tasks.load(task, tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "1.png")
    gold.write_text(json.dumps({"birds": [{**birds[0], "picture": "1.png", "question": "which bird?"}]}))
    [example] = tasks.load(task, tmp_path)
    assert (example.id, example.prefix, example.answers) == ("1", "answer en which bird?", ("crow",))
    assert example.image == tmp_path / "pictures" / "1.png"


AN_OBJECTIVE = """
import torch

from vlm.train.batches import MicroBatches
from vlm.train.objectives.contract import Loss


class Objective:
    needs = ("encoder", "projector")

    def __init__(self, stage):
        self.stage = stage

    def check(self, examples):
        pass

    def batches(self, examples, mixture, processor, **how):
        return MicroBatches(examples, mixture, processor, **how)

    def loss(self, model, inputs, encoded=None):
        tokens = model.model.project(encoded)[0].view(len(encoded.features), -1)  # [M, Q * D]
        return Loss((tokens.mean(1) - 1).square().sum(), torch.tensor(float(len(tokens))))

    def reached(self, batch):
        return {"encoder", "projector"}
"""


def test_an_objective(tmp_path: Path, put: Callable[[ModuleType, str, str], None]) -> None:
    """Image tokens whose mean is 1: two steps, and the loss is the mean over images however a step is cut."""
    put(vlm.train.objectives, "mean_one", AN_OBJECTIVE)
    start, data = traintools.world()
    rows, ids = {}, [json.loads(line)["id"] for line in data.read_text().splitlines()]
    for cuts in (1, 2):
        stage = traintools.align(objective="mean_one", steps=2, accumulate=cuts)
        vlm.train.run(traintools.config(tmp_path / str(cuts), stage))
        rows[cuts] = metrics.read(tmp_path / str(cuts) / "metrics.csv")
    assert [row["step"] for row in rows[1]] == ["1", "2"] and float(rows[1][1]["loss"]) < float(rows[1][0]["loss"])
    assert [row["seen"] for row in rows[1]] == [row["seen"] for row in rows[2]]
    model, processor = vlm.load(start, dtype="float32")
    order = Mixture((len(ids),), (1.0,), stage_seed(0, 0))
    pictures = [data.parent / "images" / f"{order.example(position)}.png" for position in range(4)]
    with torch.no_grad():
        pixels = processor(pictures, ["caption en"] * 4).pixel_values
        assert pixels is not None
        features = model.encode(pixels).features
        line = model.model.multi_modal_projector.linear
        expected = ((features @ line.weight.T + line.bias).mean((1, 2)) - 1).square().mean()
    for found in rows.values():
        assert float(found[0]["loss"]) == pytest.approx(float(expected), rel=1e-5)
    changed = traintools.weights(tmp_path / "1" / "model")
    before = traintools.weights(start)
    moved = {name for name in before if not torch.equal(before[name], changed[name])}
    assert moved == {name for name in before if "projector" in name}


def test_an_objective_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = traintools.config(tmp_path / "out", traintools.align(objective="captoining"))
    with pytest.raises(ConfigError, match="unknown objective 'captoining'.*'captioning'"):
        vlm.train.run(run)
    assert not (tmp_path / "out").exists()


A_METRIC = """
from vlm.eval.metrics.registry import register
from vlm.eval.metrics.result import mean_result


@register("same_length", summary="as many words as a reference", reads="references")
def same_length(predictions, references):
    words = {key: {len(text.split()) for text in gold} for key, gold in references.items()}
    scores = {key: float(len(predictions[key].split()) in counts) for key, counts in words.items()}
    return mean_result("same_length", scores, "1 for as many words as any reference")
"""


def test_a_metric(put: Callable[[ModuleType, str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    with pytest.raises(ConfigError, match="same_length"):
        vlm.eval.metrics.get("same_length")
    put(vlm.eval.metrics, "lengths", A_METRIC)
    vlm.eval.metrics.find()
    said, gold = {"1": "a red cat", "2": "an owl"}, {"1": ("the big dog",), "2": ("owl", "bird")}
    found = vlm.eval.metrics.compute("same_length", said, gold)
    assert found.value == 0.5 and found.per_item == {"1": 1.0, "2": 0.0}
    # `vlm score` finds it by its name too.
    for name, lines in (("said", said), ("gold", {key: texts[0] for key, texts in gold.items()})):
        key = "prediction" if name == "said" else "suffix"
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"id": id, "prefix": "", key: text}) + "\n" for id, text in lines.items())
        )
    files = ["-p", str(tmp_path / "said.jsonl"), "-r", str(tmp_path / "gold.jsonl")]
    assert main(["score", "-m", "same_length", *files]) == 0


A_TASK = """
name: colours
title: colours of squares
format: jsonl
default_split: test
metrics: [exact_match]
prompt: "answer en {prefix}"
decoding: {max_new_tokens: 3}
splits:
  test:
    files: {data: {path: squares/test.jsonl}}
"""


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


def test_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A YAML in the folder of the tasks is one by its name."""
    room = tmp_path / "tasks"
    room.mkdir()
    (room / "colours.yaml").write_text(A_TASK)
    monkeypatch.setattr(catalogue, "_HERE", room)
    catalogue.get.cache_clear()
    data = tmp_path / "data" / "squares"
    data.mkdir(parents=True)
    for name, colour in SQUARES.items():
        Image.new("RGB", (8, 8), colour).save(data / f"{name}.png")
    lines = [{"id": name, "image": f"{name}.png", "prefix": "which?", "suffix": said} for name, said in SQUARES.items()]
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "colours" in tasks.names()
    sees = Sees()
    found = evaluate_tasks(sees, "colours", tmp_path / "data", tmp_path / "out")["tasks"]["colours"]
    catalogue.get.cache_clear()
    assert sees.asked == [("answer en which?", 3)] * 2
    assert found["metrics"]["exact_match"]["value"] == 0.5 and found["task"]["title"] == "colours of squares"
