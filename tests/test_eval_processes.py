"""Evaluation shared by processes: the same results as of one, whatever the number, also after a kill."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_eval_harness import ColourPredictor, data, lines_of  # noqa: F401  (a fixture)
from test_eval_model import lively

import vlm
from vlm.eval import evaluate
from vlm.generation.predictions import PREDICTIONS, PredictionStore

ROOT = Path(vlm.__file__).parents[1]


@cache
def _context() -> Any:
    # The server imports once and never computes, so its children start in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "vlm.eval.harness", "vlm.train.stage", "vlm.build.presets"])
    return context


class Dies(ColourPredictor):
    """Is killed by SIGKILL when it is asked for another batch after so many."""

    def __init__(self, after: int | None) -> None:
        super().__init__()
        self.after = after

    def predict(self, images: Any, prompts: Any, *, ids: Any, decoding: Any) -> list[str]:
        if len(self.batches) == self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(images, prompts, ids=ids, decoding=decoding)


def _child(path: Path, out: Path, after: int | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    evaluate(Dies(after), path, "exact_match", out, batch_size=3, progress=False)


@contextmanager
def processes(number: int, path: Path, out: Path, *, die_after: int | None = None) -> Iterator[list[Any]]:
    """An evaluation by so many processes, started as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    started = []
    try:
        for rank in range(number):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context().Process(target=_child, args=(path, out, die_after, environment))
            process.start()
            started.append(process)
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def predicted(out: Path) -> int:
    """Items with a complete record in any of the files of predictions; while shares are added, some are in two."""
    found: set[str] = set()
    for path in out.glob("predictions*.jsonl"):
        with suppress(FileNotFoundError):  # it was added to the others between the two calls
            whole, _, _ = path.read_bytes().rpartition(b"\n")
            found.update(json.loads(line)["id"] for line in whole.split(b"\n") if line)
    return len(found)


@pytest.mark.slow
def test_torchrun_with_two_processes_is_one_process(tmp_path: Path) -> None:
    """A real model through the command line. 11 items in batches of 3: uneven shares, an uneven last batch."""
    from PIL import Image

    model, processor = lively("siglip", "gemma")
    vlm.save(model, processor, tmp_path / "model")
    lines = []
    for i in range(11):
        Image.effect_noise((20 + 3 * i, 50 - 2 * i), 80).convert("RGB").save(tmp_path / f"{i}.png")
        prompt = "answer en what color is the " + "square " * (i % 4) + "?"
        lines.append(json.dumps({"id": f"n{i}", "image": f"{i}.png", "prefix": prompt, "suffix": "a red square"}))
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(lines) + "\n")
    words = ["-m", "vlm", "eval", "--model", str(tmp_path / "model"), "--data", str(path), "--metrics", "exact_match"]
    words += ["--batch", "3", "--max-new-tokens", "5", "--device", "cpu", "--out", str(tmp_path / "two")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("exact_match") == 1, "only the first process may print"
    evaluate(
        *(tmp_path / "model", path, "exact_match", tmp_path / "one"),
        batch_size=3,
        max_new_tokens=5,
        device="cpu",
        progress=False,
    )
    one, two = (lines_of(tmp_path / name / "items.jsonl") for name in ("one", "two"))
    assert one == two and len({item["prediction"] for item in one}) > 3
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["run"]["processes"] == 2 and results["num_items"] == 11
    assert not list((tmp_path / "two").glob("predictions.rank*"))


def test_killed_processes_are_continued_by_another_number(data: Path, tmp_path: Path) -> None:  # noqa: F811
    (data.parent / "3.png").write_bytes(b"not a picture")  # items q6 and q7
    out = tmp_path / "out"
    # 7 batches of 3: two processes do one each and die; of the other 5 three processes do one each, and two die.
    for number, kept in ((2, 6), (3, 15)):
        with processes(number, data, out, die_after=1) as started:
            for process in started:
                process.join(120)
            assert [process.exitcode for process in started[:2]] == [-signal.SIGKILL] * 2
        assert predicted(out) == kept
    with processes(2, data, out) as started:
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == [0, 0]
    evaluate(ColourPredictor(), data, "exact_match", tmp_path / "whole", batch_size=3, progress=False)
    assert lines_of(out / "items.jsonl") == lines_of(tmp_path / "whole" / "items.jsonl")
    ids = [record["id"] for record in lines_of(out / PREDICTIONS)]
    assert sorted(ids) == sorted(f"q{i}" for i in range(20)), "nothing lost, nothing twice"
    results = json.loads((out / "results.json").read_text())
    assert results["skipped"] == 2 and {one["id"] for one in results["failures"]} == {"q6", "q7"}
    assert results["run"]["resumed_items"] == 15


def test_a_refusal_ends_all_processes(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """The folder holds predictions of another model: the first process sees it, and the other does not wait for it."""
    evaluate(ColourPredictor(version=2), data, "exact_match", tmp_path, progress=False)
    before = (tmp_path / PREDICTIONS).read_bytes()
    with processes(2, data, tmp_path) as started:
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == [1, 1]
    assert (tmp_path / PREDICTIONS).read_bytes() == before and not list(tmp_path.glob("predictions.rank*"))


def test_what_killed_processes_left_is_added_once(tmp_path: Path) -> None:
    """Also when the kill came after the shares were added and before they were deleted, and in the middle of a line."""
    with PredictionStore(tmp_path, {}) as store:
        store.append([{"id": "1", "prediction": "a"}])
    (tmp_path / "predictions.rank0.jsonl").write_bytes(b'{"id": "1", "prediction": "a"}\n{"id": "2", "predic')
    (tmp_path / "predictions.rank7.jsonl").write_bytes(b'{"id": "3", "prediction": "c"}\n')
    for _ in range(2):
        with PredictionStore(tmp_path, {}) as store:
            assert {key: record["prediction"] for key, record in store.records.items()} == {"1": "a", "3": "c"}
    assert (tmp_path / PREDICTIONS).read_bytes().count(b"\n") == 2
    assert not list(tmp_path.glob("predictions.rank*"))


def test_processes_must_agree_on_the_evaluation() -> None:
    from vlm.errors import ConfigError
    from vlm.eval.run import _check_agreement
    from vlm.ranks import Processes

    class Other(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "model": "another"}]

    with pytest.raises(ConfigError, match="process 0 and process 1 were asked for different evaluations"):
        _check_agreement(Other(0, 2), {"model": "one"})
