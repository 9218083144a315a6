"""Checkpoints: complete or absent, whatever the disk does."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from traintools import left_by_a_killed_process

from vlm.errors import CheckpointError
from vlm.train import checkpoint


def tensors(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3, 4), value), "b": torch.full((), value)}


def save(folder: Path, step: int, keep: int = 2, **state: Any) -> Path:
    return checkpoint.save(folder, step, tensors(step), {"w.exp_avg": tensors(step)["w"]}, state, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20_000):
        save(tmp_path, step, data="abc")
    assert names(tmp_path) == ["step-00000100", "step-00020000"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 20_000 and found.state["data"] == "abc"
    assert torch.equal(found.model["w"], torch.full((3, 4), 20_000.0)) and found.model["b"].shape == ()
    assert torch.equal(found.optimizer["w.exp_avg"], tensors(20_000)["w"])


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None


def cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is missing or not readable"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is missing or not readable"),
        (lambda path: (path / "state.json").unlink(), "files differ from manifest.json: state.json"),
        (lambda path: (path / "extra").touch(), "files differ from manifest.json: extra"),
        (lambda path: [file.unlink() for file in path.iterdir()], "manifest.json is missing"),
        (cut, "model.safetensors has another sha256"),
        (flip, "optimizer.safetensors has another sha256"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    damage: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    left_by_a_killed_process(tmp_path / "step-00000003")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    assert reason in caplog.text and "step-00000002" in caplog.text
    # Going on from step 1 writes step 2 again, over the damaged one, and clears what a kill left.
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.newest(tmp_path).step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("stage", ["save_file", "manifest.write", "files.sync", "files._exchange"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_one_line_and_costs_nothing(
    stage: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def refuse(*_: object, **__: object) -> None:
        import os

        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(f"vlm.train.checkpoint.{stage}", refuse)
        with pytest.raises(CheckpointError, match="cannot save .*step-00000002.* saved before is intact") as caught:
            save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"] and checkpoint.problem(tmp_path / "step-00000001") is None
    save(tmp_path, 2)
    assert checkpoint.newest(tmp_path).step == 2  # type: ignore[union-attr]


def test_a_real_file_size_limit_is_one_line(tmp_path: Path) -> None:
    """EFBIG from the operating system, not from a patch: safetensors reports it in its own exception."""
    import resource

    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"w": torch.zeros(2**16)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot save .*step-00000002: .*[Ff]ile too large"):
            checkpoint.save(tmp_path, 2, big, {}, {}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"]


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(CheckpointError, match="needs 1 MB and 0 MB are free"):
        save(tmp_path / "new", 1)
    assert names(tmp_path / "new") == []


def test_the_manifest_is_written_after_everything_else_and_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any call, the folder holds no `step-2` or a complete one, and step 1 throughout."""
    save(tmp_path, 1, keep=1)
    states = []

    def watch(name: str) -> None:
        where, _, function = name.rpartition(".")
        module = getattr(checkpoint, where) if where else checkpoint
        real = getattr(module, function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            states.append((names(tmp_path), checkpoint.problem(tmp_path / "step-00000002")))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, watched)

    for name in ("save_file", "files.sync", "manifest.write", "files._exchange", "_remove", "_delete_old"):
        watch(name)
    save(tmp_path, 2, keep=1)
    assert len(states) > 10
    for present, problem in states:
        complete = "step-00000002" in present and problem is None
        assert "step-00000001" in present or complete
        assert "step-00000002" not in present or complete


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert set(load_file(path / "optimizer.safetensors")) == {"w.exp_avg"}
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    source = "".join(file.read_text() for file in Path(checkpoint.__file__).parent.glob("*.py"))
    assert "torch.load" not in source and "pickle." not in source
