"""`./run` sets up its environment once and never goes on after a failed set-up. Python and pip are played by shell."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent.parent / "run"
BASH = shutil.which("bash")

# `python -m venv [--clear] DIR` makes DIR/bin/python, which notes its arguments and fails if they hold $FAIL.
PYTHON = """#!/bin/sh
case "$*" in
-c*) exit 0 ;;
"-m venv --clear "*)
    mkdir -p "$4/bin"
    cat > "$4/bin/python" <<'END'
#!/bin/sh
echo "$*" >> "$LOG"
pwd >> "$LOG.pwd"
case "$*" in
*" --version") exit 0 ;;
*torch.__version__*) exit 1 ;;
*$FAIL*) exit 9 ;;
esac
END
    chmod +x "$4/bin/python"
    ;;
*) exit 8 ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the script beside a pyproject.toml, and a folder `bin` with nothing but what it may use."""
    if BASH is None:
        pytest.skip("no bash here")
    shutil.copy(RUN, tmp_path / "run")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "lightning.txt").write_text("lightning==9 --hash=sha256:00\n")
    (tmp_path / "bin").mkdir()
    for name in ("cat", "chmod", "cksum", "dirname", "mkdir", "readlink", "sed", "sh"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    return tmp_path


def run(
    project: Path, *words: str, fail: str = "nothing", cwd: Path = Path("/"), script: Path | None = None, **more: str
) -> tuple[int, str, list[str]]:
    """Exit code, stderr, and the calls of the environment's Python since the last time."""
    log = project / "log"
    log.unlink(missing_ok=True)
    env = {"PATH": str(project / "bin"), "LOG": str(log), "FAIL": fail, "HOME": os.environ.get("HOME", "/"), **more}
    command = [str(BASH), str(script or project / "run"), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=cwd)
    return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []


def add_python(project: Path) -> None:
    file = project / "bin" / "python3.11"
    file.write_text(PYTHON)
    file.chmod(0o755)


def test_without_python_it_says_what_to_install(project: Path) -> None:
    code, err, calls = run(project, "test")
    assert (code, calls) == (2, [])
    assert "error: no Python 3.11 or newer" in err


def test_it_sets_up_once_and_again_when_the_requirements_change(project: Path) -> None:
    add_python(project)
    code, err, calls = run(project, "test", "-x")
    assert code == 0, err
    assert "setting up" in err
    assert "pip install" in calls[-4] and calls[-4].endswith("torch==2.13.0")
    pinned = f"--require-hashes --no-deps --requirement {project}/requirements/lightning.txt"
    assert "pip install" in calls[-3] and calls[-3].endswith(pinned)  # before anything that would ask for lightning
    assert "pip install" in calls[-2] and calls[-2].endswith(f"--editable {project}[dev]")
    assert calls[-1] == "-m pytest -x"
    assert run(project, "test", "-k", "a b") == (0, "", ["-m pytest -k a b"])
    (project / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    assert any("--editable" in call for call in run(project, "setup")[2])
    (project / "requirements" / "lightning.txt").write_text("lightning==10 --hash=sha256:00\n")
    assert any("--require-hashes" in call for call in run(project, "setup")[2])


def test_paths_are_those_of_the_caller(project: Path, tmp_path: Path) -> None:
    """From another directory, through a link and with CDPATH set; a relative VLM_VENV and the caller's files too."""
    add_python(project)
    elsewhere, links = tmp_path / "else where", tmp_path / "links"
    (elsewhere / "more").mkdir(parents=True)
    (elsewhere / "test_mine.py").write_text("")
    links.mkdir()
    (links / "first").symlink_to("second")  # relative, and a link to a link
    (links / "second").symlink_to(project / "run")
    for script in (project / "run", links / "first"):
        for word in ("vlm", "demo"):
            code, err, _ = run(project, "setup", cwd=elsewhere, script=script, VLM_VENV="more/venv", CDPATH="/")
            assert code == 0, err
            command = elsewhere / "more" / "venv" / "bin" / "vlm"
            command.write_text('#!/bin/sh\necho "$*" >> "$LOG"\npwd >> "$LOG"\n')
            command.chmod(0o755)
            code, err, calls = run(project, word, "a", "b", cwd=elsewhere, script=script, VLM_VENV="more/venv")
            first = "a b" if word == "vlm" else "demo a b"
            assert (code, calls) == (0, [first, str(elsewhere)]), err
            assert not (project / ".venv").exists()
    code, err, calls = run(project, "test", "test_mine.py::test_a", "run", "-x", cwd=elsewhere, VLM_VENV="more/venv")
    assert (code, calls) == (0, [f"-m pytest {elsewhere}/test_mine.py::test_a run -x"]), err
    assert (project / "log.pwd").read_text().splitlines()[-1] == str(project)


@pytest.mark.parametrize("fail", ["torch==", "--require-hashes", "--editable"])
def test_a_set_up_that_fails_is_not_taken_for_done(project: Path, fail: str) -> None:
    add_python(project)
    for _ in range(2):
        code, _, calls = run(project, "test", fail=fail)
        assert code == 9
        assert fail in calls[-1]  # and no pytest after it
    assert run(project, "test")[2][-1] == "-m pytest -n 2 -m not slow"


def test_an_unknown_job_lists_the_known_ones(project: Path) -> None:
    code, err, _ = run(project, "tset")
    assert code == 2
    assert err.startswith("error: unknown job: tset\n") and "./run test" in err
