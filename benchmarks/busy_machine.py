"""Training speed on a quiet and on a busy machine, by how long OpenMP's threads wait awake.

    python benchmarks/busy_machine.py
    python benchmarks/busy_machine.py --busy 2 --seconds 20 --repeats 5 --only spin-1000 spin-10000

The demo's full stage (its model, its pictures, batches of 32) is trained by `vlm train` on the CPU, once for each
candidate, alone and beside `--busy` processes that do nothing but compute; the candidates take turns `--repeats` times.
Examples per second are counted over `--seconds` after the first steps, by the rows of `metrics.csv`; the table has the
medians. It goes to stderr, JSON to stdout. What `vlm` sets by itself is in `vlm.threads`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vlm import threads
from vlm.demo import dataset
from vlm.demo.run import read_recipe
from vlm.demo.start import Choice, make

CANDIDATES: dict[str, dict[str, str]] = {
    "as vlm sets it": {},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},  # a user's value, so that `vlm.threads` leaves it alone
    "spin-1000": {"GOMP_SPINCOUNT": "1000"},
    "spin-3000": {"GOMP_SPINCOUNT": "3000"},
    "spin-10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
FIRST_STEPS = 3
"""Not counted: memory is taken, kernels are chosen."""
SCENES = 200
SPIN = "while True: pass"


def write_run(folder: Path) -> Path:
    """The demo's second stage alone, longer than any measurement."""
    dataset.write(folder / "data", 0, SCENES, 1)
    recipe = read_recipe()
    stage = next(stage for stage in recipe["stages"] if stage["module"] == "full")
    recipe |= {"out": str(folder / "run"), "seed": 0, "stages": [{**stage, "steps": 10**6}], "accelerator": "cpu"}
    recipe["model"] |= {**make(Choice(), folder, 0).model, "seed": 0}
    recipe["data"]["train"] = str(folder / "data" / "train.jsonl")
    recipe["checkpoint_every"] = 10**6
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that compute for the length of a block."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(number)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def speed(run: Path, out: Path, variables: dict[str, str], seconds: float) -> float:
    """Examples per second of one training run; it is killed afterwards."""
    names = (*threads.NUMBER_IS_SET_BY, *threads.SPIN_IS_SET_BY)
    bare = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "vlm", "train", "--config", str(run), "--set", f"out={out}"]
    with (out.parent / "log").open("w") as log:
        process = subprocess.Popen(command, env={**bare, **variables}, stdout=log, stderr=log)
    try:
        wait_for(process, out, FIRST_STEPS, log.name)
        began, first = time.perf_counter(), rows(out)
        time.sleep(seconds)
        wait_for(process, out, first + 2, log.name)
        done = rows(out)
        return 32 * (done - first) / (time.perf_counter() - began)
    finally:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[bytes], out: Path, steps: int, log: str) -> None:
    while rows(out) < steps:
        if process.poll() is not None:
            raise SystemExit(f"training ended with status {process.returncode}:\n{Path(log).read_text()[-2000:]}")
        time.sleep(0.05)


def rows(out: Path) -> int:
    """Steps that are recorded."""
    try:
        return max(0, (out / "metrics.csv").read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=threads.cores(), help="spinning processes (one for each core)")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement (15)")
    parser.add_argument("--repeats", type=int, default=3, help="of everything (3)")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end
    found: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        for repeat in range(options.repeats):
            for state, number in (("quiet", 0), ("busy", options.busy)):
                for name in options.only:
                    out = Path(folder) / f"{repeat}-{state}-{options.only.index(name)}"
                    with busy(number):
                        found[name][state].append(speed(run, out, CANDIDATES[name], options.seconds))
                    print(f"{repeat + 1} {state} {name}: {found[name][state][-1]:.0f}", file=sys.stderr)
    report(found, options)


def report(found: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    results: dict[str, Any] = {}
    print(f"examples/s, median of {options.repeats}; busy: beside {options.busy} spinning processes", file=sys.stderr)
    print(f"{'':20}{'quiet':>8}{'busy':>8}{'busy/quiet':>12}", file=sys.stderr)
    for name, states in found.items():
        quiet, loaded = (statistics.median(states[state]) for state in ("quiet", "busy"))
        results[name] = {"quiet": quiet, "busy": loaded, "ratio": loaded / quiet, "all": states, **CANDIDATES[name]}
        print(f"{name:20}{quiet:8.0f}{loaded:8.0f}{loaded / quiet:12.2f}", file=sys.stderr)
    facts = {"cores": threads.cores(), "load": os.getloadavg(), "busy": options.busy, "seconds": options.seconds}
    print(json.dumps({**facts, "candidates": results}, indent=1))


if __name__ == "__main__":
    main()
