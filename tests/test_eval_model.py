"""The harness with real (tiny, random) models: one processor for everything, batch size, resume, fingerprints."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm
from vlm.build import presets
from vlm.checkpoints import identity
from vlm.errors import ConfigError
from vlm.eval import evaluate, table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 items: pictures of odd sizes, prompts of several lengths, so that every batch needs padding somewhere."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    lines = []
    for i in range(12):
        size = (rng.randrange(20, 60), rng.randrange(20, 60))
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{i}.png")
        prompt = "answer en what color is the " + "square " * (i % 4) + "?" if i % 3 else "caption en"
        lines.append(json.dumps({"id": f"n{i}", "image": f"{i}.png", "prefix": prompt, "suffix": "a red square"}))
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "test.jsonl"


def lively(encoder: str, decoder: str) -> Any:
    """A random model whose answers differ from picture to picture (the projector starts at zero otherwise)."""
    import torch

    model, processor = presets.tiny(encoder=encoder, decoder=decoder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, processor


def predictions(out: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in (out / "items.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("encoder", "decoder"), [("siglip", "gemma"), ("siglip2_naflex", "gemma2")])
def test_predictions_do_not_depend_on_batch_size(encoder: str, decoder: str, data: Path, tmp_path: Path) -> None:
    pair = lively(encoder, decoder)
    said = []
    for size in (1, 5, 12):
        out = tmp_path / str(size)
        evaluate(pair, data, "exact_match", out, batch_size=size, max_new_tokens=6, report=False, progress=False)
        said.append(predictions(out))
    assert said[0] == said[1] == said[2]
    assert len(set(said[0])) > 3, "a model that says one thing about everything proves nothing"


def test_predictions_are_those_of_generate(data: Path, tmp_path: Path) -> None:
    model, processor = lively("siglip", "gemma")
    found = evaluate(
        (model, processor), data, "exact_match", tmp_path / "o", max_new_tokens=6, report=False, progress=False
    )
    items = [json.loads(line) for line in data.read_text().splitlines()]
    direct = vlm.generate(
        model,
        processor,
        [data.parent / item["image"] for item in items],
        [item["prefix"] for item in items],
        max_new_tokens=6,
        batch_size=4,
    )
    assert predictions(tmp_path / "o") == direct
    records = [json.loads(line) for line in (tmp_path / "o" / "predictions.jsonl").read_text().splitlines()]
    ends = {record["id"]: record["finish"] for record in records}
    assert ends == {item["id"]: text.finish for item, text in zip(items, direct, strict=True)}
    cut = sum(text.finish == "length" for text in direct)
    assert found["num_cut_predictions"] == cut > 0
    assert f"{cut} answers were cut after 6 tokens (--max-new-tokens)" in table(found)


def test_a_saved_model_has_the_fingerprint_of_the_one_in_memory(data: Path, tmp_path: Path) -> None:
    """A run that was begun with a pair in memory goes on from the directory, and with changed weights it does not."""
    model, processor = lively("siglip", "gemma")
    vlm.save(model, processor, tmp_path / "model")
    settings: dict[str, Any] = {"data": data, "metrics": "exact_match,bleu_1", "out": tmp_path / "out"}
    settings |= {"max_new_tokens": 4, "device": "cpu", "progress": False}
    evaluate(tmp_path / "model", **settings)
    outcome = evaluate((model, processor), **settings)
    assert outcome["run"]["resumed_items"] == 12
    assert outcome["model"]["weights_sha256"] == identity.of_weights(model)
    assert outcome["model"]["processor_sha256"] == identity.of_processor(processor)
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    next(iter(model.parameters())).data[0] += 1e-3
    with pytest.raises(ConfigError, match="model.weights_sha256"):
        evaluate((model, processor), **settings)


def test_dtype_of_a_pair_cannot_be_chosen(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype='bfloat16' can only be chosen when a model directory is opened"):
        evaluate(lively("siglip", "gemma"), data, "exact_match", tmp_path / "o", dtype="bfloat16", progress=False)


def test_the_rule_of_the_beams_is_used_and_recorded(data: Path, tmp_path: Path) -> None:
    pair = lively("siglip", "gemma")
    options: dict[str, Any] = {"max_new_tokens": 4, "report": False, "progress": False, "limit": 3}
    said = {}
    for rule in ("big_vision", "transformers"):
        found = evaluate(pair, data, "exact_match", tmp_path / rule, num_beams=3, beam_search=rule, **options)
        assert found["decoding"] == {"max_new_tokens": 4, "num_beams": 3, "beam_search": rule}
        said[rule] = predictions(tmp_path / rule)
    assert said["big_vision"] != said["transformers"]
    greedy = evaluate(pair, data, "exact_match", tmp_path / "greedy", **options)
    assert greedy["decoding"] == {"max_new_tokens": 4, "num_beams": 1}
