"""Pictures that do not decode, in training, validation and evaluation, on one process and on two; and runs that are
killed while they measure."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_children import alive
from test_train_processes import rows, run_on_two
from traintools import align, config, damaged, difference, pictures, steps_done, training, wait, world

import vlm
import vlm.train
from vlm.data.reading import read
from vlm.train import checkpoint, failures
from vlm.train.items import Failure
from vlm.train.validate import Validator

BAD = [3, 10]


def listed(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures, two of which end in the middle."""
    return damaged(tmp_path_factory.mktemp("held out") / "val", BAD)


@pytest.fixture(scope="module")
def validated(held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that validates on them."""
    out = tmp_path_factory.mktemp("validated") / "out"
    vlm.train.run(config(out, align(steps=4), data={"train": world()[1], "val": held_out}, validate_every=2))
    return out


def test_a_bad_picture_in_validation_is_listed_and_the_loss_is_over_the_others(
    validated: Path, held_out: Path, tmp_path: Path
) -> None:
    plain = config(tmp_path / "plain", align(steps=4))
    vlm.train.run(plain)
    assert difference(validated / "model", plain.out / "model") == 0
    assert [(r["id"], r["file"], r["line"], r["during"]) for r in listed(validated)] == [
        (f"s{i}", str(held_out), i + 1, "validation") for i in BAD
    ]
    assert summary(validated)["failed_images"] == 2
    assert summary(validated)["failed_images_in"] == {"training": 0, "validation": 2, "evaluation": 0}
    # Independently: the loss of the final model on the 22 others, in one batch.
    model, processor = vlm.load(validated / "model")
    good = [example for i, example in enumerate(read(held_out)[0]) if i not in BAD]
    batch = processor([e.image for e in good], [e.prefix for e in good], [e.suffix or "" for e in good])
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert float(rows(validated)[-1]["val_loss"]) == pytest.approx(expected, rel=1e-5)


def test_two_processes_find_what_one_finds(validated: Path, held_out: Path, tmp_path: Path) -> None:
    """In training each process meets bad pictures that the other does not; the list and the counts hold all of them."""
    train = damaged(tmp_path / "train", [1, 6, 11, 17])
    changes: dict[str, Any] = {"data": {"train": train, "val": held_out}, "validate_every": 2}
    one = config(tmp_path / "one", align(steps=6), **changes)
    vlm.train.run(one)
    two = config(tmp_path / "two", align(steps=6), **changes, devices=2, strategy="ddp")
    assert run_on_two(two) == [0, 0]
    assert not list(two.out.glob("failures-rank*"))

    def found(out: Path) -> list[tuple[str, str]]:
        return sorted((record["during"], record["id"]) for record in listed(out))

    assert found(one.out) == found(two.out) and len(found(one.out)) == 6
    assert summary(two.out)["failed_images_in"] == {"training": 4, "validation": 2, "evaluation": 0}
    for a, b in zip(rows(one.out), rows(two.out), strict=True):
        assert (a["tokens"], a["seen"]) == (b["tokens"], b["seen"])
        assert bool(a["val_loss"]) == bool(b["val_loss"])
        assert float(a["val_loss"] or 0) == pytest.approx(float(b["val_loss"] or 0), rel=1e-4)


def test_a_bad_picture_in_an_evaluation_is_listed(held_out: Path, tmp_path: Path) -> None:
    evaluate = {"data": held_out, "metrics": ["exact_match"], "max_new_tokens": 2}
    run = config(tmp_path / "out", align(steps=1), evaluate=evaluate)
    vlm.train.run(run)
    assert [(r["id"], r["line"], r["during"]) for r in listed(run.out)] == [(f"s{i}", i + 1, "evaluation") for i in BAD]
    assert summary(run.out)["failed_images_in"]["evaluation"] == 2


def die_when_validating() -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Validator.__call__ = die  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("every", [2, None], ids=["inside", "at the end"])
def test_a_run_killed_while_it_validates_has_its_checkpoint_and_makes_up_for_the_rest(
    every: int | None, validated: Path, held_out: Path, tmp_path: Path
) -> None:
    run = config(*(tmp_path / "out", align(steps=4)), data={"train": world()[1], "val": held_out}, validate_every=every)
    with training(run, prepare=die_when_validating) as process:
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    saved = checkpoint.newest(run.out / "align" / "checkpoints")
    assert saved is not None and saved.step == (every or 4)
    vlm.train.run(run, resume=True)
    assert difference(run.out / "model", validated / "model") == 0
    for mine, theirs in zip(rows(run.out), rows(validated), strict=True):
        assert mine["loss"] == theirs["loss"]
        if every or mine["step"] == "4":
            assert mine["val_loss"] == theirs["val_loss"]


def test_a_list_goes_on_behind_a_torn_line_and_takes_in_what_killed_processes_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, _ = read(pictures(tmp_path / "data"))

    def failure(number: int) -> Failure:
        example = examples[number]
        return Failure(example, example.images[0], "truncated", "it ends early")

    def written(rank: str, *numbers: int, finish: Callable[[failures.Failures], None]) -> None:
        monkeypatch.setenv("RANK", rank)
        own = failures.Failures(tmp_path, 0.01)
        own.add([failure(number) for number in numbers])
        finish(own)

    written("0", 0, 1, finish=failures.Failures.close)
    with (tmp_path / "failures.jsonl").open("a") as torn:
        torn.write('{"id": "s2", "li')
    written("1", 1, 4, finish=failures.Failures.close)
    written("0", 1, 3, finish=failures.Failures.collect)
    assert [record["id"] for record in listed(tmp_path)] == ["s0", "s1", "s3", "s4"]
    assert not (tmp_path / "failures-rank1.jsonl").exists()
    assert failures.count(tmp_path) == {"training": 4, "validation": 0, "evaluation": 0}


def test_too_many_is_decided_over_all_processes(tmp_path: Path) -> None:
    own = failures.Failures(tmp_path, 0.01)
    assert own.judge(500, 9) is None, "nine are no sign yet"
    assert own.judge(500, 1) is None, "1 %"
    assert "11 of 1001 images read" in str(own.judge(1, 1))


def test_another_number_of_threads_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = config(tmp_path / "out", align(steps=2))
    vlm.train.run(run)
    before = torch.get_num_threads()
    shutil.rmtree(run.out / "align" / "model")
    torch.set_num_threads(before + 1)
    try:
        vlm.train.run(run, resume=True)
    finally:
        torch.set_num_threads(before)
    assert f"goes on with {before + 1} threads, and had {before}" in caplog.text


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("victim", "signum", "code"), [("worker", 9, 2), ("worker", 11, 2), ("parent", 9, -9), ("parent", 15, 143)]
)
def test_no_way_to_die_leaves_a_loading_process_or_waits_for_one(
    victim: str, signum: int, code: int, tmp_path: Path
) -> None:
    run = config(tmp_path / "out", align(steps=100_000), workers=2)
    with training(run) as process:
        wait(lambda: steps_done(run.out) >= 2)
        workers = children_of(process.pid)
        assert len(workers) == 2
        # These reach a whole group of processes, and are the parent's to answer: it saves first.
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        before = steps_done(run.out)
        wait(lambda: steps_done(run.out) >= before + 20)
        assert all(map(alive, workers))
        os.kill(workers[0] if victim == "worker" else process.pid, signum)
        process.join(60)
        assert process.exitcode == code
        wait(lambda: not any(map(alive, workers)), 20)
