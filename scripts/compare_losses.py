"""Prove that a refactoring changes no number: the same small runs at two revisions, compared to the last digit.

    python scripts/compare_losses.py OLD NEW [--steps 10] [--out DIR] [--keep DIR] [--cases WORD ...] [--demo]

OLD and NEW are git revisions or directories that hold `vlm/`. The code of each runs in a process of its own that
imports `vlm` from there (a revision is unpacked into a temporary folder). Everything goes through what users have:
command lines and YAML files (`scripts/loss_cases.py`), on a small drawn data set that is made once and read by both.

For every case these must be equal:

    numbers    every row of `metrics.csv` and `evaluations.csv`: loss, gradient norm, learning rates, tokens, checksum
               of the examples seen, held-out loss, scores; as the digits in the file, which are all that a float has
    weights    every tensor of every model directory (start, each stage, final, exported), bit for bit, by name
    captions   what `vlm caption` says with the final model

`--demo` does it for `vlm demo` too, with the scores of its demo.json; that takes minutes. The proof holds for one
thread of a CPU and for what the cases do: not for speed, memory, GPUs, several processes or messages.

A table goes to stderr, JSON to stdout. Exit status: 0 equal, 1 a case is different or failed, 2 it could not start.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import random
import runpy
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import loss_cases
from loss_cases import Case

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "transformers", "lightning", "numpy", "Pillow", "sentencepiece")
CLOCKED = {"examples_per_s", "seconds", "peak_memory_gb", "versions"}
"""Columns of a metrics file and keys of demo.json that say how a run went, not what came out."""
SHOWN = 3
"""Differences of a case in the table; all of them are in the JSON."""

Found = dict[str, Any]
"""What a case left: `numbers`, `weights` and `captions`, each name -> value; `seconds`; or `error`."""


def main() -> int:
    options = _options()
    with TemporaryDirectory(prefix="losses-") as folder:
        work = Path(folder)
        inputs = work / "inputs"
        loss_cases.write_inputs(inputs)
        cases = [case for case in loss_cases.cases(options.steps, options.demo) if _chosen(case, options.cases)]
        if not cases:
            return _refuse(f"no case has {', '.join(options.cases)} in its name")
        try:
            sides = [Side(name, getattr(options, name), work, options.keep) for name in ("old", "new")]
        except subprocess.CalledProcessError as error:
            return _refuse(f"{error.cmd[-1]} is neither a git revision nor a directory with vlm/ in it")
        with ThreadPoolExecutor(options.jobs) as pool:
            old, new = pool.map(lambda side: side.results(cases, inputs), sides)
    report = compare(old, new) | {"old": sides[0].label, "new": sides[1].label, "steps": options.steps}
    print(table(report), file=sys.stderr)
    print(json.dumps(report, indent=1))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, value in (("comparison", report), ("old", old), ("new", new)):
            (options.out / f"{name}.json").write_text(json.dumps(value, indent=1))
    return 0 if report["equal"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", help="git revision, or directory with vlm/ in it")
    parser.add_argument("new", metavar="NEW", help="git revision, or directory with vlm/ in it")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="optimizer steps of each stage (10)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write comparison.json, old.json and new.json there")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="results by commit: OLD is not run again, NEW always is"
    )
    parser.add_argument("--cases", nargs="+", default=[], metavar="WORD", help="only cases with a WORD in the name")
    parser.add_argument("--demo", action="store_true", help="also `vlm demo` (minutes)")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="2: both sides at the same time (1)")
    return parser.parse_args()


def _chosen(case: Case, words: Sequence[str]) -> bool:
    return not words or any(word in case.name for word in words)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


class Side:
    """One of the two revisions, unpacked.

    Args:
        name: `old` or `new`.
        revision: of git, or a directory.
        keep: where results of commits are stored, or None. Only the old side is read from there: the new one is what is
            to be proven, and a revision can be compared with itself.

    Raises:
        CalledProcessError: there is no such revision.
    """

    def __init__(self, name: str, revision: str, work: Path, keep: Path | None) -> None:
        self.name, self.work, self.store, self.code = name, work / name, None, Path(revision).resolve()
        self.label = revision
        self.work.mkdir()
        if not (self.code / "vlm" / "__init__.py").is_file():
            commit = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
            self.label, self.code = f"{revision} ({commit[:12]})", self.work / "code"
            with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", commit))) as tar:
                tar.extractall(self.code, filter="data")
            self.store = None if keep is None else keep / f"{commit}.json"

    def results(self, cases: Sequence[Case], inputs: Path) -> dict[str, Found]:
        """Case -> what it left; the cases that are stored with the same inputs and libraries are not run."""
        machine = [_digest_of(inputs), _machine()]
        keys = {case.name: _digest([case.as_json(), *machine]) for case in cases}
        stored = self._stored() if self.name == "old" else {}
        found = {case.name: stored[case.name] for case in cases if _key(stored, case.name) == keys[case.name]}
        for name, result in self._run([case for case in cases if case.name not in found], inputs):
            found[name] = {**result, "key": keys[name]}
            state = "FAILED" if "error" in result else f"{result['seconds']:.1f} s"
            print(f"{self.name}  {name:<26} {state}", file=sys.stderr, flush=True)
            if "error" not in result:
                self._put(name, found[name])
        return {case.name: found.get(case.name, {"error": "the process ended before"}) for case in cases}

    def _stored(self) -> dict[str, Found]:
        there = self.store is not None and self.store.is_file()
        return json.loads(self.store.read_text()) if there and self.store else {}

    def _put(self, name: str, result: Found) -> None:
        if self.store is not None:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            new = self.store.with_suffix(f".{os.getpid()}.{self.name}")
            new.write_text(json.dumps(self._stored() | {name: result}))
            new.replace(self.store)

    def _run(self, cases: Sequence[Case], inputs: Path) -> Iterator[tuple[str, Found]]:
        if not cases:
            return
        job = self.work / "job.json"
        job.write_text(json.dumps([case.as_json() for case in cases]).replace(loss_cases.INPUTS, str(inputs)))
        words = [sys.executable, __file__, "--worker", str(self.code), str(job), str(self.work)]
        log = self.work / "log"
        with (
            log.open("w") as errors,
            subprocess.Popen(
                words, cwd=self.work, env=self._environment(), stdout=-1, stderr=errors, text=True
            ) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield json.loads(line)
            finally:
                process.kill()
        if process.returncode > 0:
            print(f"{self.name}: {_tail(log, 0)}", file=sys.stderr)

    def _environment(self) -> dict[str, str]:
        """One thread, no GPU, no network; no compiled files in a directory that is not ours."""
        fixed = {
            "PYTHONPATH": str(self.code),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        fixed |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **fixed}


def _git(*words: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, stdout=subprocess.PIPE).stdout


def _key(stored: Mapping[str, Found], name: str) -> str | None:
    return stored[name]["key"] if name in stored else None


def _digest(value: Any) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else json.dumps(value).encode()).hexdigest()


def _digest_of(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _digest([[str(path.relative_to(folder)), _digest(path.read_bytes())] for path in files])


def _machine() -> list[str]:
    """What the bits may depend on beside the code."""
    cpu = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith(("model name", "flags"))]
    return [platform.python_version(), platform.machine(), *sorted(set(cpu)), *(version(name) for name in LIBRARIES)]


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


# --- in the process of a side -----------------------------------------------------------------------------------------


def worker(code: Path, job: Path, work: Path) -> int:
    """Run the cases one after the other; a line of JSON for each."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints beside Python's stdout
    import vlm

    if not Path(vlm.__file__).resolve().is_relative_to(code.resolve()):
        raise SystemExit(f"vlm was imported from {vlm.__file__}, not from {code}")
    for case in json.loads(job.read_text()):
        folder = work / "runs" / case["name"]
        start = time.monotonic()
        found = run_case(case, folder, work / "log")
        print(
            json.dumps([case["name"], {**found, "seconds": round(time.monotonic() - start, 1)}]),
            file=results,
            flush=True,
        )
    return 0


def run_case(case: Mapping[str, Any], folder: Path, log: Path) -> Found:
    """The commands of a case, in its own folder; the first that does not end with 0 fails it."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    for name, text in case["files"].items():
        (folder / name).write_text(text)
    said: list[str] = []
    for words in case["commands"]:
        before = log.stat().st_size
        status, text = call(words)
        if status != 0:
            return {"error": f"vlm {' '.join(words)[:80]}: status {status}: {_tail(log, before)}"}
        if words[0] == "caption":
            said += [json.loads(line)["text"] for line in text.splitlines()]
    return {"numbers": numbers(folder), "weights": weights(folder), "captions": dict(enumerate(said, 1))}


def call(words: Sequence[str]) -> tuple[int, str]:
    """`python -m vlm WORDS` without a new process, which would take longer than the command: exit status and stdout."""
    import numpy
    import torch

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):  # whatever the command before has drawn
        seed(0)
    sys.argv = ["vlm", *words]
    with redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module("vlm", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
            return code if isinstance(code, int) else 1, out.getvalue()
        except Exception:
            traceback.print_exc()
            return 1, out.getvalue()
    return 0, out.getvalue()


def numbers(folder: Path) -> dict[str, str]:
    """`FILE STAGE STEP NAME` -> the digits in the file."""
    found: dict[str, str] = {}
    for path in sorted([*folder.rglob("metrics.csv"), *folder.rglob("evaluations.csv")]):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                where = [path.relative_to(folder), row.pop("stage"), "step", row.pop("step")]
                where += [row.pop(name) for name in ("task", "metric") if name in row]
                found |= {f"{' '.join(map(str, where))} {key}": row[key] for key in row if key not in CLOCKED}
    for path in sorted(folder.rglob("demo.json")):
        found |= {
            f"demo.json {key}": str(value) for key, value in json.loads(path.read_text()).items() if key not in CLOCKED
        }
    return found


def weights(folder: Path) -> dict[str, str]:
    """`DIRECTORY: TENSOR` -> dtype, shape and digest, of every model directory (not of checkpoints for going on)."""
    import torch
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if not (path.parent / "config.json").is_file():
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[f"{path.parent.relative_to(folder)}: {name}"] = (
                    f"{tensor.dtype} {list(tensor.shape)} {_digest(data)}"
                )
    return found


def _tail(log: Path, before: int) -> str:
    with log.open("rb") as file:
        file.seek(before)
        return " | ".join(file.read().decode(errors="replace").strip().splitlines()[-4:])


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(old: Mapping[str, Found], new: Mapping[str, Found]) -> dict[str, Any]:
    """`equal`, and for each case what was compared and the differences."""
    cases = {name: _compare_case(old[name], new[name]) for name in old}
    different = [name for name, case in cases.items() if case["differences"]]
    return {"equal": not different, "different": different, "cases": cases}


def _compare_case(old: Found, new: Found) -> dict[str, Any]:
    differences = [
        f"{side} failed: {found['error']}" for side, found in (("OLD", old), ("NEW", new)) if "error" in found
    ]
    if differences:
        return {"differences": differences}
    for kind in ("numbers", "weights", "captions"):
        differences += [f"{kind}: {text}" for text in _unequal(_texts(old[kind]), _texts(new[kind]))]
    losses = [float(value) for name, value in new["numbers"].items() if name.endswith(" loss") and value]
    counts = {kind: len(new[kind]) for kind in ("weights", "captions")}
    facts = {"steps": len(losses), "last_loss": losses[-1] if losses else None, **counts}
    return {**facts, "seconds": new["seconds"], "differences": differences}


def _texts(values: Mapping[Any, str]) -> dict[str, str]:
    return {str(name): value for name, value in values.items()}


def _unequal(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    if not old:
        return ["nothing to compare"]
    gone = [f"{name}: only in OLD" for name in old if name not in new]
    come = [f"{name}: only in NEW" for name in new if name not in old]
    return (
        [f"{name}: {old[name]!r} and {new[name]!r}" for name in old if name in new and old[name] != new[name]]
        + gone
        + come
    )


def table(report: Mapping[str, Any]) -> str:
    """One line for each case, and the first differences below it."""
    wide = "{:<30}{:>6}{:>21}{:>9}{:>10}{:>8}  {}".format
    lines = [wide("case", "steps", "last loss", "tensors", "captions", "seconds", f"{report['old']} = {report['new']}")]
    for name, case in report["cases"].items():
        differences = case["differences"]
        state = f"DIFFERENT ({len(differences)})" if differences else "equal"
        facts = [str(case.get(key) or "") for key in ("steps", "last_loss", "weights", "captions", "seconds")]
        lines += [wide(name, *facts, state), *(f"    {text}" for text in differences[:SHOWN])]
    num = len(report["different"])
    verdict = "all equal" if report["equal"] else f"{num} different: {', '.join(report['different'])}"
    return "\n".join([*lines, f"{len(report['cases'])} cases: {verdict}"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        raise SystemExit(worker(*map(Path, sys.argv[2:])))
    raise SystemExit(main())
