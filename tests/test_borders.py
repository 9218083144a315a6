"""What official files, archives and numbers may not do: lead out of their folder, fill the memory, mean two things."""

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tasktools import Root

from vlm.cli import main
from vlm.data import strictjson
from vlm.data.source import Folder, open_document, parse_json, read_member
from vlm.data.strictjson import NotJSON, parse
from vlm.errors import ConfigError, DataError
from vlm.eval import gold as files
from vlm.eval import tasks
from vlm.settings import from_dict
from vlm.train.config import ModelConfig
from vlm.train.run import make_model
from vlm.train.stage_config import StageConfig


def captions(root: Root, name: str) -> None:
    root.json(
        "nocaps/nocaps_val_4500_captions.json",
        {
            "images": [{"id": 1, "file_name": name, "domain": "in-domain"}],
            "annotations": [{"image_id": 1, "id": 1, "caption": "a cat"}],
        },
    )


def test_a_link_inside_an_image_folder_may_not_leave_it(tmp_path: Path) -> None:
    root = Root(tmp_path / "data")
    folder = Path(tasks.get("nocaps").split().files["images"].path)
    root.images("elsewhere/a.png")
    (root.path / folder).mkdir(parents=True)
    (root.path / folder / "a.png").symlink_to(root.path / "elsewhere" / "a.png")
    captions(root, "a.png")
    with pytest.raises(DataError, match=r"image a.png: a symbolic link leads out of .*, to .*elsewhere/a.png; copy"):
        tasks.get("nocaps").load(root.path)
    (root.path / folder / "deep").symlink_to(root.path / "elsewhere")
    captions(root, "deep/a.png")
    with pytest.raises(DataError, match="image deep/a.png: a symbolic link leads out of"):
        tasks.get("nocaps").load(root.path)


def test_the_folder_itself_may_be_a_link_and_so_may_what_stays_inside(tmp_path: Path) -> None:
    root = Root(tmp_path / "data")
    folder = Path(tasks.get("nocaps").split().files["images"].path)
    root.images("elsewhere/a.png")
    (root.path / "elsewhere" / "b.png").symlink_to("a.png")
    (root.path / folder).parent.mkdir(parents=True, exist_ok=True)
    (root.path / folder).symlink_to(root.path / "elsewhere")
    captions(root, "b.png")
    (example,) = tasks.get("nocaps").load(root.path)
    assert example.images == (root.path / folder / "b.png",)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0.png", "../a.png", "/etc/passwd", ""])
def test_names_that_no_image_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image '?"):
        Folder(tmp_path) / name


def test_a_member_of_an_archive_is_bounded(tmp_path: Path) -> None:
    """Also where the directory of the archive lies about its size."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big", b"\0" * 10_000_000)
        archive.writestr("small", b"{}")
    with zipfile.ZipFile(path) as archive:
        assert read_member(archive, "small", path, 100) == b"{}"
        with pytest.raises(DataError, match=r"a.zip: big has more than 1,000 bytes"):
            read_member(archive, "big", path, 1000)
        archive.getinfo("big").file_size = 5  # what an attacker writes there
        with pytest.raises(DataError, match=r"a.zip: big"):
            read_member(archive, "big", path, 1000)
        with pytest.raises(DataError, match="no other in it"):
            read_member(archive, "other", path, 1000)


def test_easy_vqa_reads_no_endless_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.data.benchmarks import easy_vqa

    monkeypatch.setattr(easy_vqa, "MAX_MEMBER_BYTES", 2**20)
    (tmp_path / "easy_vqa").mkdir()
    with zipfile.ZipFile(tmp_path / "easy_vqa/easy_vqa.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "test"):
            archive.writestr(f"data/{split}/questions.json", b"[" + b" " * 2_000_000 + b"]")
    with pytest.raises(DataError, match="questions.json has more than 1,048,576 bytes"):
        tasks.get("easy_vqa").load(tmp_path)


def test_a_file_is_bounded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.truncate(strictjson.MAX_DOCUMENT_BYTES + 1)
    for read in (strictjson.read_bytes, open_document, files.read_gold):
        with pytest.raises(DataError, match=r"sparse.json: 2,147,483,649 bytes; at most 2,147,483,648 are read"):
            read(path)


DARK = [
    ('{"a": 1, "a": 2}', "duplicate-key", "the key 'a' is there twice"),
    ('[{"x": {"a": 1, "a": 1}}]', "duplicate-key", "the key 'a' is there twice"),
    ('{"a": NaN}', "not-json", "NaN is no JSON value"),
    ('{"a": -Infinity}', "not-json", "-Infinity is no JSON value"),
    ('{"a": 1e999}', "not-json", "the number 1e999 is too large"),
    ('{"a": -1E+400}', "not-json", "too large"),
    ('{"a": ' + "9" * 400 + "}", "not-json", "a number with too many digits"),
    ('{"a": ' + "9" * 9000 + "}", "not-json", "a number with too many digits"),
    ('{"a": 18446744073709551616}', "not-json", "a number with too many digits"),
    ("[" * 100_000, "not-json", "brackets nested too deep"),
    ('{"a": 1', "not-json", "is the line cut off?"),
    ('{\n"a": 1\n"b"', "not-json", "at line 3, column 1; is the file cut off?"),
]


@pytest.mark.parametrize(("text", "code", "says"), DARK, ids=range(len(DARK)))
def test_every_reader_refuses_the_dark_corners(text: str, code: str, says: str, tmp_path: Path) -> None:
    """The parser, the reader of `vlm score`, and that of the tasks' official files."""
    with pytest.raises(NotJSON) as caught:
        parse(text)
    assert caught.value.code == code and says in str(caught.value)
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(DataError) as refused:
        open_document(path)
    assert says in str(refused.value) and "file.json" in str(refused.value)
    with pytest.raises(DataError) as refused:
        parse_json(text.encode(), "file.json")
    assert says in str(refused.value) and str(refused.value).startswith("file.json: ")


def test_ordinary_numbers_are_exact() -> None:
    numbers = [0, -1, 2**63, 18446744073709551615, -(2**63), 0.1, 1e300, 1.5e-320, 0.12345678901234567890123]
    assert parse(json.dumps(numbers)) == numbers
    text = {"id": "9" * 100, "name": "1e999"}
    assert parse(json.dumps(text)) == text


def test_one_file_for_scoring_and_for_evaluation(tmp_path: Path) -> None:
    """The same official file with a repeated key: both commands refuse it, with status 2."""
    root = Root(tmp_path)
    captions(root, "a.png")
    path = tmp_path / "nocaps" / "nocaps_val_4500_captions.json"
    path.write_text(path.read_text().replace('"caption": "a cat"', '"caption": "a cat", "caption": "a dog"'))
    (tmp_path / "said.json").write_text('[{"image_id": 1, "caption": "a cat"}]')
    with pytest.raises(DataError, match="the key 'caption' is there twice"):
        tasks.get("nocaps").load(tmp_path)
    assert main(["score", str(tmp_path / "said.json"), "--references", str(path), "--metrics", "cider"]) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", b"id,prediction\r\n1,a\r\n", r"a table .CSV. with the columns id, prediction"),
        ("p.parquet", b"PAR1\0\0", "a Parquet file; expected JSON, or JSONL"),
        ("p.json.gz", b"\x1f\x8b\x08\0", "a compressed file; unpack it first .gzip"),
    ],
)
def test_other_formats_are_named_to_scoring_too(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        files.read_predictions(tmp_path / name)


def test_empty_gold_answers_are_named(tmp_path: Path) -> None:
    root = Root(tmp_path)
    question = {"question_id": 3, "image_id": "a", "question": "what?", "answers": []}
    split = tasks.get("textvqa").split()
    root.json(split.files["questions"].path, {"data": [question]})
    with pytest.raises(DataError, match=r"'data' 0: 'answers' is an empty list: there is nothing to compare"):
        tasks.get("textvqa").load(tmp_path)


def test_a_table_is_read_strictly(tmp_path: Path) -> None:
    from vlm.data.items import File
    from vlm.data.source import Source

    def table(text: str) -> list[dict[str, str]]:
        (tmp_path / "t.csv").write_text(text)
        return Source("x", "y", tmp_path, {"t": File(path="t.csv")}).table("t", "a", "b")

    assert table("a,b\n1,2\n") == [{"a": "1", "b": "2"}]
    with pytest.raises(DataError, match="row 3: no b; the row is cut off"):
        table("a,b\n1,2\n3\n")
    with pytest.raises(DataError, match="not a table of comma-separated values"):
        table("a,b\n1," + "x" * (csv.field_size_limit() + 1) + "\n")


def test_the_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')

    def full(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(json, "loads", full)
    with pytest.raises(DataError, match=r"a.json: not JSON: more than fits into the memory"):
        open_document(path)


NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"steps": "28"}, "steps: expected a whole number or null, got text: '28'; write 28 without quotes"),
    ({"steps": 10**400}, "steps: expected a whole number or null, got a whole number of more than 64 bits"),
    ({"weight_decay": 10**400}, "weight_decay: expected a number, got a whole number of more than 64 bits"),
    ({"weight_decay": "1e-3"}, "got text: '1e-3'; write 1e-3 without quotes"),
    ({"cache_features": "true"}, "got text: 'true'; write true without quotes"),
    ({"train": {"decoder": "1e-3"}}, "train.decoder: expected a number, got text: '1e-3'; write 1e-3 without quotes"),
    ({"batch_size": "many"}, "batch_size: expected a whole number, got text: 'many'"),
]


@pytest.mark.parametrize(("change", "says"), NUMBERS)
def test_a_number_in_quotes_says_how_to_write_it(change: dict[str, Any], says: str) -> None:
    stage = {"name": "a", "module": "full", "train": {"decoder": 1e-3}, "steps": 1, "batch_size": 2}
    with pytest.raises(ConfigError) as caught:
        from_dict(StageConfig, {**stage, **change})
    assert str(caught.value).endswith(says)


@pytest.mark.parametrize(
    ("part", "key"), [("encoder", "image_size"), ("encoder", "hidden_size"), ("decoder", "hidden_size")]
)
def test_text_for_a_number_of_a_part_is_one_line(part: str, key: str) -> None:
    values: dict[str, Any] = {
        "encoder": {"model_type": "siglip_vision_model", "hidden_size": 16, "image_size": 28, "patch_size": 14},
        "decoder": {"model_type": "gemma", "hidden_size": 16, "num_hidden_layers": 1},
    }
    values[part][key] = "28"
    with pytest.raises(ConfigError, match=f"{part}: .*{key}.*'28'") as caught:
        make_model(from_dict(ModelConfig, {**values, "tokenizer": "none"}))
    assert "\n" not in str(caught.value)


# One record of an official format with something wrong in it; `vlm eval` and `vlm score` must not differ about it.
VQA = {"question_id": 1, "question_type": "what", "answer_type": "other", "answers": [{"answer": "a"}]}
DIFFERENCES: list[tuple[str, str, Any, str]] = [
    ("pope", "lines", {"question_id": 1, "image": "a.jpg", "text": "is it?", "label": "maybe"}, "yes or no"),
    ("nlvr2", "lines", {"identifier": "a-0", "sentence": "s", "label": "true"}, "True or False"),
    (
        "nocaps",
        "json",
        {"images": [{"id": 1}], "annotations": [{"image_id": 9, "caption": "x"}]},
        "not among the images",
    ),
    ("vqav2", "json", {"annotations": [VQA, VQA]}, "twice|more than once"),
    ("textvqa", "json", {"data": [{"question_id": 1, "image_id": "a", "question": "q", "answers": []}]}, "answers"),
]


@pytest.mark.parametrize(("name", "how", "content", "says"), DIFFERENCES)
def test_evaluation_and_scoring_refuse_the_same(name: str, how: str, content: Any, says: str, tmp_path: Path) -> None:
    root, split = Root(tmp_path), tasks.get(name).split()
    role = next(role for role in ("annotations", "captions", *split.files) if role in split.files)
    for other, file in split.files.items():  # files of the same kind hold the same
        if other == "questions" and role == "annotations":
            root.json(file.path, {"questions": []})
        elif not other.startswith("images"):
            getattr(root, how)(file.path, [content] if how == "lines" else content)
    with pytest.raises(DataError, match=says):
        tasks.get(name).load(tmp_path)
    with pytest.raises(DataError, match=says):
        files.read_gold(tmp_path / split.files[role].path)


def test_a_number_in_quotes_is_read_by_both(tmp_path: Path) -> None:
    """A-OKVQA's `correct_choice_idx` as text: the same gold answer."""
    root, split = Root(tmp_path), tasks.get("aokvqa_mc").split()
    record = {
        **{"question_id": "q", "image_id": 3, "question": "what?", "choices": ["a", "b"], "correct_choice_idx": "1"},
        **{"direct_answers": ["b"], "difficult_direct_answer": False},
    }
    root.json(split.files["questions"].path, [record])
    root.images(f"{split.files['images'].path}/000000000003.jpg")
    (example,) = tasks.get("aokvqa_mc").load(tmp_path)
    gold, _ = files.read_gold(tmp_path / split.files["questions"].path)
    assert example.answers == gold["q"].references == ("b",)
    assert example.info["answer_index"] == gold["q"].info["answer_index"] == 1


def test_only_the_balanced_questions_of_gqa_count(tmp_path: Path) -> None:
    root, split = Root(tmp_path), tasks.get("gqa").split()
    types = {"structural": "query", "semantic": "attr"}
    record = {"imageId": "1", "question": "what?", "answer": "a", "types": types}
    root.json(
        split.files["questions"].path, {"1": {**record, "isBalanced": True}, "2": {**record, "isBalanced": False}}
    )
    root.images(f"{split.files['images'].path}/1.jpg")
    gold, _ = files.read_gold(tmp_path / split.files["questions"].path)
    kept = [example.id for example in tasks.get("gqa").load(tmp_path)]
    assert kept == [key for key, item in gold.items() if item.scored("answers")] == ["1"]


def test_an_image_of_a_table_that_a_kill_tore_is_written_again(tmp_path: Path) -> None:
    from vlm.data.benchmarks._parquet import written

    target = tmp_path / "images" / "1"
    target.parent.mkdir()
    target.write_bytes(b"whole pic")
    assert written(b"whole picture", target).read_bytes() == b"whole picture"
    assert [path.name for path in target.parent.iterdir()] == ["1"]
