"""What people give a command to work through: files, folders, JSONL, tar shards, a list on stdin."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.collection import Entry, entries_of, gathered, lines_of
from vlm.data.problems import Problem
from vlm.errors import DataError, ImageError
from vlm.images.load import FilePart, load_image


def picture(seed: int = 0, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", (8, 6), random.Random(seed).randbytes(144)).save(data, kind)
    return data.getvalue()


def write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def shard(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def found(*sources: str | Path, **how: object) -> tuple[list[str], list[str]]:
    """Ids, and the problems as they are told."""
    entries, problems = gathered(entries_of(list(map(str, sources)), **how))  # type: ignore[arg-type]
    return [entry.id for entry in entries], list(map(str, problems))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- files and folders ------------------------------------------------------------------------------------------------


def test_a_folder_gives_every_picture_in_the_order_of_names(here: Path) -> None:
    write(here, "p/b.png", "p/a/z.JPG", "p/a/é ö.webp", "p/c.heic", "p/.hidden.png", "p/.git/x.png", "p/__MACOSX/y.png")
    (here / "p/notes.txt").write_text("no picture")
    (here / "p/none").write_text("no suffix, no picture")
    write(here, "p/bare")
    assert found("p") == (["p/a/z.JPG", "p/a/é ö.webp", "p/b.png", "p/bare", "p/c.heic"], [])
    assert found("./p/") == found("p"), "two spellings of a folder are one"


def test_links_to_folders_are_followed_once_and_circles_end(here: Path) -> None:
    write(here, "p/a/1.png", "outside/2.png")
    os.symlink(here / "p", here / "p/a/around")
    os.symlink("a", here / "p/inside")
    os.symlink(here / "outside", here / "p/b")
    os.symlink(here / "outside", here / "p/c")
    os.symlink(here / "nowhere.png", here / "p/gone.png")
    ids, problems = found("p")
    assert ids == ["p/a/1.png", "p/b/2.png", "p/gone.png"] and problems == []
    os.symlink(here / "p", here / "q")
    assert found("q")[0][0] == "q/a/1.png", "a link that was given is followed"


def test_what_is_not_there_or_comes_twice_is_a_problem_and_the_rest_goes_on(here: Path) -> None:
    write(here, "p/a.png", "b.png")
    (here / "empty").mkdir()
    ids, problems = found("p", "gone.png", "p/a.png", "empty", "b.png")
    assert ids == ["p/a.png", "b.png"]
    assert [line.partition(": ")[::2] for line in problems] == [
        ("gone.png", "missing: no such file or folder"),
        ("p/a.png", "duplicate-id: id 'p/a.png' is that of p/a.png already; give each its own, or each source once"),
        ("empty", "no-images: no picture below this folder; JSONL files and tar shards in it are given by name"),
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo") or os.geteuid() == 0, reason="needs a user whom a mode keeps out")
def test_a_folder_that_cannot_be_listed_is_told(here: Path) -> None:
    write(here, "p/a.png", "p/shut/b.png")
    (here / "p/shut").chmod(0)
    try:
        assert found("p") == (["p/a.png"], ["p/shut: unreadable: the folder cannot be listed: Permission denied"])
    finally:
        (here / "p/shut").chmod(0o755)


def test_a_pipe_named_like_a_picture_never_waits(here: Path) -> None:
    (here / "p").mkdir()
    os.mkfifo(here / "p/x.png")
    os.mkfifo(here / "p/bare")
    (entry,) = gathered(entries_of(["p"]))[0]
    with pytest.raises(ImageError) as raised:
        load_image(entry.image)
    assert raised.value.code == "not-regular"


def test_a_name_that_is_not_utf_8_comes_back_as_it_was(here: Path) -> None:
    (here / "p").mkdir()
    name = os.fsdecode(b"p/\xff.png")
    (here / name).write_bytes(picture())
    assert found("p")[0] == [name]
    assert json.loads(json.dumps(name)) == name


# --- JSONL ------------------------------------------------------------------------------------------------------------


def lines(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_json_lines_give_id_pictures_and_metadata(here: Path) -> None:
    write(here, "d/i/1.png", "d/i/2.png", "d/i/3.png")
    lines(
        here / "d/x.jsonl",
        {"image": "i/1.png", "colour": "red", "n": 3},
        {"id": 7, "images": ["i/2.png", "i/3.png"], "thumbnail": "t.jpg"},
    )
    one, two, three = gathered(entries_of(["d/x.jsonl"]))[0]
    assert (one.id, one.info) == ("d/i/1.png", {"colour": "red", "n": 3})
    assert [two.id, three.id] == ["7#1", "7#2"] and two.info == {"thumbnail": "t.jpg"}
    assert [entry.image for entry in (one, two, three)] == [here / f"d/i/{n}.png" for n in (1, 2, 3)]
    (_, both), _ = gathered(entries_of(["d/x.jsonl"], split=False))
    assert both.id == "7" and len(both.images) == 2


def test_paths_of_json_lines_never_lead_outside(here: Path) -> None:
    write(here, "d/in.png", "secret.png", "root/in.png")
    os.symlink(here / "secret.png", here / "d/link.png")
    lines(here / "d/x.jsonl", *({"image": name} for name in ("../secret.png", str(here / "secret.png"), "link.png")))
    ids, problems = found("d/x.jsonl")
    assert ids == [] and [line.split(": ")[1] for line in problems] == ["outside-root"] * 3
    lines(here / "d/y.jsonl", {"image": "in.png"})
    assert found("d/y.jsonl", image_root="root")[0] == ["root/in.png"]


def test_every_bad_line_is_told_with_its_number(here: Path) -> None:
    write(here, "a.png")
    lines(here / "x.jsonl", {"image": "a.png"}, "{broken", {"image": "b.png"}, {"caption": "x"}, {"image": "a.png"}, [])
    ids, problems = found("x.jsonl")
    assert ids == ["a.png"]
    assert [":".join(line.split(":")[:3]) for line in problems] == [
        "x.jsonl:2: not-json",
        "x.jsonl:3: missing-image",
        "x.jsonl:4: missing-key",
        "x.jsonl:5: duplicate-id",
        "x.jsonl:6: not-an-object",
    ]
    assert "id 'a.png' is that of x.jsonl:1" in problems[3]


def test_a_file_that_is_no_jsonl_says_what_it_is(here: Path) -> None:
    (here / "x.jsonl").write_bytes(b"PAR1" + bytes(100))
    ids, problems = found("x.jsonl", "gone.jsonl")
    assert ids == [] and "a Parquet file" in problems[0] and "cannot read the annotations" in problems[1]


def test_texts_of_a_column(here: Path) -> None:
    write(here, "a.png")
    lines(
        here / "x.jsonl",
        {"image": "a.png", "caption": "One", "n": 1},
        {"image": "gone.png", "caption": ["two", "three"], "id": "c"},
        {"image": "a.png"},
    )
    entries, problems = gathered(entries_of(["x.jsonl"], text="caption"))
    assert [(entry.id, entry.text) for entry in entries] == [("x.jsonl:1", "One"), ("c#1", "two"), ("c#2", "three")]
    assert entries[0].image == here / "a.png" and entries[1].image is None and entries[0].info == {"n": 1}
    assert list(map(str, problems)) == ["x.jsonl:3: missing-key: no 'caption'; there are no other keys"]
    assert [line.split(": ")[1] for line in found("a.png", ".", text="caption")[1]] == ["no-text", "no-text"]


def test_lines_of_a_text_file(here: Path) -> None:
    (here / "q.txt").write_bytes("a red star\r\n\n ein großer Kreis\nU+2028:\u2028stays\n".encode() + b"\xff\n")
    entries, problems = gathered(lines_of("q.txt"))
    assert [(entry.id, entry.text) for entry in entries] == [
        ("q.txt:1", "a red star"),
        ("q.txt:3", " ein großer Kreis"),
        ("q.txt:4", "U+2028:\u2028stays"),
    ]
    assert str(problems[0]).startswith("q.txt:5: not-utf-8")
    with pytest.raises(DataError, match="gone.txt"):
        list(lines_of("gone.txt"))


# --- stdin ------------------------------------------------------------------------------------------------------------


def test_stdin_gives_paths_and_json_lines(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here, "a b.png", "c.png")
    data = b'a b.png\r\n\n{"image": "c.png", "id": "see"}\n./a b.png\n{"image": "../x.png"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    ids, problems = found("-")
    assert ids == ["a b.png", "see"]
    assert [line.split(": ")[:2] for line in problems] == [["stdin:4", "duplicate-id"], ["stdin:5", "outside-root"]]


# --- tar shards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_shard_gives_samples_as_webdataset_lays_them_out(here: Path, format: int) -> None:
    long = "long/" + "n" * (90 if format == tarfile.USTAR_FORMAT else 180)
    shard(
        here / "s.tar",
        {
            "./d/000.jpg": picture(1, "JPEG"),
            "./d/000.txt": b"first",
            "./d/000.json": b'{"w": 8, "id": "own"}',
            "d/001.png": picture(2),
            "d/001.cls": b"4\n",
            "d/002.left.png": picture(3),
            "d/002.right.png": picture(4),
            "d/._003.png": b"",
            f"{long}.png": picture(5),
        },
        format,
    )
    entries, problems = gathered(entries_of(["s.tar"]))
    assert problems == []
    assert [entry.id for entry in entries] == [
        "own",
        "s.tar/d/001.png",
        "s.tar/d/002#1",
        "s.tar/d/002#2",
        f"s.tar/{long}.png",
    ]
    assert entries[0].info == {"w": 8, "txt": "first"} and entries[1].info == {"cls": "4"}
    for entry, seed in zip(entries[1:], (2, 3, 4, 5), strict=True):
        assert load_image(entry.image).tobytes() == load_image(picture(seed)).tobytes()
    texts, _ = gathered(entries_of(["s.tar"], text="txt"))
    assert [(entry.id, entry.text) for entry in texts] == [("own", "first")]


def test_a_shard_that_is_cut_anywhere_says_so_and_gives_what_comes_before(here: Path) -> None:
    whole = shard(
        here / "w.tar",
        {f"{n}.{kind}": picture(n) if kind == "png" else b"t" for n in range(3) for kind in ("png", "txt")},
    )
    data = whole.read_bytes()
    last = 0
    ends = [
        part.offset + part.size
        for entry in gathered(entries_of(["w.tar"]))[0]
        if isinstance(part := entry.image, FilePart)
    ]
    mark = -(-ends[-1] // 512) * 512 + 1024  # behind the last picture: a header and a block of text
    for cut in range(0, mark + 512, 256):
        (here / "c.tar").write_bytes(data[:cut])
        entries, problems = gathered(entries_of(["c.tar"]))
        assert len(problems) == 1 and problems[0].code in ("truncated", "corrupt", "unreadable"), cut
        assert last <= len(entries) <= 3
        last = len(entries)
        for entry in entries:
            assert entry.info == {"txt": "t"} and load_image(entry.image).size == (8, 6)
    assert last == 2, "the last sample cannot be known to be whole without the end mark"


def test_a_damaged_header_inside_a_shard_is_no_quiet_end(here: Path) -> None:
    path = shard(here / "s.tar", {f"{n}.png": picture(n) for n in range(4)})
    parts = [entry.image for entry in gathered(entries_of(["s.tar"]))[0]]
    data = bytearray(path.read_bytes())
    assert isinstance(parts[2], FilePart)
    data[parts[2].offset - 300] ^= 0xFF
    path.write_bytes(data)
    entries, problems = gathered(entries_of(["s.tar"]))
    assert [entry.id for entry in entries] == ["s.tar/0.png"] and problems[0].code == "corrupt"
    assert "sample '1' and what follows are lost" in str(problems[0])


def test_compressed_archives_and_bad_members_are_told(here: Path) -> None:
    (here / "s.tar.gz").write_bytes(b"\x1f\x8b")
    shard(
        here / "m.tar",
        {"0.png": picture(), "0.json": b"[1]", "1.txt": b"alone", "2.png": picture(), "0.jpg": picture()},
    )
    ids, problems = found("s.tar.gz", "m.tar", "gone.tar")
    assert ids == ["m.tar/0.png", "m.tar/2.png", "m.tar/0.jpg"]
    told = [line.split(": ")[:2] for line in problems]
    assert told == [
        ["s.tar.gz", "unsupported-format"],
        ["m.tar/0.json", "not-an-object"],
        ["m.tar/1", "missing-key"],
        ["gone.tar", "unreadable"],
    ]


def test_a_part_that_is_no_longer_there_is_an_image_error(here: Path) -> None:
    (entry,) = gathered(entries_of([str(shard(here / "s.tar", {"0.png": picture()}))]))[0]
    (here / "s.tar").write_bytes(b"short")
    with pytest.raises(ImageError, match=r"s\.tar/0\.png"):
        load_image(entry.image)
    (here / "s.tar").unlink()
    with pytest.raises(ImageError, match="no such file"):
        load_image(entry.image)


# --- stamps -----------------------------------------------------------------------------------------------------------


def test_stamps_change_with_the_content_and_not_with_the_place(here: Path) -> None:
    write(here, "a.png")
    state = os.stat("a.png")

    def stamp() -> str:
        return gathered(entries_of(["a.png"]))[0][0].stamp()

    first = stamp()
    os.rename("a.png", "b.png")
    assert gathered(entries_of(["b.png"]))[0][0].stamp() == first
    write(here, "a.png")
    os.utime("a.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert stamp() != first, "same bytes and size, a nanosecond later"
    assert Entry("x", "s", texts=("a",)).stamp() == Entry("y", "t", texts=("a",)).stamp()
    assert Entry("x", "s", (Path("gone.png"),)).stamp() == ""


def test_a_problem_without_a_line_names_the_file_alone() -> None:
    assert str(Problem("a.tar", 0, "corrupt", "x")) == "a.tar: corrupt: x"
