"""What a run leaves that never trained a step, and what may change between a run and its continuation."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from traintools import align, config, difference, pictures, training, tune, world

import vlm
import vlm.train
from vlm import files
from vlm.data.order import StepSampler
from vlm.errors import CheckpointError, ConfigError, TrainingError, VLMError
from vlm.settings import from_dict, to_dict
from vlm.train import RunConfig, StageConfig, checkpoint, history, rundir, step_log
from vlm.train.changes import FREE, Begun, Change, changes, essential
from vlm.train.config import DataConfig
from vlm.train.failures import explain
from vlm.train.stage_config import settings_that


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def one_step(out: Path, **changed: Any) -> RunConfig:
    return config(out, align(steps=1), **changed)


# --- a run that ends before its first step ---------------------------------------------------------------------------


def no_model(tmp_path: Path) -> dict[str, Any]:
    return {"model": {"path": tmp_path / "nowhere"}}


def no_data(tmp_path: Path) -> dict[str, Any]:
    return {"data": {"train": tmp_path / "nowhere.jsonl"}}


def fp16(_: Path) -> dict[str, Any]:
    return {"precision": "fp16"}


def unknown_name(_: Path) -> dict[str, Any]:
    return {"stages": [align(steps=1, augment=["hflop"])]}


@pytest.mark.parametrize(
    ("refused", "resume"),
    [(no_model, False), (fp16, False), (unknown_name, False), (no_data, False), (no_data, True)],
)
def test_a_refused_run_leaves_nothing_and_both_ways_of_starting_work(
    refused: Callable[[Path], dict[str, Any]], resume: bool, tmp_path: Path
) -> None:
    run = one_step(tmp_path / "deep" / "er" / "out")
    bad = from_dict(RunConfig, {**to_dict(run), **to_plain(refused(tmp_path))})
    with pytest.raises(VLMError):
        vlm.train.run(bad)
    assert names(tmp_path) == set(), "not even the folders on the way"
    if refused is no_data:  # one chain is enough for the whole way
        assert vlm.train.run(run, resume=resume).is_dir()


def to_plain(tree: Any) -> Any:
    return {
        key: {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value for key, value in tree.items()
    }


def test_an_import_error_and_an_interrupt_before_the_first_step_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlm.train.sources

    (tmp_path / "mine").mkdir()  # an empty folder of the user's stays

    def interrupted(*_: object, **__: object) -> Any:
        os.kill(os.getpid(), signal.SIGINT)

    def broken(*_: object, **__: object) -> Any:
        raise ImportError("no module named nothing")

    def too_big(*_: object, **__: object) -> Any:
        raise MemoryError

    for cause, expected in ((interrupted, SystemExit), (broken, ImportError), (too_big, MemoryError)):
        monkeypatch.setattr(vlm.train.sources, "read_sources", cause)
        with pytest.raises(expected):
            vlm.train.run(one_step(tmp_path / "mine"))
        assert names(tmp_path) == {"mine"} and names(tmp_path / "mine") == set()


# Where a kill may fall: after each of these calls has done its work.
POINTS = {
    "the lock": ("vlm.train.rundir", "_lock"),
    "the record": ("vlm.files", "write_json"),
    "the configuration": ("vlm.files", "write_text"),
    "the data": ("vlm.train.sources", "read_sources"),
    "the start model": ("vlm.train.run", "publish"),
    "the manifest": ("vlm.train.freezing", "write_manifest"),
    "the trainer": ("vlm.train.stage", "loader"),
}


def _die_after(module: str, name: str) -> None:
    import importlib

    home = importlib.import_module(module)
    original = getattr(home, name)

    def last(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(home, name, last)


@pytest.mark.parametrize("point", POINTS)
def test_what_a_kill_leaves_is_taken_over_by_either_start(point: str, tmp_path: Path) -> None:
    from functools import partial

    run = one_step(tmp_path / "out")
    with training(run, prepare=partial(_die_after, *POINTS[point])) as process:
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    left = names(run.out)
    assert left and not history.trained(run.out)
    (run.out / "notes.txt").write_text("mine")
    if point in ("the lock", "the record"):  # without a configuration nobody knows whose this is
        (run.out / "notes.txt").rename(tmp_path / "notes.txt")
    other = tmp_path / "other"
    shutil.copytree(run.out, other)
    # Another configuration with a new start, the same with --resume: both begin, and nothing of the first is left.
    for folder, stage, resume in ((other, "again", False), (run.out, "align", True)):
        with rundir.open_run(config(folder, align(name=stage, steps=1)), resume=resume, main=True):
            kept = {"notes.txt"} if point not in ("the lock", "the record") else set()
            start = {"start"} if resume and "start" in left else set()
            assert names(folder) == {".lock", "versions.json", "config.yaml"} | kept | start
    if point == "the manifest":  # the longest way
        vlm.train.run(config(other, align(name="again", steps=1)))
        vlm.train.run(run, resume=True)
        assert difference(run.out / "model", other / "model") == 0


def test_what_no_run_has_written_is_neither_deleted_nor_replaced(tmp_path: Path) -> None:
    for name in ("config.yaml", "versions.json", "start/model.safetensors", "train.log", "notes.txt"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        for resume in (False, True):
            with pytest.raises(TrainingError, match="is not empty .* and holds no run"):
                vlm.train.run(one_step(out), resume=resume)
        assert [p for p in out.rglob("*") if p.is_file()] == [out / name] and (out / name).read_text() == "mine"
    # Beside what a killed run has left, too.
    out = tmp_path / "killed"
    with rundir.open_run(one_step(out), resume=False, main=True):
        pass
    (out / "model").mkdir()
    (out / "model" / "weights").write_text("mine")
    with pytest.raises(TrainingError, match="it holds model, which no run has written and this one would replace"):
        vlm.train.run(one_step(out))
    assert (out / "model" / "weights").read_text() == "mine"


def test_a_disk_that_is_full_at_the_start_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = one_step(tmp_path / "out")
    real = files.write_bytes
    for name in ("versions.json", "config.yaml", "manifest.json", "metrics.csv"):

        def full(path: Path, data: bytes, name: str = name, **how: Any) -> None:
            if Path(path).name == name:
                with files.disk_errors(path):
                    raise OSError(28, "No space left on device")
            real(path, data, **how)

        monkeypatch.setattr(files, "write_bytes", full)
        with pytest.raises(VLMError, match=rf"({name}|out/start): No space left on device"):
            vlm.train.run(run)
        assert names(tmp_path) == set()
    monkeypatch.setattr(files, "write_bytes", real)
    vlm.train.run(run)


def test_of_two_starts_at_once_one_trains_whatever_the_other_leaves(tmp_path: Path) -> None:
    """The lock's file is removed by a run that leaves nothing: that may neither keep a later one out nor let two in."""
    run = one_step(tmp_path / "out")
    first = rundir.open_run(run, resume=False, main=True)
    with pytest.raises(TrainingError, match="another run is training"):
        rundir.open_run(run, resume=False, main=True)
    assert names(run.out) == {".lock", "versions.json", "config.yaml"}, "the second one took nothing away"
    with pytest.raises(ZeroDivisionError), first:
        raise ZeroDivisionError
    assert not run.out.exists()
    with rundir.open_run(run, resume=False, main=True), pytest.raises(TrainingError, match="another run is training"):
        rundir.open_run(run, resume=True, main=True)


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes its file between our open and our lock: what we have locked is nobody's any more."""
    holder = files.locked(tmp_path / "lock", lambda owner: TrainingError(owner))
    original = files._lock
    calls: list[int] = []

    def slow(descriptor: int) -> bool:
        if not calls:
            holder.remove()
        calls.append(descriptor)
        return original(descriptor)

    monkeypatch.setattr(files, "_lock", slow)
    with files.locked(tmp_path / "lock", lambda owner: TrainingError(owner)):
        assert len(calls) == 2
        with pytest.raises(TrainingError, match=str(os.getpid())):
            files.locked(tmp_path / "lock", lambda owner: TrainingError(owner))


# --- what is told before the first step -------------------------------------------------------------------------------


def test_the_preview_says_what_will_happen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: 24 pictures of 28 pixels in patches of 14 make 4 tokens each; 2 steps of 4 see a third of the data."""
    from vlm.data.reading import read

    model, processor = vlm.load(world()[0])
    lengths = []
    for example in read(world()[1])[0]:
        batch = processor([example.image], [example.prefix], [example.suffix or ""])
        lengths.append(batch.input_ids.shape[1])
    last = tune(train={"decoder": 1e-3}, steps=2, warmup=8, name="last", batch_size=48)
    run = config(
        tmp_path / "out", align(steps=2), last, checkpoint_every=5, data={"train": world()[1], "val": world()[1]}
    )
    assert vlm.train.run(run).is_dir()
    mean = round(sum(lengths) / 24)
    told = [record.getMessage() for record in caplog.records]
    (table,) = [message for message in told if message.startswith(str(run.out))]
    first, header, *stages, when = table.splitlines()
    assert first == f"{run.out}: 24 training examples in 1 file, 24 held out"
    assert header.split() == ["stage", "steps", "batch", "epochs", "tokens/example", "tokens", "trains"]
    projector, decoder = (sum(p.numel() for p in model.parts()[name].parameters()) for name in ("projector", "decoder"))
    assert stages[0].split()[:5] == ["align", "2", "4", "0.333", str(mean)]
    assert stages[1].split()[:5] == ["last", "2", "48", "4", str(mean)]
    assert [line.split()[-2:] for line in stages] == [
        ["projector", f"{projector:,}"],
        ["decoder", f"{decoder:,}"],
    ]
    assert when == ("saved at the end of each stage, because checkpoint_every is 5; validated at the end of each stage")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        "stage last: warmup takes 8 steps and the stage has 2: the learning rates never reach more than 25%"
        in warned[0]
    )
    assert "stage last: batch_size 48 is more than an epoch has (24 examples)" in warned[1]
    # And at the end, what came of it: the rows of metrics.csv.
    summary = json.loads((run.out / "summary.json").read_text())["stages"]
    row = rows(run.out)[-1]
    assert summary["last"] == {"steps": 2, "loss": float(row["loss"]), "held_out_loss": float(row["val_loss"])}
    assert f"stage last: 2 steps, loss {float(row['loss']):.4f}, held-out loss {float(row['val_loss']):.4f}" in told


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"augment": ["hflop"]}, r"unknown name 'hflop' \(did you mean 'hflip'\?\)"),
        ({"precision": "fp16"}, "stage tune: precision fp16 overflows in gemma"),
    ],
)
def test_what_a_later_stage_cannot_do_is_refused_before_the_first(
    second: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        vlm.train.run(config(tmp_path / "out", align(), tune(**second)))
    assert not (tmp_path / "out").exists()


def test_a_share_that_cannot_be_cut_is_refused_for_any_stage_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size 6 cannot be shared equally by 4 processes x 1 micro-batches"):
        vlm.train.run(config(tmp_path / "out", align(), tune(batch_size=6), devices=4))
    assert not (tmp_path / "out").exists()


# --- what may change on resume ---------------------------------------------------------------------------------------


def before() -> dict[str, Any]:
    """A run of three stages: the first finished, the second begun, the third not."""
    stages = [align(), tune(), tune(name="last")]
    return to_dict(config(Path("out"), *stages))


BEGUN = {"align": Begun(6, True), "tune": Begun(2, False)}


def changed(*path: Any, value: Any) -> dict[str, Any]:
    tree = before()
    node: Any = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "effect"),
    [
        (("workers",), 3, "none"),
        (("devices",), 2, "none"),
        (("evaluate_every",), 3, "none"),
        (("bad_image_share",), 0.5, "none"),
        (("data", "cache_images_mb"), 0, "none"),
        (("data", "val"), "val.jsonl", "none"),
        (("data", "train"), "moved/train.jsonl", "same data"),
        (("data", "image_root"), "moved", "same data"),
        (("model", "path"), "moved", "same model"),
        (("seed",), 1, "results"),
        (("precision",), "bf16", "results"),
        (("data", "max_num_patches"), 16, "results"),
        (("data", "train"), [{"path": "a"}, {"path": "b"}], "results"),
        (("stages", 1, "accumulate"), 2, "rounding"),
        (("stages", 1, "batch_tokens"), 900, "rounding"),
        (("stages", 1, "cache_features"), True, "rounding"),
        (("stages", 1, "steps"), 60, "results"),
        (("stages", 1, "batch_size"), 8, "results"),
        (("stages", 1, "train", "decoder"), 1e-5, "results"),
        (("stages", 1, "train"), {"projector": 1e-3}, "never"),
        (("stages", 1, "name"), "other", "never"),
        (("stages", 0, "steps"), 60, "never"),  # the second stage began from its model
        (("stages", 0, "train", "projector"), 1.0, "never"),
        (("stages", 0, "accumulate"), 2, "rounding"),
        (("stages", 2, "steps"), 60, "later"),
        (("stages", 2, "train"), {"projector": 1e-3}, "later"),
        (("stages", 2, "name"), "other", "later"),
        (("stages", 2, "schedule"), "constant", "later"),
    ],
)
def test_what_each_setting_means_for_a_run_that_goes_on(path: tuple[Any, ...], value: Any, effect: str) -> None:
    found = changes(before(), changed(*path, value=value), BEGUN)
    assert {change.effect for change in found} == {effect}
    assert changes(before(), before(), BEGUN) == []


def test_stages_may_come_and_go_behind_what_has_begun() -> None:
    more, fewer, other = before(), before(), before()
    more["stages"].append(to_dict(config(Path("out"), tune(name="more")))["stages"][0])
    del fewer["stages"][2]
    del other["stages"][0]
    assert [c.effect for c in changes(before(), more, BEGUN)] == ["later"]
    assert [c.effect for c in changes(before(), fewer, BEGUN)] == ["later"]
    assert "never" in {c.effect for c in changes(before(), other, BEGUN)}


def test_where_nothing_is_left_to_train_a_change_is_refused_unless_there_are_more_steps() -> None:
    done = {"align": Begun(6, True), "tune": Begun(6, True), "last": Begun(6, True)}
    assert [c.effect for c in changes(before(), changed("seed", value=1), done)] == ["never"]
    tree = changed("stages", 2, "steps", value=9)
    tree["seed"] = 1
    assert {c.effect for c in changes(before(), tree, done)} == {"results"}


def test_after_another_batch_size_the_examples_go_on_where_they_were() -> None:
    """By hand: 3 steps of 4 have seen the places 0 to 11 of the line; then steps of 2, in two micro-batches."""
    keys = list(StepSampler(3, 5, 2, accumulate=2, position=12))
    assert [list(key.positions) for key in keys] == [[12], [13], [14], [15]]
    assert [(key.step, key.micro) for key in keys] == [(3, 0), (3, 1), (4, 0), (4, 1)]


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 4 of 6 of its first stage, the newest checkpoint being that of step 4."""
    from vlm.train.step import StageModule

    out = tmp_path_factory.mktemp("halfway") / "out"
    original = StageModule.training_step

    def stopping(self: Any, item: Any, index: int) -> Any:
        if item.key.step == 4:
            raise TrainingError("enough")
        return original(self, item, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageModule, "training_step", stopping)
        with pytest.raises(TrainingError, match="enough"):
            vlm.train.run(config(out))
    return out


def copied(halfway: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "out"))


def rows(out: Path) -> list[dict[str, str]]:
    return step_log.read(out / "metrics.csv")


def test_the_advice_for_a_full_memory_is_accepted_and_gives_the_same_training(halfway: Path, tmp_path: Path) -> None:
    """Raise `accumulate`, or batch_tokens in its place: the losses are those of a run that was left alone."""
    alone, cut = Path(shutil.copytree(halfway, tmp_path / "alone")), copied(halfway, tmp_path)
    moved = Path(shutil.copytree(world()[1].parent, tmp_path / "moved"))
    vlm.train.run(config(alone, align()), resume=True)
    data = {"train": moved / "train.jsonl", "cache_images_mb": 1, "val": moved / "train.jsonl"}
    # The second stage had not begun: it may be another, or be left out.
    vlm.train.run(config(cut, align(accumulate=2), data=data, log_every=1), resume=True)
    for key in ("loss", "tokens", "seen"):
        assert [float(row[key]) for row in rows(cut)] == pytest.approx(
            [float(row[key]) for row in rows(alone)], rel=1e-4
        )
    record = history.accepted(cut)
    assert [entry["after_steps"] for entry in record] == [{"align": 4}]
    assert {(c["setting"], c["effect"]) for c in record[0]["changes"]} == {
        ("accumulate", "rounding"),
        ("cache_images_mb", "none"),
        ("log_every", "none"),
        ("stages.1", "later"),
        ("train", "same data"),
        ("val", "none"),
    }
    text = (cut / "train.log").read_text()
    assert "changed since the last start (the same gradient" in text and "stage align: accumulate 1 -> 2" in text
    assert json.loads((cut / "model" / "training.json").read_text())["changes"] == record


def test_what_changes_results_is_refused_and_on_purpose_accepted_once(
    halfway: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = copied(halfway, tmp_path)
    run = config(out, align(steps=5, batch_size=2, train={"projector": 1e-3}), checkpoint_every=1)
    with pytest.raises(ConfigError, match=r"add --accept-changes (?s:.*)stage align:\n-  steps: 6\n\+  steps: 5"):
        vlm.train.run(run, resume=True)
    assert yaml.safe_load((out / "config.yaml").read_text())["stages"][0]["steps"] == 6, "a refusal changes nothing"
    with pytest.raises(ConfigError, match=r"-  steps: 4\n\+  steps: 3   \(4 steps are done already"):
        vlm.train.run(config(out, align(steps=3)), resume=True, accept_changes=True)
    with pytest.raises(ConfigError, match=r"can no longer change; (?s:.*)which parts train is fixed"):
        vlm.train.run(config(out, align(train={"decoder": 1e-3})), resume=True, accept_changes=True)
    vlm.train.run(run, resume=True, accept_changes=True)
    assert "accepted, it changes the result): stage align: steps 6 -> 5" in caplog.text
    last = rows(out)[-1]
    # A cosine over 5 steps without a whole step of warm-up, in its last: (1 + cos(pi * 4 / 5)) / 2 of the new peak.
    assert (len(rows(out)), float(last["lr_projector"])) == (5, pytest.approx(1e-3 * 0.0954915, rel=1e-5))
    # Two examples behind the sixteen that four steps of four have seen: 16 and 17 of the line.
    state = json.loads((out / "align" / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert (state["position"], state["start"]) == (18, "start")
    # What was accepted is the run's configuration from now on; more steps of a stage that ended are a change again.
    vlm.train.run(run, resume=True)
    longer = config(out, align(steps=7, batch_size=2, train={"projector": 1e-3}), checkpoint_every=1)
    with pytest.raises(ConfigError, match="--accept-changes"):
        vlm.train.run(longer, resume=True)
    vlm.train.run(longer, resume=True, accept_changes=True)
    assert [row["step"] for row in rows(out)] == [str(step) for step in range(1, 8)]
    assert json.loads((out / "model" / "training.json").read_text())["steps"] == 7
    assert len(history.accepted(out)) == 2
    shutil.rmtree(out / "align" / "checkpoints")
    longer = config(out, align(steps=8, batch_size=2, train={"projector": 1e-3}))
    with pytest.raises(CheckpointError, match="its 7 steps are done, and it cannot go on to 8: .* holds no checkpoint"):
        vlm.train.run(longer, resume=True, accept_changes=True)


def test_other_data_is_accepted_on_purpose_only(tmp_path: Path, halfway: Path) -> None:
    out, data = copied(halfway, tmp_path), pictures(tmp_path / "data")
    images = sorted((tmp_path / "data" / "images").iterdir())
    images[0].write_bytes(images[1].read_bytes())
    run = config(out, align(), data={"train": data})
    with pytest.raises(CheckpointError, match="step-00000004: data changed .* add --accept-changes"):
        vlm.train.run(run, resume=True)
    vlm.train.run(run, resume=True, accept_changes=True)
    vlm.train.run(run, resume=True)
    (entry,) = history.accepted(out)
    assert {c["setting"] for c in entry["changes"]} == {"train", "stages.1", "examples (sha256)"}


def test_a_model_that_moved_is_the_same_and_another_one_is_refused(tmp_path: Path, halfway: Path) -> None:
    out = copied(halfway, tmp_path)
    shutil.copytree(world()[0], tmp_path / "moved")
    model, processor = vlm.load(world()[0])
    model.get_parameter("model.multi_modal_projector.linear.bias").data.add_(1)
    vlm.save(model, processor, tmp_path / "another")
    with pytest.raises(
        ConfigError, match=r"model:\n-  path: .*\n\+  path: .*another   \(the run has its model already"
    ):
        vlm.train.run(config(out, align(), model={"path": tmp_path / "another"}), resume=True, accept_changes=True)
    vlm.train.run(config(out, align(), model={"path": tmp_path / "moved"}), resume=True)
    assert checkpoint.problem(out / "model") is None


def test_a_run_that_was_begun_before_its_record_held_the_configuration_goes_on(tmp_path: Path, halfway: Path) -> None:
    out = copied(halfway, tmp_path)
    record = json.loads((out / "versions.json").read_text())
    for entry in record:
        del entry["config"], entry["data_sha256"]
    (out / "versions.json").write_text(json.dumps(record))
    state = out / "align" / "checkpoints" / "step-00000004" / "state.json"
    data = pictures(tmp_path / "data")
    data.write_text(data.read_text().replace("a red", "one red"))
    assert state.exists()
    with pytest.raises(CheckpointError, match="data changed since this checkpoint was written"):
        vlm.train.run(config(out, align(), data={"train": data}), resume=True)
    with pytest.raises(ConfigError, match="-  seed: 0\n\\+  seed: 1"):
        vlm.train.run(config(out, align(), seed=1), resume=True)
    assert isinstance(rundir.open_run(config(out, align()), resume=True, main=True), rundir.RunDirectory)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (
            {"batch_size": 6, "accumulate": 1},
            r"raise `accumulate` \(now 1\) to 2, which leaves .* --resume; or lower",
        ),
        ({"batch_size": 6, "accumulate": 3}, r"raise `accumulate` \(now 3\) to 6, "),
        (
            {"batch_size": 6, "accumulate": 6},
            r"memory\); lower batch_size \(now 6\) and go on with --resume --acc",
        ),
        ({"batch_size": 6, "batch_tokens": 99}, r"lower batch_tokens \(now 99\), which leaves the result as it is"),
    ],
)
def test_the_advice_for_a_full_memory_can_be_followed(settings: dict[str, Any], advice: str) -> None:
    """What it says to set is a setting that the stage takes, and that a run may change when it goes on."""
    stage = from_dict(StageConfig, align(**settings))
    error = str(explain(RuntimeError("CUDA out of memory"), stage))
    assert re.search(advice, error)
    if (number := re.search(r"to (\d+), ", error)) is not None:
        from_dict(StageConfig, align(**{**settings, "accumulate": int(number[1])}))


def test_what_two_runs_have_in_common_leaves_out_what_changes_no_result() -> None:
    for path, value in ((("workers",), 3), (("stages", 0, "accumulate"), 2), (("data", "cache_images_mb"), 0)):
        assert essential(changed(*path, value=value)) == essential(before())
    for path, value in ((("seed",), 3), (("stages", 0, "batch_size"), 2), (("data", "max_num_patches"), 8)):
        assert essential(changed(*path, value=value)) != essential(before())


def test_a_change_is_shown_in_one_line() -> None:
    assert str(Change("stage a", "steps", 1, 2, "results")) == "stage a: steps 1 -> 2"
    assert str(Change("run", "seed", 1, 2, "results")) == "seed 1 -> 2"


def test_what_a_change_does_stands_at_the_setting() -> None:
    where = "out accelerator devices nodes strategy workers checkpoint_every keep_checkpoints log_every"
    measured = "deterministic force_fp16 validate_every evaluate evaluate_every bad_image_share"
    assert set(FREE) == set(where.split()) == set(settings_that(RunConfig, "machine"))
    assert set(settings_that(RunConfig, "none")) == set(measured.split())
    assert set(settings_that(DataConfig, "none")) == {"val", "cache_images_mb"}
    assert set(settings_that(StageConfig, "rounding")) == {"accumulate", "batch_tokens", "cache_features"}
    shape = {"objective", "image_size", "image", "layer", "projector", "encoder_kind"}
    assert set(settings_that(StageConfig, "shape")) == shape
    # A plain field changes results; there is no list to put it in.
    assert {"batch_size", "train", "schedule", "loss_reduction"} <= set(settings_that(StageConfig, "results"))
    tree = to_dict(config(Path("somewhere")))
    assert set(tree) - set(essential(tree)) == {*where.split(), *measured.split()}
