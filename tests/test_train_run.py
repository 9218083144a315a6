"""Whole runs: what they leave behind, what they refuse, and that a killed one ends like one that was left alone."""

import csv
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from coretools import shake
from PIL import Image
from traintools import (
    align,
    config,
    damaged,
    difference,
    left_by_a_killed_process,
    pictures,
    steps_done,
    stop_after,
    training,
    tune,
    wait,
    weights,
    world,
)

import vlm
import vlm.train
from vlm.build.presets import tiny
from vlm.errors import CheckpointError, ConfigError, DataError, TrainingError
from vlm.ranks import is_main
from vlm.train import checkpoint, step_log
from vlm.train.batches import MicroBatches


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages, six steps each, never interrupted."""
    out = tmp_path_factory.mktemp("reference") / "out"
    assert vlm.train.run(config(out)) == out / "model"
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_soft_caps_are_chosen_by_the_run_and_recorded(tmp_path: Path) -> None:
    """The loss of the first step is that of the choice, and the trained model keeps it."""
    model, processor = tiny("siglip", "gemma2", final_logit_softcapping=0.05)
    shake(model)
    vlm.save(model, processor, tmp_path / "start")
    losses = {}
    for cap in (None, True):
        choice = {} if cap is None else {"softcap_in_loss": True, "softcap_in_generation": False}
        out = tmp_path / str(cap)
        vlm.train.run(config(out, align(steps=1), model={"path": str(tmp_path / "start"), **choice}))
        losses[cap] = float(rows(out)[0]["loss"])
        trained, _ = vlm.load(out / "model")
        assert trained.config.softcap_in_loss is (cap is True)
        assert trained.config.softcap_in_generation is (cap is None)
    # Logits within +-0.05 are almost uniform: the capped loss is the logarithm of the vocabulary.
    uniform = math.log(model.config.text_config.vocab_size)
    assert abs(losses[True] - uniform) < 0.11 < abs(losses[None] - uniform)


def assert_same_run(out: Path, reference: Path) -> None:
    """Bit for bit: both stages' weights, and every number that was recorded."""
    for name in ("align/model", "tune/model", "model"):
        assert difference(out / name, reference / name) == 0
    same = ("stage", "step", "loss", "grad_norm", "tokens", "lr_projector")
    assert [[row[k] for k in same] for row in rows(out)] == [[row[k] for k in same] for row in rows(reference)]


# --- what a run leaves behind


def test_the_directory_holds_the_whole_run(reference: Path) -> None:
    names = {path.name for path in reference.iterdir()} - {"tensorboard"}
    assert names == {
        *(".lock", "align", "config.yaml", "loss.html", "metrics.csv", "model", "start"),
        *("summary.json", "train.log", "tune", "versions.json"),
    }
    assert {path.name for path in (reference / "tune").iterdir()} == {"checkpoints", "manifest.json", "model"}
    assert [(row["stage"], row["step"]) for row in rows(reference)] == [
        (stage, str(step)) for stage in ("align", "tune") for step in range(1, 7)
    ]
    assert rows(reference)[0]["lr_encoder"] == "" and float(rows(reference)[0]["lr_projector"]) > 0
    assert yaml.safe_load((reference / "config.yaml").read_text())["stages"][1]["weight_decay"] == 0.1
    assert json.loads((reference / "versions.json").read_text())[0]["libraries"]["torch"] == torch.__version__
    text = (reference / "train.log").read_text()
    assert "stage align: 6 steps of 4 examples" in text and "encoder" in text and "frozen" in text
    page = (reference / "loss.html").read_text()
    assert page.count("<polyline") == 2 and "align" in page and "tune" in page
    summary = json.loads((reference / "summary.json").read_text())
    assert (summary["steps"], summary["skipped_annotations"], summary["failed_images"]) == (12, 0, 0)


def test_each_stage_leaves_a_model_that_stands_alone_and_the_next_starts_from_it(reference: Path) -> None:
    start, aligned, tuned = (weights(reference / name) for name in ("start", "align/model", "tune/model"))
    projector = "model.multi_modal_projector.linear.weight"
    assert not torch.equal(start[projector], aligned[projector])
    assert [n for n in start if not torch.equal(start[n], aligned[n])] == [
        projector.replace("weight", "bias"),
        projector,
    ]
    assert sum(not torch.equal(aligned[n], tuned[n]) for n in start) > 40
    for name in ("start", "align/model", "tune/model", "model"):
        assert checkpoint.problem(reference / name) is None
        model, _ = vlm.load(reference / name)
        assert not model.training
    provenance = json.loads((reference / "model" / "training.json").read_text())
    assert (provenance["stage"], provenance["steps"], provenance["examples"]) == ("tune", 6, 24)


def test_the_loss_falls_when_it_should(tmp_path: Path) -> None:
    stage = tune(train={"projector": 1e-2, "decoder": 1e-2, "encoder": 1e-3}, steps=25, batch_size=8, warmup=2)
    vlm.train.run(config(tmp_path / "out", stage, checkpoint_every=100))
    losses = [float(row["loss"]) for row in rows(tmp_path / "out")]
    assert losses[-1] < losses[0] - 3


def test_the_callers_random_state_and_logging_are_left_alone(tmp_path: Path) -> None:
    log, level = logging.getLogger("vlm"), logging.getLogger("vlm").level
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    vlm.train.run(config(tmp_path / "out", align(steps=1)))
    assert torch.equal(torch.rand(3), expected)
    assert log.level == level and not [h for h in log.handlers if isinstance(h, logging.FileHandler)]
    assert handlers == {signum: signal.getsignal(signum) for signum in handlers}


def test_held_out_loss_is_measured_and_changes_nothing(reference: Path, tmp_path: Path) -> None:
    model, data = world()
    changes = {"data": {"train": data, "val": data}, "validate_every": 4}
    vlm.train.run(config(tmp_path / "out", **changes))
    validated = [(row["stage"], row["step"]) for row in rows(tmp_path / "out") if row["val_loss"]]
    assert validated == [("align", "4"), ("align", "6"), ("tune", "4"), ("tune", "6")]
    assert_same_run(tmp_path / "out", reference)
    # Independently: the loss of the final model on all 24 examples in one batch.
    from vlm.data.reading import read

    trained, processor = vlm.load(tmp_path / "out" / "model")
    examples, _ = read(data)
    batch = processor([e.image for e in examples], [e.prefix for e in examples], [e.suffix or "" for e in examples])
    with torch.no_grad():
        expected = trained(**batch).loss.item()
    assert float(rows(tmp_path / "out")[-1]["val_loss"]) == pytest.approx(expected, rel=1e-5)


def test_bf16_is_mixed_precision(tmp_path: Path, reference: Path) -> None:
    vlm.train.run(config(tmp_path / "out", precision="bf16"))
    assert {tensor.dtype for tensor in weights(tmp_path / "out" / "model").values()} == {torch.float32}
    pairs = [(float(a["loss"]), float(b["loss"])) for a, b in zip(rows(tmp_path / "out"), rows(reference), strict=True)]
    assert all(a == pytest.approx(b, rel=0.02) for a, b in pairs) and any(a != b for a, b in pairs)


# --- refusals


def test_fp16_is_refused_for_gemma(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision fp16 overflows in gemma; use bf16, or set force_fp16"):
        vlm.train.run(config(tmp_path / "out", precision="fp16"))
    with pytest.raises(ConfigError, match="needs a GPU"):
        vlm.train.run(config(tmp_path / "forced", precision="fp16", force_fp16=True))


def test_an_existing_run_needs_resume_and_its_own_configuration(reference: Path, tmp_path: Path) -> None:
    before = (reference / "model" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(TrainingError, match="a run in this directory already; add --resume"):
        vlm.train.run(config(reference))
    with pytest.raises(ConfigError, match=r"not that of the run to resume(?s:.*)-  batch_size: 4\n\+  batch_size: 8"):
        vlm.train.run(config(reference, align(batch_size=8), tune()), resume=True)
    assert (reference / "model" / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"not empty \(file\) and holds no run"):
        vlm.train.run(config(tmp_path), resume=True)


def test_what_changes_no_weight_may_change_on_resume(reference: Path) -> None:
    vlm.train.run(config(reference, workers=1, checkpoint_every=7, log_every=1), resume=True)
    assert len(rows(reference)) == 12
    vlm.train.run(config(reference), resume=True)
    assert len(json.loads((reference / "versions.json").read_text())) >= 3


def test_other_data_is_refused_on_resume(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    run = config(tmp_path / "out", align(), data={"train": data})
    assert stop_after(run, 3) == -signal.SIGKILL
    data.write_text(data.read_text().replace("a red", "one red"))
    with pytest.raises(CheckpointError, match="step-00000002: data changed since this checkpoint was written"):
        vlm.train.run(run, resume=True)


def test_a_second_run_in_the_directory_is_refused_and_the_first_unharmed(tmp_path: Path) -> None:
    run = config(tmp_path / "out", align(steps=40))
    with training(run) as first:
        wait(lambda: steps_done(run.out) >= 1)
        with pytest.raises(
            TrainingError, match=rf"another run is training in this directory \(process {first.pid} on "
        ):
            vlm.train.run(run, resume=True)
        first.join(120)
        assert first.exitcode == 0
    assert len(rows(run.out)) == 40


def test_all_annotation_errors_are_listed_before_anything_is_built(tmp_path: Path) -> None:
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    one.write_text(one.read_text() + '{"image": "images/gone.png", "prefix": "x", "suffix": "y"}\n')
    two.write_text(two.read_text() + "no json\n")
    sources = [{"path": one}, {"path": two}]
    run = config(tmp_path / "out", align(steps=2), data={"train": sources})
    with pytest.raises(DataError, match=r"one/train.jsonl:25: (?s:.*)two/train.jsonl:25: "):
        vlm.train.run(run)
    assert not (run.out / "start").exists()
    vlm.train.run(run, resume=True, skip_bad=True)
    assert json.loads((run.out / "summary.json").read_text())["skipped_annotations"] == 2
    assert (run.out / "train.log").read_text().count("skipped") >= 2


def test_a_prefix_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    data.write_text(data.read_text().replace("caption en", "caption en " + "very " * 20, 1))
    run = config(tmp_path / "out", align(max_text_length=16), data={"train": data})
    with pytest.raises(DataError, match=r"train.jsonl:1: too-long: .* at most 16 fit"):
        vlm.train.run(run)
    assert not (run.out / "metrics.csv").exists()


# --- images that do not decode


def test_a_bad_image_is_listed_once_and_its_place_refilled_the_same_way_every_time(tmp_path: Path) -> None:
    data = damaged(tmp_path / "data", [5])
    outs = []
    for workers in (0, 1):
        run = config(tmp_path / f"out{workers}", align(steps=18), data={"train": data}, workers=workers)
        vlm.train.run(run)
        outs.append(run.out)
        records = [json.loads(line) for line in (run.out / "failures.jsonl").read_text().splitlines()]
        assert [(r["id"], r["line"], Path(r["path"]).name) for r in records] == [("s5", 6, "5.png")]
        assert records[0]["code"] and "5.png" in records[0]["message"]
        assert json.loads((run.out / "summary.json").read_text())["failed_images"] == 1
    assert difference(outs[0] / "model", outs[1] / "model") == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_stop_the_run_with_one_sentence(workers: int, tmp_path: Path) -> None:
    data = damaged(tmp_path / "data", list(range(0, 24, 2)))
    run = config(tmp_path / "out", align(steps=40), data={"train": data}, workers=workers)
    with pytest.raises(
        DataError, match=r"^\d+ of \d+ images read could not be decoded, more than 1.0%; .*failures.jsonl"
    ):
        vlm.train.run(run)
    listed = [json.loads(line)["id"] for line in (run.out / "failures.jsonl").read_text().splitlines()]
    assert len(set(listed)) == len(listed) > 5


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_images_stop_the_run_too(workers: int, tmp_path: Path) -> None:
    data = damaged(tmp_path / "data", list(range(24)))
    with pytest.raises(DataError, match="100 images in a row could not be decoded|images read could not be decoded"):
        vlm.train.run(config(tmp_path / "out", data={"train": data}, workers=workers))
    assert len((tmp_path / "out" / "failures.jsonl").read_text().splitlines()) > 10


# --- killed, stopped, resumed


def test_the_loading_process_does_not_change_the_result(reference: Path, tmp_path: Path) -> None:
    vlm.train.run(config(tmp_path / "out", workers=2))
    assert_same_run(tmp_path / "out", reference)


def test_killed_again_and_again_a_run_ends_with_the_same_bits(reference: Path, tmp_path: Path) -> None:
    """SIGKILL after 1, 3, 5, 8 and 11 of 12 steps; dropout, both stages and every recorded number included."""
    run = config(tmp_path / "out")
    for rows_before in (1, 3, 5, 8, 11):
        assert stop_after(run, rows_before, resume=True) == -signal.SIGKILL
    vlm.train.run(run, resume=True)
    assert_same_run(run.out, reference)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_own_exit_code(
    signum: int, code: int, reference: Path, tmp_path: Path
) -> None:
    run = config(tmp_path / "out", checkpoint_every=1000)
    assert stop_after(run, 2, signum) == code
    steps = steps_done(run.out)
    assert 2 <= steps < 6, "stopped after the step it was in"
    found = checkpoint.newest(run.out / "align" / "checkpoints")
    assert found is not None and found.step == steps
    vlm.train.run(run, resume=True)
    assert_same_run(run.out, reference)


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    run = config(tmp_path / "out", align(steps=10_000))
    with training(run, prepare=slow_saves) as process:
        wait(lambda: steps_done(run.out) >= 3)
        for _ in range(2):
            process.terminate()
            process.join(1)
        process.join(20)
        assert process.exitcode == 143
    assert checkpoint.newest(run.out / "align" / "checkpoints").step == 2  # type: ignore[union-attr]


def slow_saves() -> None:
    """Make every save after the first last a minute."""
    import time

    write = checkpoint.manifest.write

    def slow(folder: Path) -> None:
        if not folder.name.lstrip(".").startswith(("start.", "step-00000002.")):
            time.sleep(60)
        write(folder)

    checkpoint.manifest.write = slow


def test_a_kill_between_the_last_checkpoint_and_the_model_costs_nothing(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "out")
    for name in ("model", "tune/model"):
        shutil.rmtree(tmp_path / "out" / name)
    left = left_by_a_killed_process(tmp_path / "out" / "tune" / "model")
    vlm.train.run(config(tmp_path / "out"), resume=True)
    assert_same_run(tmp_path / "out", reference)
    assert not left.exists()


def test_a_torn_metrics_file_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = step_log.MetricsFile(path)
    for stage, step in (("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)):
        file.write({"stage": stage, "step": step, "loss": 0.1 + 0.2})
    file.close()
    with path.open("a") as torn:
        torn.write("b,4,0.")
    step_log.MetricsFile(path, finished=["a"], stage="b", step=2).close()
    kept = step_log.read(path)
    assert [(row["stage"], row["step"]) for row in kept] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert float(kept[0]["loss"]) == 0.1 + 0.2


def test_a_full_disk_stops_with_a_sentence_and_the_run_goes_on_later(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path / "out")
    real = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot save .*step-00000004: No space left on device"):
        vlm.train.run(run)
    monkeypatch.setattr(checkpoint, "save_file", real)
    vlm.train.run(run, resume=True)
    assert_same_run(run.out, reference)


# --- the machine


def test_a_loading_process_that_dies_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object, **__: object) -> None:
        assert torch.utils.data.get_worker_info() is not None, "images are loaded in the workers"
        os._exit(9)

    monkeypatch.setattr("vlm.train.batches.load_image", die)
    with pytest.raises(TrainingError, match="stage align: a data loading process died .* lower workers or cache"):
        vlm.train.run(config(tmp_path / "out", align(), workers=1))


@pytest.mark.parametrize(
    "text", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory: you tried"]
)
def test_out_of_memory_says_what_to_change_and_keeps_the_checkpoint(
    text: str, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = vlm.VLM.forward

    def greedy(self: Any, *args: Any, **kwargs: Any) -> Any:
        if steps_done(tmp_path / "out") == 4:
            raise RuntimeError(text)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(vlm.VLM, "forward", greedy)
        with pytest.raises(TrainingError, match=r"out of memory .* raise `accumulate` \(now 1\)"):
            vlm.train.run(config(tmp_path / "out"))
    vlm.train.run(config(tmp_path / "out"), resume=True)
    assert_same_run(tmp_path / "out", reference)


# --- loading


def test_augmentation_depends_on_seed_and_position_only(tmp_path: Path) -> None:
    from vlm.data.augment import pipeline
    from vlm.data.order import Key, Mixture
    from vlm.data.reading import read

    _, processor = vlm.load(world()[0])
    examples, _ = read(world()[1])
    # A picture with four different corners, so that every flip and turn shows.
    corner = Image.effect_noise((28, 28), 90).convert("RGB")
    examples = [type(e)(**{**vars(e), "image": corner}) for e in examples]

    def pixels(seed: int, epoch: int, names: list[str]) -> torch.Tensor:
        data = MicroBatches(examples, Mixture((24,), (1.0,), seed), processor, augmentations=pipeline(names))
        batch = data[Key(0, 0, 24 * epoch, 24)].batch
        assert batch is not None and batch.pixel_values is not None
        order = [data.mixture.example(24 * epoch + i) for i in range(24)]
        return batch.pixel_values[torch.tensor(order).argsort()]

    for name in ("hflip", "vflip", "rotate90", "brightness", "crop"):
        first = pixels(1, 0, [name])
        assert torch.equal(first, pixels(1, 0, [name]))
        assert not torch.equal(first, pixels(1, 1, [name])) and not torch.equal(first, pixels(2, 0, [name]))
        assert len({tuple(row.flatten().tolist()) for row in first}) > 1
    plain = pixels(1, 0, [])[0]
    flipped = pixels(1, 0, ["hflip"])
    both = {tuple(t.flatten().tolist()) for t in (plain, plain.flip(2))}
    assert {tuple(t.flatten().tolist()) for t in flipped} == both
    with pytest.raises(ConfigError, match=r"unknown name 'hflp' \(did you mean 'hflip'\?\)"):
        pipeline(["hflp"])


def test_the_image_cache_changes_nothing_and_keeps_its_budget(reference: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "out", data={"train": world()[1], "cache_images_mb": 0})
    vlm.train.run(run)
    assert_same_run(run.out, reference)


def test_rank_is_read_from_the_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_main()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not is_main()
            patch.setenv(name, "0")
            assert is_main()


def test_run_is_the_function_whoever_has_imported_its_file() -> None:
    code = "import vlm.train.run, vlm.train.run as again; print(callable(vlm.train.run), callable(again))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
