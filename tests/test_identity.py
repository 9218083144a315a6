"""What counts as the same model and the same data, and that everything which keeps results asks for it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud, picture

import vlm
from vlm.build.presets import tiny
from vlm.checkpoints import identity
from vlm.compare.measure import labelled_digest
from vlm.compare.sources import SOURCES, check_sources, sources
from vlm.data import content
from vlm.data.reading import read, read_labelled
from vlm.errors import ConfigError, DataError
from vlm.eval import evaluate, items
from vlm.generation.models import ModelPredictor
from vlm.train.config import ModelConfig
from vlm.train.features.store import Plan
from vlm.train.sources import data_digest

Pair = tuple[vlm.VLM, vlm.Processor]
KINDS = [("siglip", "gemma"), ("siglip2_naflex", "gemma2"), ("clip", "gemma3_text")]


def write_data(folder: Path, names: list[str], first_seed: int = 0) -> Path:
    """An annotation file and its pictures; picture `i` is noise of seed `first_seed + i`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(first_seed + i, (30, 20 + i)).save(folder / name)
        line = {"id": str(i), "image": name, "prefix": "caption en", "suffix": "a square", "label": "square"}
        lines.append(json.dumps(line) + "\n")
    file = folder / "data.jsonl"
    file.write_text("".join(lines))
    return file


# --- models -----------------------------------------------------------------------------------------------------------


def with_text(pair: Pair, **values: Any) -> Pair:
    """The same weights with another decoder configuration."""
    model, processor = copy.deepcopy(pair[0]), pair[1]
    for name, value in values.items():
        assert getattr(model.config.text_config, name) != value
        setattr(model.config.text_config, name, value)
    return model, processor


def with_images(pair: Pair, **values: Any) -> Pair:
    processor = copy.copy(pair[1])
    processor.image_transform = replace(processor.image_transform, **values)
    return pair[0], processor


def with_pool(pair: Pair, factor: int) -> Pair:
    model = copy.deepcopy(pair[0])
    model.config.projector_config = {"kind": "pool", "factor": factor}
    return model, vlm.Processor(pair[1].tokenizer, pair[1].image_transform, model.config.projector_config)


def with_tokenizer(pair: Pair) -> Pair:
    tokenizer = copy.deepcopy(pair[1].tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<loc0001>"]})
    return pair[0], vlm.Processor(tokenizer, pair[1].image_transform, pair[1].projector)


def with_attribute(pair: Pair, part: str, name: str, value: Any) -> Pair:
    model = copy.deepcopy(pair[0])
    owner = model if part == "" else model.get_submodule(part) if part == "model" else getattr(model, part)
    setattr(owner, name, value)
    return model, pair[1]


OTHERS: dict[str, Callable[[Pair], Pair]] = {
    "attention soft-cap": lambda pair: with_text(pair, attn_logit_softcapping=5.0),
    "final soft-cap": lambda pair: with_text(pair, final_logit_softcapping=5.0),
    "no final soft-cap": lambda pair: with_text(pair, final_logit_softcapping=None),
    "norm": lambda pair: with_text(pair, rms_norm_eps=1e-3),
    "rope": lambda pair: with_text(pair, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
    "window": lambda pair: with_text(pair, sliding_window=4),
    "tower": lambda pair: with_attribute(
        pair, "config", "vision_config", type(pair[0].config.vision_config)(**VISION, layer_norm_eps=1e-3)
    ),
    "soft-cap in use": lambda pair: with_attribute(pair, "config", "softcap_in_generation", False),
    "placeholder": lambda pair: with_attribute(pair, "config", "image_token_id", 5),
    "projector": lambda pair: with_pool(pair, 2),
    "image mean": lambda pair: with_images(pair, mean=(0.4, 0.5, 0.5)),
    "filter": lambda pair: with_images(pair, resample="lanczos"),
    "background": lambda pair: with_images(pair, background=(0, 0, 0)),
    "tokenizer": with_tokenizer,
    "repetition penalty": lambda pair: with_attribute(pair, "generation_config", "repetition_penalty", 1.5),
    "a bit of a weight": lambda pair: flipped(pair),
    "dtype": lambda pair: (copy.deepcopy(pair[0]).bfloat16(), pair[1]),
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def flipped(pair: Pair) -> Pair:
    model = copy.deepcopy(pair[0])
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    weight.data.view(torch.int32)[3, 4] ^= 1
    return model, pair[1]


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_decides_an_answer_makes_another_model(name: str) -> None:
    pair = tiny("siglip", "gemma2", {"kind": "pool", "factor": 1})
    assert identity.of_model(*OTHERS[name](pair)) != identity.of_model(*pair)


@pytest.mark.parametrize(("encoder", "decoder"), KINDS)
def test_a_model_that_was_moved_or_saved_again_is_the_same(encoder: str, decoder: str, tmp_path: Path) -> None:
    model, processor = loud(encoder, decoder)
    known = identity.of_model(model, processor)
    vlm.save(model, processor, tmp_path / "a")
    assert identity.of_model(*vlm.load(tmp_path / "a")) == known
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    again = vlm.load(tmp_path / "elsewhere")
    assert identity.of_model(*again) == known
    vlm.save(*again, tmp_path / "shards", max_shard_size="60KB")
    config = json.loads((tmp_path / "shards" / "config.json").read_text())
    config |= {"transformers_version": "0.0.1", "_name_or_path": "/somewhere", "architectures": ["Other"]}
    config["text_config"] |= {"transformers_version": "0.0.1", "_name_or_path": "x", "field_of_a_later_version": None}
    (tmp_path / "shards" / "config.json").write_text(json.dumps(config))
    assert identity.of_model(*vlm.load(tmp_path / "shards", verify="none")) == known


def test_use_does_not_change_a_model() -> None:
    model, processor = tiny()
    known = identity.of_model(model, processor)
    processor.tokenizer(["a red square", "no"], padding=True, truncation=True, max_length=2)
    vlm.generate(model, processor, [picture(1)], ["caption en"], max_new_tokens=2)
    model.train()
    assert identity.of_model(model, processor) == known


def test_a_projectors_defaults_may_be_written_out_or_not() -> None:
    model, processor = tiny(projector={"kind": "mlp"})
    known = identity.of_config(model.config)
    model.config.projector_config = {"hidden_size": None, **vlm.model.projecting.full_settings({"kind": "mlp"})}
    assert identity.of_config(model.config) == known


def test_the_digest_of_weights_by_hand() -> None:
    layer = torch.nn.Linear(3, 2).to(torch.bfloat16)
    total = hashlib.sha256()
    for name in ("bias", "weight"):
        tensor = getattr(layer, name).detach()
        total.update(f"{name} torch.bfloat16 {tuple(tensor.shape)}".encode())
        total.update(tensor.view(torch.int16).numpy().tobytes())
    assert identity.of_weights(layer) == total.hexdigest()


def test_an_offloaded_model_is_the_same(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    vlm.save(model, processor, tmp_path / "m")
    places = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk"}
    options: dict[str, Any] = {"device_map": {**places, "lm_head": "disk"}, "offload_folder": tmp_path / "off"}
    parted, _ = vlm.load(tmp_path / "m", **options)
    assert identity.of_weights(parted) == identity.of_weights(model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda pair: with_text(pair, attn_logit_softcapping=5.0), r"configuration of the model \(model.config_sha256"),
        (lambda pair: with_pool(pair, 2), "tokenizer, image settings or number of image tokens"),
    ],
)
def test_evaluation_does_not_go_on_with_another_model(
    change: Callable[[Pair], Pair], told: str, tmp_path: Path
) -> None:
    """The two examples: equal weights, another configuration."""
    data = write_data(tmp_path / "data", ["0.png", "1.png"])
    options: dict[str, Any] = {"max_new_tokens": 3, "report": False, "progress": False}
    pair = tiny("siglip", "gemma2", {"kind": "pool", "factor": 1})
    evaluate(pair, data, "exact_match", tmp_path / "out", **options)
    other = change(pair)
    assert identity.of_weights(other[0]) == identity.of_weights(pair[0])
    with pytest.raises(ConfigError, match=told):
        evaluate(other, data, "exact_match", tmp_path / "out", **options)
    assert evaluate(pair, data, "exact_match", tmp_path / "out", **options)["run"]["resumed_items"] == 2


def test_the_identity_of_a_predictor_is_that_of_its_model() -> None:
    pair = loud("siglip", "gemma")
    said = ModelPredictor(*pair, name="m", identity=identity.of_model).identity()
    assert {key: said[key] for key in said if key != "images"} == identity.of_model(*pair)


def test_parts_are_told_apart() -> None:
    """A comparison holds the decoder fixed: its settings are as much of it as its weights."""
    pair = tiny("siglip", "gemma2", {"kind": "pool", "factor": 1})
    known = identity.of_parts(pair[0], pair[1].image_transform)

    def changed(other: Pair) -> set[str]:
        found = identity.of_parts(other[0], other[1].image_transform)
        return {name for name in known if found[name] != known[name]}

    assert changed(pair) == set()
    assert changed(OTHERS["attention soft-cap"](pair)) == {"decoder"}
    assert changed(OTHERS["soft-cap in use"](pair)) == {"decoder"}
    assert changed(OTHERS["a bit of a weight"](pair)) == {"decoder"}
    assert changed(OTHERS["projector"](pair)) == {"projector"}
    assert changed(OTHERS["tower"](pair)) == {"encoder"}
    assert changed(OTHERS["image mean"](pair)) == {"encoder"}


# --- data -------------------------------------------------------------------------------------------------------------


def digests(file: Path, root: Path) -> list[str]:
    """Every digest of data that the project keeps: evaluation, training, probes, feature cache."""
    examples, _ = read(file, image_root=root)
    plan = Plan(root / "features", examples, image_bytes=64, identity={})
    found = [items.digest(examples), data_digest(examples), labelled_digest(read_labelled(file, root))]
    return [*found, plan.identity(0)["images"]]


def test_the_content_of_images_counts_and_not_their_place(tmp_path: Path) -> None:
    names = ["a/0.png", "a/1.png"]
    file = write_data(tmp_path / "one", names)
    known = digests(file, file.parent)
    shutil.move(tmp_path / "one", tmp_path / "moved")
    file = tmp_path / "moved" / "data.jsonl"
    assert digests(file, file.parent) == known
    shutil.move(file, tmp_path / "data.jsonl")  # the annotations alone elsewhere
    assert digests(tmp_path / "data.jsonl", tmp_path / "moved") == known
    other = write_data(tmp_path / "other", ["b/0.png", "b/1.png"])  # another folder and name, the same pictures
    assert digests(other, other.parent) == known
    other = write_data(tmp_path / "other", ["b/0.png", "b/1.png"], first_seed=5)  # the same base names
    assert all(one != two for one, two in zip(digests(other, other.parent), known, strict=True))


def test_an_edited_image_is_noticed_even_with_its_size_and_time(tmp_path: Path) -> None:
    """In one process too, where the digest of a file is remembered."""
    file = write_data(tmp_path, ["0.bmp", "1.bmp"])
    known = digests(file, tmp_path)
    state = os.stat(tmp_path / "1.bmp")
    raw = bytearray((tmp_path / "1.bmp").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "1.bmp").write_bytes(raw)
    os.utime(tmp_path / "1.bmp", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert all(one != two for one, two in zip(digests(file, tmp_path), known, strict=True))
    raw[len(raw) // 2] ^= 1
    (tmp_path / "1.bmp").write_bytes(raw)
    assert digests(file, tmp_path) == known


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    for size in (0, 10, content.AT_ONCE, content.AT_ONCE + 1):
        data = os.urandom(size)
        (tmp_path / str(size)).write_bytes(data)
        assert content.of_file(tmp_path / str(size)) == hashlib.sha256(data).hexdigest()
    os.mkfifo(tmp_path / "pipe")
    paths = [tmp_path / "pipe", tmp_path / "absent", tmp_path]
    assert content.of_files(paths) == dict.fromkeys(paths, "unreadable")


def test_pictures_in_memory_are_told_apart_by_what_they_show() -> None:
    grey = picture(1).convert("L")
    with_palette = grey.convert("P")
    other_palette = with_palette.copy()
    other_palette.putpalette(list(reversed(range(256))) * 3)
    assert other_palette.tobytes() == with_palette.tobytes()
    found = [content.of_picture(image) for image in (picture(1), picture(2), grey, with_palette, other_palette)]
    assert len(set(found)) == 5
    assert content.of_picture(picture(1)) == found[0]


def test_evaluation_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    """Shuffled, too: which image an item gets is part of what was asked."""
    names = [f"{i}.png" for i in range(4)]
    data = write_data(tmp_path / "a", names)
    options: dict[str, Any] = {"max_new_tokens": 3, "report": False, "progress": False}
    pair = tiny()
    for out, shuffle in (("plain", False), ("shuffled", True)):
        options["shuffle_images"] = shuffle
        evaluate(pair, data, "exact_match", tmp_path / out, **options)
        moved = Path(shutil.copytree(tmp_path / "a", tmp_path / f"copy-{out}")) / data.name
        assert evaluate(pair, moved, "exact_match", tmp_path / out, **options)["run"]["resumed_items"] == 4
        write_data(moved.parent, names, first_seed=9)
        with pytest.raises(ConfigError, match="other items, prompts, images"):
            evaluate(pair, moved, "exact_match", tmp_path / out, **options)


# --- comparisons ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_on_the_disk_is_what_it_holds(tmp_path: Path) -> None:
    vlm.save(*loud("siglip", "gemma"), tmp_path / "a")
    known = identity.of_checkpoint(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config |= {"transformers_version": "0.0.1", "_name_or_path": "/elsewhere"}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config, indent=7))
    (tmp_path / "b" / "training.json").write_text("{}")
    assert identity.of_checkpoint(tmp_path / "b") == known
    config["text_config"]["rms_norm_eps"] = 1e-3
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    changed = identity.of_checkpoint(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    assert len({known, changed, identity.of_checkpoint(tmp_path / "b")}) == 3


def test_runs_of_a_comparison_are_not_counted_with_other_sources(tmp_path: Path) -> None:
    """A tower, a decoder or the training images replaced behind the same path."""
    for part in ("tower", "decoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(part.encode())
    data = write_data(tmp_path / "data", ["0.png"])
    model = ModelConfig(encoder=f"{tmp_path}/tower@28", decoder=f"{tmp_path}/decoder", tokenizer="owner/name")

    def now() -> dict[str, str]:
        return sources(model, data_digest(read(data)[0]))

    spec: Any = type("Spec", (), {"folder": tmp_path / "run", "name": "tower+linear seed 0"})()
    spec.folder.mkdir()
    check_sources(spec, now())
    check_sources(spec, now())
    changes = {
        "tower": lambda: (tmp_path / "tower" / "model.safetensors").write_bytes(b"another"),
        "decoder": lambda: (tmp_path / "decoder" / "config.json").write_text('{"hidden_size": 1}'),
        "training data": lambda: write_data(tmp_path / "data", ["0.png"], first_seed=4),
    }
    for name, change in changes.items():
        (spec.folder / SOURCES).write_text(json.dumps(now()))
        change()
        with pytest.raises(DataError, match=f"tower\\+linear seed 0: [^ ]*{name} changed after this run was begun"):
            check_sources(spec, now())


def test_the_demo_asks_again_when_model_or_pictures_are_others(tmp_path: Path) -> None:
    """Predictions are kept with what they were made of."""
    from vlm.demo.answers import Answers
    from vlm.demo.run import Opened

    answers = object.__new__(Answers)
    answers.folder, answers.data = tmp_path / "predictions", tmp_path / "data"
    answers.folder.mkdir()
    write_data(answers.data, ["0.png"])
    pair = tiny()
    vlm.save(*pair, tmp_path / "model")
    lines = [{"id": "0", "image": "0.png", "prefix": "caption en"}]
    file = answers.folder / "answers.jsonl"

    def asked() -> bool:
        before = file.stat().st_ino if file.exists() else None
        answers._predict("answers", Opened(), tmp_path / "model", lines)
        return file.stat().st_ino != before

    assert asked() and not asked()
    write_data(answers.data, ["0.png"], first_seed=3)
    assert asked() and not asked()
    vlm.save(*flipped(pair), tmp_path / "model")
    assert asked() and not asked()
    (answers.folder / "answers.made_of.json").unlink()
    assert asked()
