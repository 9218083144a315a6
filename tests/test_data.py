import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vlm.data.examples import Example
from vlm.data.problems import Problem
from vlm.data.reading import read
from vlm.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the (empty) image files a.png and images/b.png."""
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "images" / "b.png").touch()
    return tmp_path


GOOD = {"image": "a.png", "prefix": "caption en", "suffix": "a cat"}


def write(folder: Path, *records: Any) -> Path:
    """records: objects, or raw lines as text or bytes."""
    path = folder / "data.jsonl"
    lines = [
        r if isinstance(r, bytes) else r.encode() if isinstance(r, str) else json.dumps(r).encode() for r in records
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def problems(folder: Path, *records: Any, **options: Any) -> list[Problem]:
    """The problems of a file with these records and a good one, which must be all that is left."""
    path = write(folder, *records, {**GOOD, "id": "good"})
    with pytest.raises(DataError) as caught:
        read(path, **options)
    examples, found = read(path, skip_bad=True, **options)
    assert examples[-1].id == "good"
    for problem in found:
        assert str(problem) in str(caught.value)
        assert "\n" not in str(problem)
    return found


def test_every_field_arrives(folder: Path) -> None:
    full = {
        "id": "q1",
        "image": "images/b.png",
        "prefix": "",
        "suffix": "x",
        "references": ["r"],
        "answers": ["a", "a"],
    }
    path = write(folder, full, "", {**GOOD, "id": 7, "source": {"deep": [1.5, None, True]}}, "   ", GOOD)
    examples, found = read(path)
    assert found == []
    root = folder.resolve()
    assert examples == [
        Example("q1", root / "images" / "b.png", "", "x", ("r",), ("a", "a"), str(path), 1),
        Example(
            "7",
            root / "a.png",
            "caption en",
            "a cat",
            (),
            (),
            str(path),
            3,
            info={"source": {"deep": [1.5, None, True]}},
        ),
        Example("5", root / "a.png", "caption en", "a cat", (), (), str(path), 5),
    ]


def test_what_is_required_can_be_chosen(folder: Path) -> None:
    record = {"image": "a.png", "prefix": "p", "suffix": None}
    path = write(folder, record)
    assert read(path, require=())[0][0].suffix is None
    with pytest.raises(DataError, match=r"data\.jsonl:1: missing-key: 'suffix' is null"):
        read(path)
    with pytest.raises(
        DataError, match=r"missing-key: 'references' is missing; the line has 'image', 'prefix', 'suffix'"
    ):
        read(path, require=("references",))


def test_only_newlines_separate_records(folder: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive"
    raw = json.dumps({**GOOD, "suffix": text}, ensure_ascii=False).replace("\\u000b", "\\u000B")
    path = write(folder, raw, raw + "\r")
    assert [example.suffix for example in read(path)[0]] == [text, text]


def test_a_byte_order_mark_and_a_missing_last_newline(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(GOOD).encode())
    assert read(path)[0][0].suffix == "a cat"


LINES: list[tuple[str | bytes, str, str]] = [
    ('{"image": "a.png", "pre', "not-json", "is the line cut off?"),
    ("image,prefix,suffix", "not-json", "column 1"),
    ("42", "not-an-object", "got a number"),
    ('"text"', "not-an-object", "got text"),
    ("null", "not-an-object", "got null"),
    ('{"image": "a.png", "prefix": "p", "suffix": "s", "suffix": "t"}', "duplicate-key", "'suffix' is there twice"),
    ('{"image": "a.png", "prefix": "p", "suffix": "s", "x": {"y": 1, "y": 1}}', "duplicate-key", "'y'"),
    ('{"image": "a.png", "prefix": "p", "suffix": "s", "score": NaN}', "not-json", "NaN"),
    ('{"image": "a.png", "prefix": "p", "suffix": "s", "score": -Infinity}', "not-json", "-Infinity"),
    ('{"x": ' + "9" * 6000 + "}", "not-json", "digits"),
    ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "not-json", "nested too deep"),
    ('{"x": "' + "y" * 4_000_000 + '"}', "line-too-long", "1,048,576"),
    ('{"image": "a.png", "prefix": "caf\xe9"}'.encode("latin-1"), "not-utf-8", "0xe9 at column 34"),
    (b"\0" * 512, "not-json", "column 1"),
    ('{"image": "a.png", "prefix": "\\ud800", "suffix": "s"}', "bad-text", "'prefix' holds half a surrogate"),
]


@pytest.mark.parametrize(("line", "code", "says"), LINES, ids=range(len(LINES)))
def test_a_broken_line_is_named(folder: Path, line: str | bytes, code: str, says: str) -> None:
    (problem,) = problems(folder, {**GOOD, "id": "first"}, line)
    assert (problem.line, problem.code) == (2, code)
    assert says in problem.message


RECORDS: list[tuple[dict[str, Any], str, str]] = [
    ({"image": None}, "missing-key", "'image' is null"),
    ({"image": ["a.png"]}, "wrong-type", "'image' should be text, got a list"),
    ({"image": {"path": "a.png"}}, "wrong-type", "got an object"),
    ({"prefix": None}, "missing-key", "'prefix' is null"),
    ({"prefix": 3}, "wrong-type", "'prefix' should be text, got a number"),
    ({"suffix": 3}, "wrong-type", "'suffix' should be text"),
    ({"suffix": False}, "wrong-type", "got true or false"),
    ({"suffix": " \n"}, "empty", "'suffix' is blank but not empty"),
    ({"references": "a cat"}, "wrong-type", "'references' should be a list of text, got text"),
    ({"references": ["a cat", None]}, "wrong-type", "'references[1]' should be text, got null"),
    ({"answers": []}, "empty", "'answers' is an empty list"),
    ({"answers": ["red", 3]}, "wrong-type", "'answers[1]' should be text, got a number"),
    ({"answers": [""]}, "empty", "'answers' holds a blank text"),
    ({"image": "a.png", "images": ["a.png", "images/b.png"]}, "unknown-key", "'image' beside 'images'"),
    ({"image2": "images/b.png"}, "unknown-key", "key 'image2': did you mean 'images'?"),
    ({"image_2": "images/b.png"}, "unknown-key", "key 'image_2': did you mean 'images'?"),
    ({"images2": ["images/b.png"]}, "unknown-key", "key 'images2': did you mean 'images'?"),
    ({"Image": "images/b.png"}, "unknown-key", "key 'Image': did you mean 'images'?"),
    ({"suffix2": "a dog"}, "unknown-key", "key 'suffix2' beside 'suffix' would not be read; write a line for each"),
    ({"Suffix": "a dog"}, "unknown-key", "key 'Suffix' beside 'suffix'"),
    ({"answers": ["a"], "answer": "b"}, "unknown-key", "key 'answer' beside 'answers' would not be read"),
    ({"ID": "q"}, "unknown-key", "did you mean 'id'?"),
    ({"conversations": [{"from": "human", "value": "hi"}]}, "unknown-key", "a dialogue is not read"),
    ({"messages": []}, "unknown-key", "a dialogue is not read"),
    ({"video": "a.mp4"}, "unknown-key", "give frames of it as 'images'"),
    ({"depth": "images/b.png"}, "unknown-key", "key 'depth' holds an image that would not be shown"),
    ({"image": "images/b.png", "other": "twin/b.png"}, "unknown-key", "key 'other' holds an image"),
    ({"views": [{"path": "x/b.JPEG"}]}, "unknown-key", "key 'views' holds an image"),
    ({"thumb": "data:image/png;base64,iVBOR"}, "unknown-key", "key 'thumb' holds an image"),
    ({"raw": "iVBORw0KGgo" + "A" * 100}, "unknown-key", "key 'raw' holds an image"),
    ({"answer": "red"}, "unknown-key", "did you mean 'answers'?"),
    ({"refrences": ["a"]}, "unknown-key", "did you mean 'references'?"),
    ({"id": True}, "wrong-type", "'id' should be text, got true or false"),
    ({"id": 1.5}, "wrong-type", "'id' should be text, got a number"),
    ({"id": " "}, "empty", "'id' is blank"),
]


@pytest.mark.parametrize(("change", "code", "says"), RECORDS)
def test_a_wrong_value_is_named(folder: Path, change: dict[str, Any], code: str, says: str) -> None:
    (problem,) = problems(folder, {**GOOD, **change})
    assert (problem.line, problem.code) == (1, code)
    assert says in problem.message


def test_notes_stay_notes(folder: Path) -> None:
    """Keys that metrics and breakdowns read, and where the image came from: none of them is data that is lost."""
    notes = {
        "image_id": 7,
        "image_size": [640, 480],
        "answer_type": "number",
        "answer_index": 2,
        "question_id": "q1",
        "question": "what?",
        "label": "cat",
        "choices": ["a", "b"],
        "references_from": "people",
        "file_name": "train/a.png",
        "coco_url": "http://images.cocodataset.org/train2014/000.jpg",
        "page": "https://example.org/x.html",
        "height": 480,
        "source": {"deep": [1.5, None, True]},
    }
    (example,) = read(write(folder, {**GOOD, **notes}))[0]
    assert example.info == notes


def test_several_images_and_none(folder: Path) -> None:
    root = folder.resolve()
    text = {"prefix": "what is 1 + 1?", "suffix": "2"}
    two = {**text, "images": ["images/b.png", "a.png"]}
    path = write(folder, text, {**text, "images": []}, two, {**text, "images": ["a.png"]}, {**text, "image": "a.png"})
    found = [example.images for example in read(path)[0]]
    assert found == [(), (), (root / "images" / "b.png", root / "a.png"), (root / "a.png",), (root / "a.png",)]


NO_IMAGE: list[tuple[dict[str, Any], str, str]] = [
    ({"images": "a.png"}, "wrong-type", "'images' should be a list of text, got text"),
    ({"images": None}, "missing-key", "'images' is null; leave the key out where the line is about text alone"),
    ({"images": ["a.png", None]}, "wrong-type", "'images[1]' should be text, got null"),
    ({"images": ["a.png", "none.png"]}, "missing-image", "image none.png is not below"),
    ({"images": ["a.png", "../x.png"]}, "outside-root", "outside the image root"),
    ({"image_path": "a.png"}, "unknown-key", "key 'image_path' holds an image that would not be shown"),
    ({"img": "a"}, "unknown-key", "key 'img', but no 'image'"),
    ({"image_id": 3}, "unknown-key", "key 'image_id', but no 'image'"),
    ({"imagee": "a.png"}, "unknown-key", "did you mean 'image'?"),
    ({"picture": 3}, "unknown-key", "key 'picture', but no 'image'"),
    ({"path": "a"}, "unknown-key", "key 'path', but no 'image'"),
]


@pytest.mark.parametrize(("change", "code", "says"), NO_IMAGE)
def test_an_image_is_never_lost(folder: Path, change: dict[str, Any], code: str, says: str) -> None:
    (problem,) = problems(folder, {"prefix": "p", "suffix": "s", **change})
    assert problem.code == code and says in problem.message


def test_an_empty_suffix_is_an_answer(folder: Path) -> None:
    path = write(folder, {**GOOD, "suffix": ""})
    assert read(path)[0][0].suffix == ""


def test_a_misspelt_required_key_names_both(folder: Path) -> None:
    (problem,) = problems(folder, {"image": "a.png", "prefix": "p", "sufix": "s"})
    assert (problem.code, problem.message) == ("unknown-key", "key 'sufix': did you mean 'suffix'? Rename it")


def test_ids_are_unique_as_text(folder: Path) -> None:
    found = problems(folder, {**GOOD, "id": 1}, {**GOOD, "id": "1"}, {**GOOD, "id": "x"}, {**GOOD, "id": "x"})
    assert [(p.line, p.code) for p in found] == [(2, "duplicate-id"), (4, "duplicate-id")]
    assert found[0].message == "id '1' is that of line 1 already"


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("../outside.png", "outside-root"),
        ("images/../../outside.png", "outside-root"),
        ("../root-twin/a.png", "outside-root"),
        ("/etc/passwd", "outside-root"),
        ("link-out.png", "outside-root"),
        ("folder-out/outside.png", "outside-root"),
        ("link-loop.png", "missing-image"),
        ("link-dangling.png", "missing-image"),
        ("none.png", "missing-image"),
        ("images", "not-a-file"),
        ("", "not-a-file"),
        (".", "not-a-file"),
        ("fifo", "not-a-file"),
        ("http://example.org/a.png", "url"),
        ("HTTPS://169.254.169.254/latest", "url"),
        ("file:///etc/passwd", "url"),
        ("s3://bucket/a.png", "url"),
        ("simplecache::http://x/a.png", "url"),
        ("pipe:cat /etc/passwd", "url"),
        ("data:image/png;base64,iVBORw0KGgo=", "url"),
        ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ", "missing-image"),
        ("~/a.png", "missing-image"),
        ("$HOME/a.png", "missing-image"),
        ("*.png", "missing-image"),
        ("a\0.png", "missing-image"),
        ("x" * 5000, "missing-image"),
        ("a.png\n", "missing-image"),
    ],
)
def test_the_image_root_is_a_border(tmp_path: Path, image: str, code: str) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "a.png").touch()
    (tmp_path / "root-twin").mkdir()
    (tmp_path / "root-twin" / "a.png").touch()
    (tmp_path / "outside.png").touch()
    (root / "link-out.png").symlink_to(tmp_path / "outside.png")
    (root / "folder-out").symlink_to(tmp_path)
    (root / "link-loop.png").symlink_to(root / "link-loop.png")
    (root / "link-dangling.png").symlink_to(root / "gone.png")
    os.mkfifo(root / "fifo")
    (problem,) = problems(root, {**GOOD, "image": image})
    assert problem.code == code


def test_links_and_absolute_paths_inside_the_root_are_fine(folder: Path) -> None:
    (folder / "link.png").symlink_to("images/b.png")
    path = write(folder, {**GOOD, "image": "link.png"}, {**GOOD, "image": str(folder / "a.png")})
    names = [example.image for example in read(path)[0]]
    assert names == [folder.resolve() / "images" / "b.png", folder.resolve() / "a.png"]


def test_the_image_root_can_be_another_folder(folder: Path) -> None:
    path = write(folder, {**GOOD, "image": "b.png"})
    assert read(path, image_root=folder / "images")[0][0].image == folder.resolve() / "images" / "b.png"
    with pytest.raises(DataError, match="missing-image"):
        read(path)
    with pytest.raises(DataError, match="image root .*nowhere: no such folder"):
        read(path, image_root=folder / "nowhere")


def test_all_problems_are_listed_not_only_the_first(folder: Path) -> None:
    path = write(folder, "{", GOOD, {**GOOD, "image": "none.png"}, {**GOOD, "suffix": 1})
    with pytest.raises(DataError) as caught:
        read(path)
    head, *rest = str(caught.value).splitlines()
    assert head == f"{path}: 3 of 4 annotations cannot be used:"
    assert [line.split(": ")[:2] for line in rest] == [
        [f"{path}:1", "not-json"],
        [f"{path}:3", "missing-image"],
        [f"{path}:4", "wrong-type"],
    ]
    assert [p.line for p in read(path, skip_bad=True)[1]] == [1, 3, 4]


def test_a_long_list_of_problems_is_counted(folder: Path) -> None:
    words = ["red", "green", "blue", "grey"]
    kinds = [f"{a}{b}{c}{d}{e}" for a in words for b in words for c in words for d in words for e in words + ["x"]]
    lines = [{**GOOD, "id": kind, "prefix": None, kind: 1} for kind in kinds[:1203]]
    path = write(folder, *lines, GOOD)
    with pytest.raises(DataError) as caught:
        read(path)
    shown = str(caught.value).splitlines()
    assert (len(shown), shown[-1]) == (1002, "... and 203 more")
    assert shown[0].endswith("1203 of 1204 annotations cannot be used:")


def test_one_mistake_on_many_lines_is_one_line(folder: Path) -> None:
    records = [{"image": "a.png", "prefix": "p", "caption": f"text {i}"} for i in range(1002)]
    path = write(folder, *records[:500], GOOD, *records[500:], {**GOOD, "image": "b.png"}, {**GOOD, "image": "c.png"})
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 1004 of 1005 annotations cannot be used:",
        f"{path}: 1,002 lines (1-500, 502-1003): missing-key: 'suffix' is missing; the line has 'image', 'prefix',"
        " 'caption'",
        f"{path}:1004: missing-image: image b.png is not below {folder.resolve()}",
        f"{path}:1005: missing-image: image c.png is not below {folder.resolve()}",
    ]


def test_a_mistake_with_names_in_it_is_counted_too(folder: Path) -> None:
    path = write(folder, *[{**GOOD, "image": f"gone/{i}.png"} for i in range(0, 40)], GOOD)
    with pytest.raises(DataError) as caught:
        read(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: 40 lines (1-40): missing-image: image gone/0.png is not below ")
    assert line.endswith(", and so on (41 annotations in the file)")


def test_nothing_usable_is_refused_even_when_skipping(folder: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 annotations cannot be used:\n.*data.jsonl:1: not-json"):
        read(write(folder, "{"), skip_bad=True)


LLAVA = {"id": "0", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
COCO = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("000.txt"))
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", "{}")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"image,prefix,suffix\r\na.png,caption en,a cat\r\n", "a table .CSV. with the columns image, prefix, suffix"),
        (b"image\tcaption\na.png\ta cat\n", "a table .TSV. with the columns image, caption"),
        (b"PAR1\x15\x04" + b"\0" * 40, "a Parquet file"),
        (b"ARROW1\0\0" + b"\0" * 40, "an Arrow file"),
        (b"\xff\xff\xff\xff\x38\x01\0\0\x10\0\0\0" + b"\0" * 40, "an Arrow file"),
        (tar(), "a tar archive .a WebDataset shard"),
        (gzip.compress(tar(), mtime=0), "a compressed file; unpack it first .gzip"),
        (zipped(), "a compressed file; unpack it first .zip"),
        (bz2.compress(b"{}"), "a compressed file; unpack it first .bzip2"),
        (lzma.compress(b"{}"), "a compressed file; unpack it first .xz"),
        (json.dumps([LLAVA]).encode(), "LLaVA's format"),
        (json.dumps([LLAVA], indent=1).encode(), "LLaVA's format"),
        (json.dumps(COCO).encode(), "COCO's format"),
        (json.dumps(COCO, indent=1).encode(), "COCO's format"),
        (json.dumps(GOOD, indent=1).encode(), "a JSON object over several lines"),
        (pickle.dumps([GOOD], protocol=4), "a pickle, which can run code"),
        (b"SQLite format 3\0" + b"\0" * 40, "an SQLite database"),
        (b"\x89PNG\r\n\x1a\n", "an image; expected JSONL"),
        (b"<!DOCTYPE html><html>", "a web page or XML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"", "no annotation in the file"),
        (b"\n \n", "no annotation in the file"),
        (gzip.compress(json.dumps(GOOD).encode(), mtime=0), r"a compressed file; unpack it first \(gzip, `gunzip`\)"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (json.dumps(GOOD).encode("utf-16-le"), "UTF-16 text; save it as UTF-8"),
        (json.dumps([GOOD], indent=1).encode(), "a JSON list; expected JSONL"),
    ],
)
def test_a_file_of_another_kind_is_refused(folder: Path, data: bytes, message: str) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(path, skip_bad=True)


def test_llavas_lines_are_named(folder: Path) -> None:
    (problem,) = problems(folder, LLAVA)
    assert problem.code == "unknown-key" and '{"image": ..., "prefix": QUESTION, "suffix": ANSWER}' in problem.message


def test_what_the_advice_makes_of_a_table_is_read(folder: Path) -> None:
    """The command that the message gives is run as it is."""
    table = folder / "data.csv"
    table.write_text('image,prefix,suffix\na.png,caption en,"a cat, black"\n')
    with pytest.raises(DataError) as caught:
        read(table)
    command = str(caught.value).split("converts it: ")[1].split(" (then")[0]
    command = command.replace("FILE.jsonl", "made.jsonl").replace("FILE", "data.csv").replace("python", sys.executable)
    subprocess.run(command, shell=True, check=True, cwd=folder)
    assert read(folder / "made.jsonl")[0][0].suffix == "a cat, black"


def test_a_link_out_of_the_root_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "images").symlink_to(tmp_path / "elsewhere")
    (problem,) = problems_of(root, {**GOOD, "image": "images/a.png"})
    assert problem.code == "outside-root"
    assert f"a symbolic link leads to {tmp_path.resolve() / 'elsewhere' / 'a.png'}" in problem.message
    assert "image_root" in problem.message
    path = write(root, {**GOOD, "image": "elsewhere/a.png"})
    assert len(read(path, image_root=tmp_path)[0]) == 1


def problems_of(root: Path, record: dict[str, Any]) -> list[Problem]:
    text = {"prefix": "p", "suffix": "s", "id": "good"}
    return read(write(root, record, text), skip_bad=True)[1]


def test_a_path_that_is_no_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    for name, message in (("images", "a directory"), ("fifo", "expected a JSONL file"), ("none", "No such file")):
        with pytest.raises(DataError, match=message):
            read(folder / name)
