"""What the training tests share: a tiny model, pictures, configurations, and child processes that start fast."""

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from PIL import Image

from vlm.settings import from_dict
from vlm.train import RunConfig

COLORS = ("red", "green", "blue", "white")


def left_by_a_killed_process(target: Path) -> Path:
    """A half-written directory for `target` (see `vlm.files.publishing`), whose writer is dead."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    left = target.with_name(f".{target.name}.writing-{platform.node()}-{ended.pid}-0")
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    return left


def pictures(folder: Path, count: int = 24) -> Path:
    """A training file of plain pictures with answers of different lengths, so that means of means are wrong."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        color = COLORS[i % 4]
        Image.new("RGB", (28, 28), color).resize((28 + i, 28)).save(folder / "images" / f"{i}.png")
        suffix = " ".join(["a", color, "square"][: 1 + i % 3])
        lines.append({"id": f"s{i}", "image": f"images/{i}.png", "prefix": "caption en", "suffix": suffix})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


def damaged(folder: Path, names: list[int]) -> Path:
    """`pictures`, some of which end in the middle."""
    data = pictures(folder)
    for i in names:
        path = folder / "images" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:40])
    return data


@cache
def world() -> tuple[Path, Path]:
    """(model directory, training file), made once per session. The model has dropout in its decoder's attention."""
    import vlm
    from vlm.build.presets import tiny

    folder = Path(mkdtemp(prefix="vlm-train-tests-"))
    model, processor = tiny()
    model.config.text_config.attention_dropout = 0.1
    model.config.vision_config.attention_dropout = 0.1
    # The projector starts at zero, which would hide the tower from the loss.
    model.get_parameter("model.multi_modal_projector.linear.weight").data.normal_(std=0.1)
    vlm.save(model, processor, folder / "start")
    return folder / "start", pictures(folder / "data")


def align(**changes: Any) -> dict[str, Any]:
    values = {"name": "align", "module": "frozen_encoder", "train": {"projector": 1e-2}, "steps": 6, "batch_size": 4}
    return {**values, **changes}


def tune(**changes: Any) -> dict[str, Any]:
    rates = {"encoder": 1e-3, "projector": 1e-3, "decoder": 1e-3}
    return {
        "name": "tune",
        "module": "full",
        "train": rates,
        "steps": 6,
        "batch_size": 4,
        "weight_decay": 0.1,
        **changes,
    }


def config(out: Path, *stages: dict[str, Any], **changes: Any) -> RunConfig:
    model, data = world()
    values = {
        "out": out,
        "model": {"path": model},
        "data": {"train": data},
        "accelerator": "cpu",
        "checkpoint_every": 2,
    }
    return from_dict(RunConfig, {**values, "stages": list(stages or (align(), tune())), **changes})


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def difference(a: Path, b: Path) -> float:
    """Largest absolute difference between two models' weights."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


# --- child processes


@cache
def context() -> Any:
    # The fork server imports the heavy libraries once and never trains, so its children start in no time and may train.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm.train.stage", "vlm.build.presets"])
    return context


def _child(run: RunConfig, resume: bool, environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    import torch

    import vlm.train
    from vlm.errors import VLMError

    os.environ.update(environment)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    try:
        vlm.train.run(run, resume=resume)
    except VLMError as error:
        print(f"error: {error}")
        raise SystemExit(2) from error


@contextmanager
def training(
    run: RunConfig,
    *,
    resume: bool = False,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """A process that trains; killed at the end of the block if it is still there."""
    process = context().Process(target=_child, args=(run, resume, environment or {}, prepare))
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def steps_done(out: Path) -> int:
    """Rows of the run's metrics file."""
    try:
        return max(0, (out / "metrics.csv").read_text().count("\n") - 1)
    except OSError:
        return 0


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def stop_after(run: RunConfig, rows: int, signum: int = signal.SIGKILL, *, resume: bool = False) -> int:
    """Train in a process, send a signal as soon as that many steps are recorded; the exit code (-9: killed)."""
    with training(run, resume=resume) as process:
        wait(lambda: steps_done(run.out) >= rows or not process.is_alive())
        if process.is_alive():
            os.kill(process.pid, signum)
        process.join(60)
        assert process.exitcode is not None, "the process did not leave"
        return process.exitcode
