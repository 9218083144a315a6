"""`vlm embed`: a collection into vectors, again and again, killed and resumed, refused where it would mix spaces."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import picture
from test_collection import shard
from test_zero_shot import write
from torch import Tensor

from vlm.cli import main
from vlm.siglip import VectorStore, encode_texts, load
from vlm.siglip import embedding as embedding_module

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write(folder, "siglip")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(folder: str, *numbers: int) -> None:
    Path(folder).mkdir(exist_ok=True)
    for number in numbers:
        picture(number, (30 + number % 7, 25)).save(f"{folder}/{number:03d}.png")


def embed(model: Path, *words: Any) -> int:
    try:
        return main(["embed", "-m", str(model), *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)


def stored(folder: str = "V") -> dict[str, Tensor]:
    store = VectorStore.open(folder)
    rows = torch.cat(store.shards) if store.shards else torch.zeros(0, store.size)
    return dict(zip(store.ids, rows, strict=True))


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def alone(folder: Path, model: Path) -> Tensor:
    """The vectors of all pictures of a folder by transformers' own model, with the processor's pixels."""
    from PIL import Image
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(model, trust_remote_code=False).eval()
    images = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]
    with torch.no_grad():
        found = theirs.get_image_features(**load(model)[1].images(images)).pooler_output
    return torch.nn.functional.normalize(found, dim=-1)


# --- what is embedded -------------------------------------------------------------------------------------------------


def test_a_folder_becomes_the_vectors_of_transformers(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures("p", *range(7))
    assert embed(model, "p", "--out", "V", "--batch-size", 3, "--json") == 0
    summary = told(capsys)
    assert (summary["added"], summary["rows"], summary["size"]) == (7, 7, load(model)[0].embedding_size)
    found = stored()
    assert list(found) == [f"p/{n:03d}.png" for n in range(7)]
    assert (torch.stack(list(found.values())) - alone(here / "p", model)).abs().max() < 1e-5
    row = VectorStore.open("V").rows[3]
    assert row["image"] == {"path": str(here / "p/003.png")} and row["source"] == "p"


def test_float16_is_the_same_rounded(here: Path, model: Path) -> None:
    pictures("p", 0, 1)
    assert embed(model, "p", "--out", "V") == embed(model, "p", "--out", "H", "--dtype", "float16") == 0
    whole, half = stored(), stored("H")
    assert all(torch.equal(half[name], whole[name].half()) for name in whole)


def test_shards_json_lines_and_stdin_give_the_vectors_of_the_files(
    here: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures("p", 0, 1, 2)
    data = {f"{n}.png": Path(f"p/00{n}.png").read_bytes() for n in range(3)}
    shard(here / "s.tar", {**data, "2.json": b'{"colour": "red"}'})
    Path("x.jsonl").write_text("".join(json.dumps({"image": f"p/00{n}.png", "id": f"n{n}"}) + "\n" for n in range(3)))
    for out, source in (("F", "p"), ("T", "s.tar"), ("J", "x.jsonl")):
        assert embed(model, source, "--out", out) == 0
    listed = b"p/000.png\np/001.png\np/002.png\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    assert embed(model, "-", "--out", "S") == 0
    wanted = torch.stack(list(stored("F").values()))
    for out in "TJS":
        assert torch.equal(torch.stack(list(stored(out).values())), wanted), out
    assert list(stored("T")) == ["s.tar/0.png", "s.tar/1.png", "s.tar/2.png"] and list(stored("J")) == [
        "n0",
        "n1",
        "n2",
    ]
    assert VectorStore.open("T").info[2] == {"colour": "red"}


def test_texts_of_a_file_and_of_a_column(here: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["red cat", "green dog", "cat " * 60]
    Path("q.txt").write_text("".join(text + "\n" for text in texts))
    Path("x.jsonl").write_text("".join(json.dumps({"caption": text, "n": n}) + "\n" for n, text in enumerate(texts)))
    assert embed(model, "--text", "q.txt", "--out", "Q", "--json") == 0
    assert told(capsys)["cut"] == ["q.txt:3"]
    assert embed(model, "x.jsonl", "--text", "caption", "--out", "C") == 0
    assert "1 texts longer than the model reads, cut: x.jsonl:3" in capsys.readouterr().out
    wanted = encode_texts(*load(model), texts).vectors
    for out, ids in (("Q", [f"q.txt:{n}" for n in (1, 2, 3)]), ("C", [f"x.jsonl:{n}" for n in (1, 2, 3)])):
        found = stored(out)
        assert list(found) == ids and torch.equal(torch.stack(list(found.values())), wanted)
    store = VectorStore.open("C")
    assert store.kind == "texts" and store.rows[1]["text"] == "green dog" and store.info[1] == {"n": 1}


def test_bad_pictures_are_told_and_the_rest_is_there(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures("p", 0, 1, 2)
    Path("p/001.png").write_bytes(Path("p/001.png").read_bytes()[:200])
    Path("p/003.png").write_bytes(b"")
    assert embed(model, "p", "gone.png", "--out", "V", "--json") == 3
    out, err = capsys.readouterr()
    summary = json.loads(out)
    codes = {problem["id"]: problem["code"] for problem in summary["problems"]}
    assert codes == {"gone.png": "missing", "p/001.png": "truncated", "p/003.png": "empty"}
    assert "error: p/003.png: empty: empty; fetch or export it again" in err
    assert list(stored()) == ["p/000.png", "p/002.png"]
    pictures("p", 1)
    assert embed(model, "p", "--out", "V") == 3
    assert list(stored()) == ["p/000.png", "p/002.png", "p/001.png"]


def test_nothing_usable_is_refused_and_makes_no_folder(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("e.jsonl").write_text("")
    Path("empty").mkdir()
    for words, said in (
        (["empty"], "error: empty: no-images"),
        (["gone"], "error: gone: missing"),
        ([], "error: nothing to embed: give pictures as SOURCE"),
        (["e.jsonl"], "error: nothing to embed: the sources are empty"),
        (["--text", "gone.txt"], "gone.txt: cannot be read"),
    ):
        assert embed(model, *words, "--out", "V") == 2
        assert said in capsys.readouterr().err
    assert not Path("V").exists()


# --- again and again --------------------------------------------------------------------------------------------------


def test_only_what_is_new_or_changed_is_embedded(here: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures("p", 0, 1, 2, 3)
    assert embed(model, "p", "--out", "V") == 0
    before = stored()
    capsys.readouterr()
    picture(9, (30, 40)).save("p/001.png")
    pictures("p", 4)
    Path("p/003.png").unlink()
    assert embed(model, "p", "--out", "V", "--json") == 0
    summary = told(capsys)
    assert (summary["added"], summary["changed"], summary["unchanged"]) == (1, 1, 2)
    assert summary["gone"] == ["p/003.png"] and summary["dropped"] == []
    now = stored()
    assert list(now) == ["p/000.png", "p/002.png", "p/003.png", "p/001.png", "p/004.png"]
    assert torch.equal(now["p/000.png"], before["p/000.png"]) and not torch.equal(now["p/001.png"], before["p/001.png"])
    assert embed(model, "p", "--out", "V", "--prune", "--json") == 0
    assert told(capsys)["dropped"] == ["p/003.png"]
    assert list(stored()) == ["p/000.png", "p/002.png", "p/001.png", "p/004.png"]


def test_pruning_leaves_other_sources_and_what_cannot_be_seen(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures("p", 0, 1)
    pictures("q", 2, 3)
    assert embed(model, "p", "q", "--out", "V") == 0
    Path("p/000.png").unlink()
    shutil.move("q", "away")
    capsys.readouterr()
    assert embed(model, "p", "q", "--out", "V", "--prune") == 3
    assert "3 are gone from these sources, not dropped because a source could not be read" in capsys.readouterr().out
    assert len(stored()) == 4
    assert embed(model, "p", "--out", "V", "--prune") == 0
    assert list(stored()) == ["p/001.png", "q/002.png", "q/003.png"], "q was not asked about"


def test_a_changed_picture_that_is_broken_keeps_its_vector_and_is_told(
    here: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures("p", 0, 1)
    assert embed(model, "p", "--out", "V") == 0
    before = stored()
    Path("p/001.png").write_bytes(b"broken")
    for _ in range(2):
        assert embed(model, "p", "--out", "V") == 3
        assert "the vector of its earlier content is kept" in capsys.readouterr().err
    assert torch.equal(stored()["p/001.png"], before["p/001.png"])
    assert sum("bad" in json.loads(line) for line in Path("V/rows.jsonl").read_text().splitlines()) == 1


def test_metadata_that_changes_is_taken_without_a_new_vector(here: Path, model: Path) -> None:
    pictures("p", 0)
    for colour in ("red", "blue"):
        Path("x.jsonl").write_text(json.dumps({"image": "p/000.png", "colour": colour}) + "\n")
        assert embed(model, "x.jsonl", "--out", "V") == 0
    store = VectorStore.open("V")
    assert store.info == [{"colour": "blue"}] and [len(part) for part in store.shards] == [1]
    assert os.path.getsize("V/vectors-00000.safetensors") == 4096 + store.size * 4


def test_another_model_is_refused_with_the_difference(
    here: Path, model: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures("p", 0)
    assert embed(model, "p", "--out", "V") == 0
    other = tmp_path_factory.mktemp("other")
    write(other, "siglip2_naflex")
    before = Path("V/rows.jsonl").read_bytes()
    assert embed(other, "p", "--out", "V") == 2
    err = capsys.readouterr().err
    assert "V: vectors of another model are another space" in err and "other weights of the model (weights)" in err
    assert embed(model, "p", "--out", "V", "--model-dtype", "bfloat16") == 2
    assert Path("V/rows.jsonl").read_bytes() == before


# --- kills ------------------------------------------------------------------------------------------------------------


def test_a_run_that_stops_after_any_batch_goes_on_as_if_it_had_not(
    here: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad pictures among them: they must not move the others into other batches."""
    pictures("p", *range(11))
    for number in (1, 5, 6):
        Path(f"p/{number:03d}.png").write_bytes(b"broken")
    words = ("p", "--batch-size", 3, "--out")
    assert embed(model, *words, "whole") == 3
    whole = {path.name: path.read_bytes() for path in Path("whole").glob("*.safetensors")}
    monkeypatch.setattr(embedding_module, "COMMIT_S", 0.0)
    take = embedding_module._take
    for last in range(1, 4):
        left = [last]

        def stopping(*args: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            take(*args)

        monkeypatch.setattr(embedding_module, "_take", stopping)
        assert embed(model, *words, f"V{last}") == 130
        assert len(stored(f"V{last}")) < 8
        monkeypatch.setattr(embedding_module, "_take", take)
        assert embed(model, *words, f"V{last}") == 3
        assert {path.name: path.read_bytes() for path in Path(f"V{last}").glob("*.safetensors")} == whole, last
        assert list(stored(f"V{last}")) == list(stored("whole"))


@pytest.mark.slow
def test_five_kills_at_random_moments_and_the_same_vectors(here: Path, model: Path) -> None:
    pictures("p", *range(150))
    for number in (3, 40, 41, 90):
        Path(f"p/{number:03d}.png").write_bytes(b"broken")
    words = [sys.executable, "-m", "vlm", "embed", "p", "-m", str(model), "--batch-size", "4"]
    code = "from vlm.siglip import embedding\nembedding.COMMIT_S = 0.0\nimport runpy, sys\n"
    code += f"sys.argv = {['vlm', *words[3:], '--out', 'V']!r}\nrunpy.run_module('vlm', run_name='__main__')"
    slow = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([*words, "--out", "whole"], env=environment, capture_output=True).returncode == 3
    chance = random.Random(0)
    kills = 0
    while kills < 5:
        running = subprocess.Popen(slow, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows, goal = 0, _rows() + chance.randrange(1, 25)
        while running.poll() is None and rows < goal:
            time.sleep(0.001)
            rows = _rows()
        assert running.poll() is None, "it ended before it was killed; take more pictures"
        time.sleep(chance.random() * 0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        kills += 1
    assert subprocess.run(slow, env=environment, capture_output=True).returncode == 3
    files = [sorted(Path(out).glob("*.safetensors")) for out in ("whole", "V")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert list(stored("whole")) == list(stored("V")) and len(stored("V")) == 146


def _rows() -> int:
    path = Path("V/rows.jsonl")
    return path.read_bytes().count(b'{"row"') if path.exists() else 0
