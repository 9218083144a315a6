import codecs
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlm.data import Example, Problem, read_jsonl
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
        read_jsonl(path, **options)
    examples, found = read_jsonl(path, skip_bad=True, **options)
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
    examples, found = read_jsonl(path)
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
    assert read_jsonl(path, require=())[0][0].suffix is None
    with pytest.raises(DataError, match=r"data\.jsonl:1: missing-key: 'suffix' is null"):
        read_jsonl(path)
    with pytest.raises(
        DataError, match=r"missing-key: 'references' is missing; the line has 'image', 'prefix', 'suffix'"
    ):
        read_jsonl(path, require=("references",))


def test_only_newlines_separate_records(folder: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive"
    raw = json.dumps({**GOOD, "suffix": text}, ensure_ascii=False).replace("\\u000b", "\\u000B")
    path = write(folder, raw, raw + "\r")
    assert [example.suffix for example in read_jsonl(path)[0]] == [text, text]


def test_a_byte_order_mark_and_a_missing_last_newline(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(GOOD).encode())
    assert read_jsonl(path)[0][0].suffix == "a cat"


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
    ({"suffix": " \n"}, "empty", "'suffix' is blank"),
    ({"references": "a cat"}, "wrong-type", "'references' should be a list of text, got text"),
    ({"references": ["a cat", None]}, "wrong-type", "'references[1]' should be text, got null"),
    ({"answers": []}, "empty", "'answers' is an empty list"),
    ({"answers": ["red", 3]}, "wrong-type", "'answers[1]' should be text, got a number"),
    ({"answers": [""]}, "empty", "'answers' holds a blank text"),
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
    names = [example.image for example in read_jsonl(path)[0]]
    assert names == [folder.resolve() / "images" / "b.png", folder.resolve() / "a.png"]


def test_the_image_root_can_be_another_folder(folder: Path) -> None:
    path = write(folder, {**GOOD, "image": "b.png"})
    assert read_jsonl(path, image_root=folder / "images")[0][0].image == folder.resolve() / "images" / "b.png"
    with pytest.raises(DataError, match="missing-image"):
        read_jsonl(path)
    with pytest.raises(DataError, match="image root .*nowhere: no such folder"):
        read_jsonl(path, image_root=folder / "nowhere")


def test_all_problems_are_listed_not_only_the_first(folder: Path) -> None:
    path = write(folder, "{", GOOD, {**GOOD, "image": "none.png"}, {**GOOD, "suffix": 1})
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    head, *rest = str(caught.value).splitlines()
    assert head == f"{path}: 3 of 4 annotations cannot be used:"
    assert [line.split(": ")[:2] for line in rest] == [
        [f"{path}:1", "not-json"],
        [f"{path}:3", "missing-image"],
        [f"{path}:4", "wrong-type"],
    ]
    assert [p.line for p in read_jsonl(path, skip_bad=True)[1]] == [1, 3, 4]


def test_a_long_list_of_problems_is_counted(folder: Path) -> None:
    path = write(folder, *["{"] * 1203, GOOD)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (1002, "... and 203 more")
    assert lines[0].endswith("1203 of 1204 annotations cannot be used:")


def test_nothing_usable_is_refused_even_when_skipping(folder: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 annotations cannot be used:\n.*data.jsonl:1: not-json"):
        read_jsonl(write(folder, "{"), skip_bad=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no annotation in the file"),
        (b"\n \n", "no annotation in the file"),
        (gzip.compress(json.dumps(GOOD).encode(), mtime=0), "a compressed file; unpack it first"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (json.dumps(GOOD).encode("utf-16-le"), "UTF-16 text; save it as UTF-8"),
        (json.dumps([GOOD], indent=1).encode(), "a JSON list; expected JSONL"),
    ],
)
def test_a_file_of_another_kind_is_refused(folder: Path, data: bytes, message: str) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_jsonl(path, skip_bad=True)


def test_a_path_that_is_no_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    for name, message in (("images", "a directory"), ("fifo", "expected a JSONL file"), ("none", "No such file")):
        with pytest.raises(DataError, match=message):
            read_jsonl(folder / name)
