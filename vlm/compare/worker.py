"""One process of one run, and the server that forks such processes.

python -m vlm.compare.worker train|measure DIR/runs/.../spec.json    what a run does, by hand
python -m vlm.compare.worker serve                                   started by `vlm.compare.processes.Server`
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from vlm import children
from vlm.compare import runs

TICK_S = 0.05


def main(phase: str, path: Path) -> int:
    """Run one phase; errors that are meant for people are one line on stderr and exit code 2, as in `vlm`."""
    from vlm.children import endings

    try:
        with endings():
            spec = runs.read(path)
            if spec.encoder_class is not None:
                from vlm.registry import use

                use("vlm.encoders", spec.encoder_class)
            if phase == "train":
                from vlm.train.run import run as train

                train(spec.run, resume=True)
            else:
                from vlm.compare.measure import measure
                from vlm.eval.harness import evaluate

                measure(spec, evaluate)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def serve() -> None:
    """Fork processes as asked on stdin, one JSON object a line, and report their ends on stdout as `[name, code]`.

    `{"start": name, "phase": ..., "spec": path, "log": path, "environment": {...}, "threads": n or null}` starts one,
    `{"stop": [names]}` sends SIGTERM. At the end of stdin, which is the end of the comparison however it came, all that
    is left is killed: a run must not go on in a folder that the next start takes over.
    """
    # The comparison decides when to stop; a signal to the whole group must not end the runs before they have saved.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    # Imported once, for all. Nothing may be computed here: threads and CUDA contexts do not survive a fork. Not even a
    # library that asks whether there is a GPU may start CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import vlm.build.assembly
    import vlm.checkpoints.saving
    import vlm.compare.measure
    import vlm.eval.harness
    import vlm.train.run
    import vlm.train.stage  # noqa: F401

    started: dict[int, str] = {}
    partial = b""
    while True:
        if select.select([0], [], [], TICK_S)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                _handle(json.loads(line), started)
        _reap(started)
    for pid in started:
        os.kill(pid, signal.SIGKILL)
    for pid in started:
        os.waitpid(pid, 0)


def _handle(request: dict[str, Any], started: dict[int, str]) -> None:
    if "start" in request:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become(request, server)
        started[pid] = request["start"]
    for pid, name in started.items():
        if name in request.get("stop", ()):
            os.kill(pid, signal.SIGTERM)


def _reap(started: dict[int, str]) -> None:
    """Report the processes that ended."""
    for pid in list(started):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            os.write(1, json.dumps([started.pop(pid), os.waitstatus_to_exitcode(status)]).encode() + b"\n")


def _become(request: dict[str, Any], server: int) -> None:
    """Turn the fork into the process that was asked for; never returns."""
    code = 1
    try:
        children.die_with(server)
        descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        os.environ.update(request["environment"])
        # What a run of several devices starts its other processes with: Lightning repeats this process's command.
        sys.argv[1:] = [request["phase"], request["spec"]]
        if request["threads"] is not None:
            import torch

            torch.set_num_threads(request["threads"])
        code = main(request["phase"], Path(request["spec"]))
    except Exception:
        # As the interpreter would at the end of a script; a fork must not return into the server's loop.
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
