"""What the package sets before torch is loaded, against made-up machines; and that torch's OpenMP really reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm import threads

ROOT = Path(threads.__file__).parents[1]
PROC = "proc/self/cgroup"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"


def machine(root: Path, **files: str) -> Path:
    """A root with these files; `__` in a name is a slash."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({PROC: "0::/\n", f"{V2}/cpu.max": "150000 100000\n"}, [1.5]),
        ({PROC: "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, []),
        # The tightest may be a group around the own one.
        ({PROC: "0::/a/b\n", f"{V2}/a/b/cpu.max": "400000 100000", f"{V2}/a/cpu.max": "50000 50000"}, [4.0, 1.0]),
        # In a container: the host's path, of which only the top is mounted.
        ({PROC: "0::/docker/0123\n", f"{V2}/cpu.max": "300000 100000\n"}, [3.0]),
        (
            {PROC: "4:cpu,cpuacct:/x\n0::/x\n", f"{V1}/x/cpu.cfs_quota_us": "20", f"{V1}/x/cpu.cfs_period_us": "10"},
            [2.0],
        ),
        (
            {PROC: "4:cpu,cpuacct:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "10"},
            [],
        ),
        ({PROC: "1:cpu:/\n", "sys/fs/cgroup/cpu/cpu.max": "garbage"}, []),
        ({PROC: "no colon\n"}, []),
        ({}, []),
    ],
)
def test_quotas_of_both_kinds_of_control_groups(files: dict[str, str], expected: list[float], tmp_path: Path) -> None:
    assert sorted(set(threads.quotas(machine(tmp_path, **files)))) == sorted(expected)


def prepared(root: Path, **environment: str) -> dict[str, str]:
    """What `prepare` adds to an environment, in a process without torch."""
    code = (
        "import json, sys; from pathlib import Path; import vlm.threads as t; t.allowed = lambda: 8\n"
        "e = json.loads(sys.argv[2]); t.prepare(e, Path(sys.argv[1])); print(json.dumps(e))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(root), json.dumps(environment)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    after: dict[str, str] = json.loads(done.stdout)
    assert {name: after[name] for name in environment} == environment, "what the user has set stays"
    return {name: value for name, value in after.items() if name not in environment}


def test_threads_and_spin_are_set_unless_the_user_has(tmp_path: Path) -> None:
    free = machine(tmp_path / "free")
    tight = machine(tmp_path / "tight", **{PROC: "0::/\n", f"{V2}/cpu.max": "250000 100000\n"})
    spin = threads.SPIN
    assert prepared(free) == spin, "torch finds the number of cores itself"
    assert prepared(tight) == {**spin, "OMP_NUM_THREADS": "2"}
    assert prepared(tight, OMP_NUM_THREADS="7") == spin
    assert prepared(tight, MKL_NUM_THREADS="7") == spin
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        assert prepared(free, **{name: "ACTIVE"}) == {}
    # Four processes on 8 cores: 2 each; on 2.5 cores: 1 each.
    assert prepared(free, LOCAL_WORLD_SIZE="4")["OMP_NUM_THREADS"] == "2"
    assert prepared(tight, SLURM_NTASKS_PER_NODE="4")["OMP_NUM_THREADS"] == "1"


def test_the_package_sets_them_before_torch_reads_them() -> None:
    """libgomp itself says what it has read (OMP_DISPLAY_ENV), so this also holds the name of the variable."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *threads.SPIN_IS_SET_BY)
    bare = {name: value for name, value in os.environ.items() if name not in names}
    show = {**bare, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}

    def read(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=show).stderr

    # With torch loaded before us it is too late, and nothing is changed.
    plain = read(
        "import os, torch; before = dict(os.environ); import vlm; assert before == dict(os.environ), 'changed'"
    )
    if "GOMP_SPINCOUNT" not in plain:
        pytest.skip("this torch does not use libgomp")
    wanted = f"GOMP_SPINCOUNT = '{threads.SPIN['GOMP_SPINCOUNT']}'"
    assert wanted not in plain and "changed" not in plain
    assert wanted in read("import vlm, torch")
