"""Exact search over a million vectors against FAISS: time of a batch and of one query, and the memory of each.

    python benchmarks/search.py
    python benchmarks/search.py --rows 100000 --rounds 9
    python benchmarks/search.py --indexes --rows 100000

Normalised float16 vectors of width 1152 in one mapped file of the page cache, 100 queries of random directions. Every
contender is a process of its own that holds its vectors; they are asked in turn, round by round, so that whatever else
the machine does falls on all of them. FAISS gets the same values: `IndexFlatIP` in float32 (twice the bytes) and
`IndexScalarQuantizer` in float16. FAISS 1.15 takes a matrix product only for more than 128,000 queries, older versions
for more than 20 (`distance_compute_blas_threshold`): both ways are measured. CPU seconds tell more than wall seconds on
a busy machine. Memory is the peak of the process (`VmHWM`), mapped vectors included: all of it (`peak`), and what came
after interpreter and torch (`own`), both over the bytes of the float16 vectors.

`--indexes` instead builds each index over clustered vectors: recall against time, at each effort.

The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlm import threads

threads.prepare()

import torch  # noqa: E402 - after the threads were decided
from torch import Tensor  # noqa: E402

from vlm.siglip.search import index  # noqa: E402
from vlm.siglip.search.exact import Exact  # noqa: E402
from vlm.words import columns  # noqa: E402

CONTENDERS = {
    "vlm float16": "exact search of this library",
    "faiss flat": "IndexFlatIP, float32, as it comes",
    "faiss flat BLAS": "the same one, with distance_compute_blas_threshold = 20",
    "faiss float16": "IndexScalarQuantizer QT_fp16",
}
CASES = {"batch": 100, "single": 1}
BLOCK, BLAS = 10_000, 20


def directions(rows: int, width: int, seed: int) -> Tensor:
    """Normalised float32[rows, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def mapped(path: Path, rows: int, width: int) -> Tensor:
    """The vectors, float16[rows, width] over the file."""
    flat: Tensor = torch.from_file(str(path), shared=False, size=rows * width, dtype=torch.float16)
    return flat.view(rows, width)


def write(path: Path, rows: int, width: int) -> None:
    """Write the vectors, block by block."""
    with path.open("wb") as file:
        for start in range(0, rows, BLOCK):
            directions(min(BLOCK, rows - start), width, 1 + start).half().numpy().tofile(file)


# --- a contender ------------------------------------------------------------------------------------------------------


def searcher(name: str, stored: Tensor) -> Callable[[Tensor, int, bool], Tensor]:
    """queries, k, whether FAISS takes a matrix product -> rows int64[Q, k]."""
    if name == "vlm float16":
        exact = Exact([stored])
        return lambda queries, k, blas: exact.top(queries, k).rows
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    width = stored.shape[1]
    if name == "faiss float16":
        made = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        made.train(stored[:1].float().numpy())
    else:
        made = faiss.IndexFlatIP(width)
    for block in stored.split(BLOCK):
        made.add(block.float().numpy())
    as_it_comes = faiss.cvar.distance_compute_blas_threshold

    def search(queries: Tensor, k: int, blas: bool) -> Tensor:
        faiss.cvar.distance_compute_blas_threshold = BLAS if blas else as_it_comes
        return torch.from_numpy(made.search(queries.numpy(), k)[1])

    return search


def work(name: str, path: Path, rows: int, width: int) -> None:
    """Answer each line of stdin, a case, with its time and rows; the first line says how the start went."""
    before, began, used = peak(), time.perf_counter(), time.process_time()
    search = searcher(name, mapped(path, rows, width))
    queries = directions(max(CASES.values()), width, 0)
    start = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used, "before": before}
    print(json.dumps(start), flush=True)
    for line in sys.stdin:
        case, _, way = line.strip().partition(" ")
        asked = queries[: CASES[case]]
        began, used = time.perf_counter(), time.process_time()
        found = search(asked, 10, way == "BLAS")
        answer = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used, "rows": found.tolist()}
        print(json.dumps({**answer, "peak": peak()}), flush=True)


def peak() -> int:
    """The most bytes that this process has held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# --- all of them in turn ----------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Ask every contender, round by round."""
    with ExitStack() as stack:
        holders = dict.fromkeys(name.removesuffix(" BLAS") for name in args.only)
        processes = {name: stack.enter_context(contender(name, args, path)) for name in holders}
        starts = {name: json.loads(process.stdout.readline()) for name, process in processes.items()}
        asked = {name: processes[name.removesuffix(" BLAS")] for name in args.only}
        answers: dict[str, dict[str, list[dict[str, Any]]]] = {name: {case: [] for case in CASES} for name in asked}
        for turn in range(args.rounds + 1):
            for case in CASES:
                for name, process in asked.items():
                    process.stdin.write(f"{case} BLAS\n" if name.endswith(" BLAS") else f"{case}\n")
                    process.stdin.flush()
                    answer = json.loads(process.stdout.readline())
                    answers[name][case] += [answer] if turn else []  # the first warms up
            print(f"round {turn} of {args.rounds}", file=sys.stderr, flush=True)
    return {name: summary(answers[name], answers[args.only[0]], starts[name.removesuffix(" BLAS")]) for name in asked}


def contender(name: str, args: argparse.Namespace, path: Path) -> subprocess.Popen[str]:
    """Start a process that holds the vectors."""
    print(f"{name}: {CONTENDERS[name]}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--worker", name, str(path), f"--rows={args.rows}", f"--width={args.width}"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def summary(own: dict[str, list[dict[str, Any]]], first: dict[str, list[dict[str, Any]]], start: Any) -> dict[str, Any]:
    """Medians of a contender, its peak, and the share of rows in the place where the first contender has them."""
    found: dict[str, Any] = {"start_seconds": round(start["seconds"], 2), "peak_bytes": own["single"][-1]["peak"]}
    found["own_bytes"] = found["peak_bytes"] - start["before"]
    for case, answers in own.items():
        pairs = [
            a == b
            for mine, theirs in zip(answers[-1]["rows"], first[case][-1]["rows"], strict=True)
            for a, b in zip(mine, theirs, strict=True)
        ]
        found[case] = {
            "seconds": statistics.median(answer["seconds"] for answer in answers),
            "seconds_best": min(answer["seconds"] for answer in answers),
            "cpu": statistics.median(answer["cpu"] for answer in answers),
            "ratio": statistics.median(
                answer["seconds"] / ours["seconds"] for answer, ours in zip(answers, first[case], strict=True)
            ),
            "same_rows": sum(pairs) / len(pairs),
        }
    return found


def table(results: dict[str, Any], bytes_of_vectors: int) -> str:
    """The results in columns."""
    heads = [f"{case} {what}" for case in CASES for what in ("s", "best", "CPU s", "ratio")]
    rows = [["", *heads, "same rows", "peak", "own"]]
    for name, found in results.items():
        cells = [name]
        for case in CASES:
            one = found[case]
            cells += [f"{one[key]:.3f}" for key in ("seconds", "seconds_best", "cpu")] + [f"{one['ratio']:.2f}"]
        cells.append(f"{min(found[case]['same_rows'] for case in CASES):.4f}")
        rows.append([*cells, *(f"{found[key] / bytes_of_vectors:.3f}x" for key in ("peak_bytes", "own_bytes"))])
    return columns(rows)


def clustered(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Vectors in clusters of 50, as float16, and 500 queries near some of the centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(1, rows // 50), width, generator=generator)
    stored = torch.empty(rows, width, dtype=torch.float16)
    for start in range(0, rows, BLOCK):
        which = torch.randint(len(centres), (min(BLOCK, rows - start),), generator=generator)
        near = centres[which] + torch.randn(len(which), width, generator=generator)
        stored[start : start + len(which)] = torch.nn.functional.normalize(near, dim=1)
    asked = centres[torch.randint(len(centres), (500,), generator=generator)]
    asked = asked + torch.randn(500, width, generator=generator)
    return stored, torch.nn.functional.normalize(asked, dim=1)


def indexes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Build each index; what was told while it was, and its recall for queries that it does not hold."""
    stored, asked = clustered(args.rows, args.width)
    exact = Exact([stored])
    truth = exact.top(asked, 10)
    for kind, engine in (("flat", "faiss"), ("ivf", "faiss"), ("hnsw", "faiss"), ("hnsw", "usearch")):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            said: list[str] = []
            made = index.build(Path(folder), kind, engine, exact, [str(row) for row in range(args.rows)], said.append)
            print("\n".join(said), file=sys.stderr, flush=True)
            kept = {key: made.manifest[key] for key in ("kind", "engine", "settings", "seconds", "effort", "recall")}
            size = sum(file.stat().st_size for file in Path(folder).rglob("index.*"))
            yield {**kept, "bytes": size, "recall_of_others": index.recall(made.top(asked, 10), truth), "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=list(CONTENDERS), help="again for more; default: all")
    parser.add_argument("--folder", type=Path, help="for the file of vectors, 2.3 GB for a million of them")
    parser.add_argument("--indexes", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only or list(CONTENDERS)
    if args.worker:
        work(args.worker[0], Path(args.worker[1]), args.rows, args.width)
        return
    about = {"rows": args.rows, "width": args.width, "threads": torch.get_num_threads(), "torch": torch.__version__}
    about |= {"capability": torch.backends.cpu.get_cpu_capability()}
    if args.indexes:
        print(json.dumps({**about, "indexes": list(indexes(args))}, indent=2))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "vectors.f16"
        write(path, args.rows, args.width)
        results = compare(args, path)
    print(table(results, 2 * args.rows * args.width), file=sys.stderr)
    print(json.dumps({**about, "results": results}, indent=2))


if __name__ == "__main__":
    main()
