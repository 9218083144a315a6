"""Two gloo processes against one: the same gradients, one writer, one end."""

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_train_steps import no_dropout, still  # noqa: F401  (a fixture)
from traintools import align, config, damaged, difference, steps_done, training, wait

import vlm
import vlm.train
from vlm.train import RunConfig, checkpoint


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@contextmanager
def two_processes(
    run: RunConfig, *, resume: bool = False, prepare: Callable[[], None] | None = None
) -> Iterator[list[Any]]:
    """Two ranks, started at once as torchrun does; each calls `prepare` first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"},
    }
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                training(
                    run,
                    resume=resume,
                    environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    prepare=prepare,
                )
            )
            for rank in (0, 1)
        ]


def run_on_two(run: RunConfig, *, resume: bool = False) -> list[int | None]:
    with two_processes(run, resume=resume) as processes:
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_one_batch_of_four_is_two_accumulated_is_two_processes(
    reduction: str,
    no_dropout: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Answers have 1, 2 and 3 words: the ranks' supervised tokens differ, and a mean of means would show."""
    settings = {"steps": 3, "loss_reduction": reduction, "clip_norm": 0.5}
    start = {"path": no_dropout}
    whole = config(tmp_path / "whole", still(**settings), model=start)
    vlm.train.run(whole)
    two = config(tmp_path / "two", still(**settings), model=start, devices=2, strategy="ddp")
    assert run_on_two(two) == [0, 0]
    both = config(tmp_path / "both", still(**settings, accumulate=2), model=start, devices=2, strategy="ddp")
    assert run_on_two(both) == [0, 0]
    for other in (two, both):
        for one, row in zip(rows(whole.out), rows(other.out), strict=True):
            assert (row["tokens"], row["seen"]) == (one["tokens"], one["seen"])
            assert float(row["loss"]) == pytest.approx(float(one["loss"]), rel=1e-6)
            assert float(row["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-6)
        assert difference(whole.out / "model", other.out / "model") < 2e-5


def test_a_signal_to_one_process_stops_and_saves_both(tmp_path: Path) -> None:
    run = config(tmp_path / "out", align(steps=40), checkpoint_every=1000, devices=2, strategy="ddp")
    with two_processes(run) as processes:
        wait(lambda: steps_done(run.out) >= 2)
        processes[1].terminate()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [143, 143]
    saved = checkpoint.newest(run.out / "align" / "checkpoints")
    assert saved is not None and saved.step == steps_done(run.out) < 40
    assert run_on_two(run, resume=True) == [0, 0]
    assert [int(row["step"]) for row in rows(run.out)] == list(range(1, 41))


def test_an_error_in_one_process_ends_both(tmp_path: Path) -> None:
    """A quarter of the images is damaged, so both ranks see some, but each stops at its own moment."""
    data = damaged(tmp_path / "data", [1, 5, 9, 13, 17, 21])
    run = config(tmp_path / "out", align(steps=200), data={"train": data}, devices=2, strategy="ddp")
    assert run_on_two(run) == [2, 2]


def say_into(path: Path) -> None:
    """What the process writes goes into a file, from now on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(victim: int, tmp_path: Path) -> None:
    run = config(tmp_path / "out", align(steps=10_000), devices=2, strategy="ddp")
    with two_processes(run, prepare=partial(say_into, tmp_path / "said")) as processes:
        wait(lambda: steps_done(run.out) >= 2)
        processes[victim].kill()
        other = processes[1 - victim]
        other.join(60)
        assert other.exitcode == 2
    (said,) = (tmp_path / "said").read_text().splitlines()
    assert said.startswith("error: another process of this launch has ended early") and "--resume" in said


@pytest.mark.slow
def test_lightnings_own_launcher(tmp_path: Path) -> None:
    """`devices: 2` in a plain script: rank 0 prepares, then starts the other, which runs the script again."""
    run = config(tmp_path / "out", devices=2, strategy="ddp")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "import torch\n"
        "import vlm.train\n"
        "from vlm.settings import from_dict\n"
        "torch.set_num_threads(1)\n"
        f"vlm.train.run(from_dict(vlm.train.RunConfig, json.loads({json.dumps(json.dumps(plain(run)))!s})))\n"
    )
    root = Path(vlm.__file__).parents[1]
    command, environment = [sys.executable, str(script)], {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(rows(run.out)) == 12 and checkpoint.problem(run.out / "tune" / "model") is None


def plain(run: RunConfig) -> dict[str, Any]:
    from vlm.settings import to_dict

    return to_dict(run)
