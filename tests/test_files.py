"""Files and directories are the old ones or the new ones, at every instant."""

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vlm import files
from vlm.errors import ConfigError, DataError, DiskError, TrainingError

OLD = {"config.json": "old config", "model.safetensors": "old weights", "left.json": "old only"}
NEW = {"config.json": "new config", "model.safetensors": "new weights", "extra.json": "new only"}

# Ends the process like SIGKILL at the n-th thing it does to the disk.
KILLED_AT = """
import os, sys
remaining = int(sys.argv[1])
WATCHED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.truncate", "shutil.rmtree",
           "ctypes.dlsym"}
def hook(event, arguments):
    global remaining
    writes = event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
    if event in WATCHED or writes:
        remaining -= 1
        if remaining < 0:
            os._exit(9)
sys.addaudithook(hook)
"""


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


def fill(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def killed_at(number: int, body: str, *arguments: object) -> int:
    """The exit code of a process that runs `body` and is ended at its n-th change of the disk."""
    code = KILLED_AT + textwrap.dedent(body)
    root = str(Path(files.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, str(number), *map(str, arguments)], env={**os.environ, "PYTHONPATH": root}
    ).returncode


PUBLISH = f"""
from pathlib import Path
from vlm import files
target = Path(sys.argv[2])
with files.publishing(target, keep=lambda name: name == "mine.txt") as folder:
    for name, text in {NEW!r}.items():
        (folder / name).write_text(text)
"""


def test_a_directory_is_the_old_or_the_new_one_at_every_kill(tmp_path: Path) -> None:
    seen = set()
    for number in range(200):
        target = tmp_path / str(number) / "model"
        fill(target, {**OLD, "mine.txt": "mine"})
        code = killed_at(number, PUBLISH, target)
        found = content(target)
        assert found.pop("mine.txt") == "mine"
        assert found in (OLD, NEW)
        seen.add("old" if found == OLD else "new")
        if code == 0:
            break
        # The next writer is not in the way of what the killed one left, and removes it.
        with files.publishing(target) as folder:
            fill(folder, NEW)
        assert content(target) == NEW and [p.name for p in target.parent.iterdir()] == ["model"]
    else:
        pytest.fail("never came to an end")
    assert number > 6 and seen == {"old", "new"}


def test_without_an_exchange_call_a_failed_rename_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swap", lambda a, b: False)
    target = tmp_path / "model"
    fill(target, OLD)
    with files.publishing(target) as folder:
        fill(folder, NEW)
    assert content(target) == NEW
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if Path(to) == target and self.name.endswith("-0"):
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DiskError, match="No space left"), files.publishing(target) as folder:
        fill(folder, OLD)
    assert content(target) == NEW


def test_a_directory_that_cannot_move_is_never_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    body = PUBLISH.replace("target = Path", "os.chdir(sys.argv[2]); target = Path")
    for number in range(200):
        fill(target, {**OLD, "mine.txt": "mine"})
        code = killed_at(number, body, target)
        found = content(target)
        assert found.pop("mine.txt") == "mine"
        assert found in (OLD, NEW) or "config.json" not in found
        if code == 0:
            break
    assert found == NEW and number > 6
    with files.publishing(target) as folder:  # removes the leftovers
        fill(folder, NEW)
    assert content(target) == NEW and sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_error_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(target, OLD)
    with pytest.raises(KeyboardInterrupt), files.publishing(target) as folder:
        fill(folder, NEW)
        raise KeyboardInterrupt
    assert content(target) == OLD and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, expected: int) -> None:
    previous = os.umask(umask)
    try:
        with files.publishing(tmp_path / "model") as folder:
            (folder / "secret").write_text("x")
            (folder / "secret").chmod(0o600)  # what safetensors and tempfile do
            (folder / "below").mkdir()
            (folder / "below" / "file").write_text("x")
        with files.publishing_file(tmp_path / "file") as partial:
            partial.chmod(0o600)
        files.write_text(tmp_path / "text", "x")
    finally:
        os.umask(previous)
    written = [*(p for p in (tmp_path / "model").rglob("*") if p.is_file()), tmp_path / "file", tmp_path / "text"]
    assert len(written) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {expected}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask


def test_a_directory_keeps_its_own_mode_and_the_users_files_theirs(tmp_path: Path) -> None:
    fill(tmp_path / "model", {**OLD, "mine.sh": "#!"})
    (tmp_path / "model").chmod(0o2770)
    (tmp_path / "model" / "mine.sh").chmod(0o750)
    (tmp_path / "model" / "logs").mkdir()
    (tmp_path / "model" / "logs" / "1").write_text("log")
    (tmp_path / "model" / "link").symlink_to("nowhere")
    with files.publishing(tmp_path / "model", keep=lambda name: name in ("mine.sh", "logs", "link")) as folder:
        fill(folder, NEW)
    model = tmp_path / "model"
    assert stat.S_IMODE(model.stat().st_mode) == 0o2770
    assert stat.S_IMODE((model / "mine.sh").stat().st_mode) == 0o750
    assert (model / "logs" / "1").read_text() == "log" and os.readlink(model / "link") == "nowhere"
    assert not (model / "left.json").exists()


def test_a_file_is_refused_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"), files.publishing(tmp_path / "file"):
        pass
    fill(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to("real")
    with files.publishing(tmp_path / "link") as folder:
        fill(folder, NEW)
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == NEW


def test_a_file_is_the_old_or_the_new_one_at_every_kill(tmp_path: Path) -> None:
    body = "from vlm import files; files.write_json(sys.argv[2], ['new'] * 1000)"
    target = tmp_path / "facts.json"
    target.write_text('["old"]')
    for number in range(20):
        code = killed_at(number, body, target)
        assert json.loads(target.read_text()) in (["old"], ["new"] * 1000)
        if code == 0:
            break
    assert code == 0 and number >= 3 and os.listdir(tmp_path) == ["facts.json"]


FULL = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from vlm import files
from vlm.errors import DiskError
try:
    exec(sys.argv[1])
except DiskError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a file's size as POSIX does")
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    def run(code: str) -> str:
        root = str(Path(files.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", FULL, code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "a.json").write_text("[1]")
    assert run("files.write_json('a.json', 'x' * 9999)") == (
        "cannot write a.json: File too large; make room or write to another place\n"
    )
    assert (tmp_path / "a.json").read_text() == "[1]" and os.listdir(tmp_path) == ["a.json"]
    (tmp_path / "j.jsonl").write_text('{"a": 1}\n')
    assert "j.jsonl: File too large" in run("files.Journal('j.jsonl').append([{'b': 'x' * 9999}])")
    assert (tmp_path / "j.jsonl").read_text() == '{"a": 1}\n'
    fill(tmp_path / "model", OLD)
    body = "with files.publishing('model') as f: (f / 'big').write_text('x' * 9999)"
    assert run(body) == "cannot write model: File too large; make room or write to another place\n"
    assert content(tmp_path / "model") == OLD


def test_a_torn_line_is_cut_before_the_next_is_written(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"id": "2 \xe2\x80\xa8"}\n{"id": "to')
    with files.Journal(path) as journal:
        assert [record["id"] for record in journal.records] == ["1", "2 \u2028"]
        journal.append([{"id": "3", "text": "\ud800"}])
    assert [record["id"] for record in files.read_lines(path)] == ["1", "2 \u2028", "3"]
    path.write_bytes(b'{"id": 1}\n\x00\x00\n')
    with pytest.raises(DataError, match="failures.jsonl:2: damaged line"):
        files.Journal(path)


def test_one_writer(tmp_path: Path) -> None:
    lock = files.locked(tmp_path / ".lock", TrainingError)
    with pytest.raises(TrainingError, match=f"{os.getpid()} on "):
        files.locked(tmp_path / ".lock", TrainingError)
    lock.close()
    files.locked(tmp_path / ".lock", TrainingError).close()
    with files.Journal(tmp_path / "j", lambda: ConfigError("busy")):
        with pytest.raises(ConfigError, match="busy"):
            files.Journal(tmp_path / "j", lambda: ConfigError("busy"))


def test_several_processes_write_one_file_in_the_same_moment(tmp_path: Path) -> None:
    """Another one publishes it while this one is writing: with one partial file they would take it from each other."""
    file = tmp_path / "a.json"
    other = f"from vlm import files; files.write_json({str(file)!r}, 'theirs', several=True)"
    with files.publishing_file(file, several=True) as partial:
        partial.write_text('"ours"')
        subprocess.run([sys.executable, "-c", other], check=True)
        assert json.loads(file.read_text()) == "theirs"
    assert json.loads(file.read_text()) == "ours" and [path.name for path in tmp_path.iterdir()] == ["a.json"]
