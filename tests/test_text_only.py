"""Examples about text alone and about several images: in training, on two processes, with cached features, in
evaluation and in checks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_train_processes import rows, run_on_two
from test_train_steps import no_dropout, still  # noqa: F401  (a fixture)
from traintools import align, config, difference

import vlm
import vlm.train
from vlm import check
from vlm.build.presets import tiny
from vlm.data.examples import Example
from vlm.data.order import Mixture
from vlm.data.reading import read
from vlm.errors import DataError
from vlm.eval import evaluate, items
from vlm.generation import choose, score_candidates


def data(folder: Path, images: list[int], *, suffix: str = "a word or two") -> Path:
    """One example for each number: about so many images."""
    folder.mkdir()
    lines = []
    for number, count in enumerate(images):
        names = [f"{number}-{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            noise = Image.effect_noise((28 + 14 * i, 28), 80 + number).convert("RGB")
            noise.save(folder / name)
        shown: dict[str, Any] = {} if not names else {"image": names[0]} if count == 1 else {"images": names}
        said = " ".join(suffix.split()[: number % 4 + 1])
        lines.append({"id": f"s{number}", **shown, "prefix": f"caption {number}", "suffix": said})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


def test_a_process_without_an_image_waits_for_nobody(no_dropout: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two of eight examples have an image: in every step one rank or both see none. All parts train, and the weights
    are those of one process, where the parts that are not reached get zero gradients too."""
    train = data(tmp_path / "data", [1, 0, 0, 0, 0, 0, 0, 2])
    settings: dict[str, Any] = {"model": {"path": no_dropout}, "data": {"train": train}}
    rates = {"encoder": 1e-3, "projector": 1e-3, "decoder": 1e-3}
    stage = still(module="full", train=rates, steps=4, batch_size=4, weight_decay=0.1)
    one = config(tmp_path / "one", stage, **settings)
    vlm.train.run(one)
    parts = config(tmp_path / "parts", {**stage, "accumulate": 4}, **settings)
    vlm.train.run(parts)
    two = config(tmp_path / "two", stage, **settings, devices=2, strategy="ddp")
    assert run_on_two(two) == [0, 0]
    for other in (parts, two):
        assert [row["seen"] for row in rows(other.out)] == [row["seen"] for row in rows(one.out)]
        assert difference(one.out / "model", other.out / "model") < 2e-5


def test_a_step_of_text_alone_leaves_the_tower_to_the_optimizer(no_dropout: Path, tmp_path: Path) -> None:  # noqa: F811
    """Without momentum and decay a zero gradient moves nothing: tower and projector stay bit for bit."""
    train = data(tmp_path / "data", [0] * 4)
    run = config(
        tmp_path / "out",
        still(module="full", train={"encoder": 1e-2, "projector": 1e-2, "decoder": 1e-2}, steps=2, weight_decay=0.0),
        **{"model": {"path": no_dropout}, "data": {"train": train}},
    )
    vlm.train.run(run)
    before, after = (vlm.load(path, dtype="float32")[0].state_dict() for path in (no_dropout, run.out / "model"))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model"} or changed == {"language_model", "weight"}


@pytest.mark.parametrize("encoder", ["siglip", "siglip2_naflex"])
def test_cached_features_of_a_mixture_train_alike(encoder: str, tmp_path: Path) -> None:
    """0, 1, 2 and 3 images: features from the disk give the weights that pixels give, by a token budget too."""
    model, processor = tiny(encoder)
    model.get_parameter("model.multi_modal_projector.linear.weight").data.normal_(std=0.1)
    vlm.save(model, processor, tmp_path / "start")
    train = data(tmp_path / "data", [0, 1, 2, 0, 3, 0, 1, 0])
    made = {}
    cases: dict[str, dict[str, Any]] = {
        "pixels": {},
        "features": {"cache_features": True},
        "tokens": {"cache_features": True, "batch_tokens": 60},
    }
    for name, changes in cases.items():
        run = config(
            tmp_path / name,
            align(steps=4, **changes),
            **{"model": {"path": tmp_path / "start"}, "data": {"train": train, "val": train}},
        )
        made[name] = vlm.train.run(run)
    assert difference(made["pixels"], made["features"]) == 0
    assert difference(made["pixels"], made["tokens"]) < 1e-5


def test_augmentation_takes_each_image(tmp_path: Path) -> None:
    """Of an example with two images both are augmented, and one of text alone draws nothing."""
    train = data(tmp_path / "data", [2, 0, 1])
    examples, _ = read(train)
    _, processor = tiny()
    seen: list[int] = []

    def paint(image: Image.Image, rng: Any) -> Image.Image:
        seen.append(image.width)
        return Image.new("RGB", image.size, "red")

    dataset = vlm.train.batches.MicroBatches(examples, Mixture((3,), (1.0,), 0), processor, augmentations=[paint])
    item = dataset[vlm.data.order.Key(0, 0, 0, 3)]
    assert item.error is None and sorted(seen) == [28, 28, 42] and item.images_read == 3
    assert item.batch is not None and item.batch.pixel_values is not None
    red = processor([Image.new("RGB", (28, 28), "red")], ["x"]).pixel_values
    assert red is not None and all(torch.equal(one, red[0]) for one in item.batch.pixel_values)


def test_an_image_that_fails_is_named(tmp_path: Path) -> None:
    train = data(tmp_path / "data", [2, 0])
    (train.parent / "0-1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    examples, _ = read(train)
    dataset = vlm.train.batches.MicroBatches(examples, Mixture((2,), (1.0,), 0), tiny()[1])
    item = dataset[vlm.data.order.Key(0, 0, 0, 2)]
    assert {str(failure.image) for failure in item.failures} == {str(train.parent.resolve() / "0-1.png")}
    assert item.batch is not None and item.batch.ids == ["s1", "s1"]


def test_evaluation_reads_all_of_them(tmp_path: Path) -> None:
    model, processor = tiny()
    path = data(tmp_path / "data", [0, 1, 2, 0])
    found = evaluate((model, processor), path, "exact_match", tmp_path / "out", max_new_tokens=2, progress=False)
    assert found["num_items"] == 4 and found["skipped"] == 0
    alone = [vlm.generate(model, processor, None, ["caption 0"], max_new_tokens=2)[0]]
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert lines[0]["prediction"] == alone[0] and "images" not in lines[0] and len(lines[2]["images"]) == 2
    tokens = evaluate(
        *((model, processor), path, "exact_match", tmp_path / "tokens"),
        max_new_tokens=2,
        progress=False,
        batch_tokens=40,
    )
    assert tokens["metrics"]["exact_match"]["value"] == found["metrics"]["exact_match"]["value"]


def test_shuffled_images_leave_text_alone() -> None:
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    examples = [Example(str(i), image, "p", "s", (), (), "", i) for i, image in enumerate([*pictures, None, None])]
    moved = items.shuffle_images(examples, 0)
    assert [example.images for example in moved[3:]] == [(), ()]
    assert all(new.image is not old.image for new, old in zip(moved[:3], examples[:3], strict=True))
    with pytest.raises(DataError, match="none of the items has one"):
        items.shuffle_images(examples[3:], 0)


def test_an_empty_answer_survives_evaluation(tmp_path: Path) -> None:
    """`""` is the gold text of a negative: it is scored, written, and read again as such."""
    path = data(tmp_path / "data", [1, 0])
    lines = [{**json.loads(line), "suffix": ""} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluate(tiny(), path, "exact_match", tmp_path / "out", max_new_tokens=1, progress=False)
    assert found["num_items"] == 2
    written = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [line["suffix"] for line in written] == ["", ""]


def test_an_empty_candidate_has_the_likelihood_of_eos() -> None:
    """By hand: the log-probability of EOS after the prompt, whatever the normalisation and the other candidates."""
    model, processor = tiny()
    model.eval()
    batch = processor(None, ["detect cat"])
    with torch.no_grad():
        logits = model(**batch).logits[0, -1].double()
    expected = float(logits.log_softmax(-1)[processor.tokenizer.eos_token_id])
    for candidates in ([""], ["", "a cat"], ["", "a"]):
        for rule in ("none", "token", "byte"):
            (scores,) = score_candidates(model, processor, None, ["detect cat"], [candidates], normalization=rule)
            assert scores[0] == pytest.approx(expected, rel=1e-5)
    assert choose([["", "a"]], [[0.0, -1.0]]) == [""]


def test_checks_read_them(tmp_path: Path) -> None:
    model, processor = tiny()
    examples, _ = read(data(tmp_path / "data", [0, 2, 1]))
    report = check.run(model, processor, data=[*examples, replace(examples[0], id="x", suffix="")], only=["labels"])
    assert [(result.status, result.measured) for result in report.results] == [("ok", 1)]
