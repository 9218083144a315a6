"""Tasks as files: what they say, how they are found, how prompts are made, what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.examples import Example
from vlm.data.items import File, Item, choice_fields
from vlm.errors import ConfigError, DataError
from vlm.eval import tasks
from vlm.eval.metrics import registry
from vlm.eval.tasks import Split, Task, TaskDecoding, fill
from vlm.eval.tasks.loading import reader

ALL = tasks.names()


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path)


def own_data(folder: Path, count: int = 2) -> Path:
    """A JSONL file of ours with drawn images."""
    lines = []
    for number in range(count):
        draw(folder / f"{number}.png")
        lines.append({"id": f"i{number}", "image": f"{number}.png", "prefix": "caption en", "references": ["a cat"]})
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


# --- The files --------------------------------------------------------------------------------------------------------


def test_the_promised_tasks_are_there() -> None:
    promised = (
        "cococap nocaps textcaps flickr30k coco35l xm3600 vqav2 okvqa aokvqa_da aokvqa_mc gqa textvqa stvqa ocrvqa"
        " docvqa infovqa chartqa vizwiz ai2d scienceqa tallyqa pope nlvr2 refcoco refcocoplus refcocog mmmu easy_vqa"
        " xgqa screen2words countbenchqa"
    )
    assert set(promised.split()) <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_each_task_is_complete(name: str) -> None:
    task = tasks.get(name)
    assert task.name == name and task.title and task.citation
    reader(task.format)
    for metric in registry.expand(task.metrics):
        assert metric.name in registry.names()
    for split in task.splits.values():
        assert split.files
        made = ("ai2d/lettered", "mmmu/images", "countbenchqa/images")  # by the loaders
        for file in split.files.values():
            assert not Path(file.path).is_absolute() and ".." not in Path(file.path).parts
            assert file.url.startswith(("http://", "https://")) or file.path in made


@pytest.mark.parametrize("name", ALL)
def test_published_figures_name_their_source_and_a_metric_of_ours(name: str) -> None:
    for figure in tasks.get(name).published:
        assert figure.source.startswith("arXiv ") and figure.resolution in (224, 384, 448, 896)
        assert figure.metric in tasks.get(name).metrics
        # CIDEr of captions may pass 100; everything else is a percentage.
        assert 20 < figure.value < (190 if figure.metric == "cider" else 100)


def test_some_published_figures_are_those_of_the_papers() -> None:
    """Read off PaliGemma's table 1, PaliGemma 2's table 13 and SigLIP 2's table 6."""

    def value(name: str, model: str, resolution: int, split: str, group: str = "") -> float:
        found = [
            figure.value
            for figure in tasks.get(name).published
            if (figure.model, figure.resolution, figure.split, figure.group) == (model, resolution, split, group)
        ]
        assert len(found) == 1
        return found[0]

    assert value("cococap", "PaliGemma 3B", 224, "val") == 141.9
    assert value("textvqa", "PaliGemma 3B", 896, "test") == 76.5
    assert value("xm3600", "PaliGemma 2 10B", 448, "avg35") == 44.6
    assert value("chartqa", "PaliGemma 2 28B", 448, "test", "human") == 61.3
    assert value("tallyqa", "PaliGemma 2 3B", 224, "test", "complex") == 70.3
    assert value("ai2d", "Gemma 2 2B + frozen SigLIP 2 So400m/14", 384, "test") == 78.3
    assert value("pope", "PaliGemma 3B", 448, "all", "adversarial") == 85.9


def test_languages_of_the_multilingual_tasks() -> None:
    coco, xm = tasks.get("coco35l"), tasks.get("xm3600")
    assert len(coco.split("avg34").options["languages"]) == 34 and len(xm.split("avg35").options["languages"]) == 35
    assert "en" not in xm.split().options["languages"] and "no" in coco.split().options["languages"]
    assert set(xm.splits) - set(coco.splits) == {"avg35", "quz"}
    assert all(xm.split(language).options["languages"] == [language] for language in xm.splits if language != "avg35")
    assert coco.average_over == xm.average_over == "language"


def test_prompts_are_paligemmas() -> None:
    assert tasks.get("docvqa").prompt == tasks.get("chartqa").prompt == "{question}"
    assert tasks.get("infovqa").prompt == "answer en {question}"
    # big_vision formats "answer en " + " {question}": two blanks.
    fields = {"question": "Which one?", **choice_fields(["a fox", "ice"])}
    assert fill(tasks.get("ai2d").prompt, fields, "") == "answer en  Which one? choose from: a fox \t ice"
    fields["hint"] = "N/A"
    assert fill(tasks.get("scienceqa").prompt, fields, "") == (
        "Question: Which one?\nContext: N/A\nOptions: (A) a fox, (B) ice\nAnswer:"
    )


# --- Names, files, one line of configuration --------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'vqa2' \(did you mean 'vqav2'\?\); known: ai2d, "):
        tasks.get("vqa2")
    with pytest.raises(ConfigError, match=r"task 'pope' has no split 'adverserial' \(did you mean 'adversarial'\?\)"):
        tasks.get("pope").split("adverserial")
    with pytest.raises(ConfigError, match=r"unknown format 'docvq' \(did you mean 'docvqa'\?\)"):
        reader("docvq")


def test_select_takes_tasks_splits_and_files(tmp_path: Path) -> None:
    data = own_data(tmp_path)
    chosen = tasks.select(f"vqav2, pope@adversarial,{data}:cider+rouge_l")
    assert [found.label for found in chosen] == ["vqav2", "pope@adversarial", "mine"]
    mine = chosen[2].task
    assert mine.metrics == ("cider", "rouge_l")
    examples = mine.load(Path("not read"))
    assert [(ex.id, ex.prefix, ex.references) for ex in examples] == [
        ("i0", "caption en", ("a cat",)),
        ("i1", "caption en", ("a cat",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no task was named"),
        ("vqav2,vqav2", "task 'vqav2' is named twice"),
        ("pope@advers", "has no split 'advers'"),
        ("mine.jsonl", "is a JSONL file without a metric; for example mine.jsonl:cider"),
        ("mine.jsonl:", "no metric after the colon"),
        ("missing.yaml", "missing.yaml: cannot read the configuration"),
    ],
)
def test_what_select_refuses(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks.select(text)


def test_a_file_of_ones_own_in_the_short_form(tmp_path: Path) -> None:
    own_data(tmp_path)
    path = tmp_path / "tasks.yaml"
    path.write_text(
        "captions: {data: mine.jsonl, metrics: [cider], expected_items: 2}\n"
        "describe:\n  data: mine.jsonl\n  metrics: [bleu]\n  prompt: 'describe {prefix}'\n"
        "  decoding: {max_new_tokens: 9}\n  post: lower\n"
    )
    captions, describe = tasks.load_file(path)
    assert captions.split().expected_items == 2
    assert describe.load(Path())[0].prefix == "describe caption en"
    assert describe.decoding == TaskDecoding(max_new_tokens=9) and describe.post_process("A Cat") == "a cat"
    assert [found.label for found in tasks.select(str(path))] == ["captions", "describe"]


def test_a_file_of_ones_own_in_the_long_form(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(
        "name: photos\ntitle: my photos\nformat: coco_captions\ndefault_split: val\nprompt: caption en\n"
        "metrics: [cider]\nsplits:\n  val:\n    files:\n"
        "      captions: {path: photos.json}\n      images: {path: photos}\n"
    )
    [task] = tasks.load_file(path)
    draw(tmp_path / "photos" / "a.png")
    content = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [{"image_id": 7, "caption": "a cat"}]}
    (tmp_path / "photos.json").write_text(json.dumps(content))
    [example] = task.load(tmp_path)
    assert (example.id, example.references) == ("7", ("a cat",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no task in the file"),
        ("mine: 3", "mine: expected a task, such as .* got 3"),
        ("mine: {data: a.jsonl, metrics: [cider], prompts: x}", r"unknown key 'prompts' \(did you mean 'prompt'\?\)"),
        ("mine: {data: a.jsonl}", "key 'metrics' is missing"),
        ("mine: {data: a.jsonl, metrics: []}", "metrics is empty"),
        ("mine: {title: x, format: vqa}", "mine: key 'splits' is missing"),
        ("mine: {data: a.jsonl, metrics: [cider], post: lowr}", r"post 'lowr' \(did you mean 'lower'\?\)"),
        (
            "mine: {data: a.jsonl, metrics: [cider], decoding: {num_beams: 0}}",
            "decoding: num_beams is 0, expected at least 1",
        ),
    ],
)
def test_what_a_file_of_ones_own_must_not_say(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        tasks.load_file(path)
    assert str(error.value).startswith(str(path))


def test_the_table_lists_every_task() -> None:
    head, line, *rows = tasks.table().splitlines()
    assert [row.split()[0] for row in rows] == ALL and set(line) == {"-"} and head.startswith("task")
    pope = next(row for row in rows if row.startswith("pope"))
    assert pope.split()[1:4] == ["all", "(+3)", "-"] and "pope,pope_f1,pope_paligemma" in pope


# --- Loading ----------------------------------------------------------------------------------------------------------


def task_of(data: Path, **changes: object) -> Task:
    task = Task(
        name="mine",
        title="mine",
        format="jsonl",
        splits={"data": Split(files={"data": File(path=str(data))})},
        default_split="data",
        prompt="{prefix}",
        metrics=("cider",),
    )
    return replace(task, **changes)  # type: ignore[arg-type]


def test_limit_takes_the_first_items(tmp_path: Path) -> None:
    task = task_of(own_data(tmp_path, count=4))
    assert [ex.id for ex in task.load(tmp_path, limit=3)] == ["i0", "i1", "i2"]
    assert [ex.line for ex in task.load(tmp_path)] == [1, 2, 3, 4]


def test_braces_in_a_question_stay() -> None:
    assert fill("answer en {question}", {"question": "what is {a} in {question}?"}, "") == (
        "answer en what is {a} in {question}?"
    )
    with pytest.raises(ConfigError, match=r"here: the prompt names \{qestion\} \(did you mean 'question'\?\)"):
        fill("answer en {qestion}", {"question": "x"}, "here")


def test_a_missing_file_says_what_to_download_and_to_where(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        tasks.get("vqav2").load(tmp_path)
    assert str(error.value) == (
        f"task 'vqav2', split 'val': {tmp_path}/vqav2/v2_mscoco_val2014_annotations.json is missing; download"
        " https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Annotations_Val_mscoco.zip and put it there (archives:"
        " unpacked)"
    )


def caption_file(root: Path, count: int) -> None:
    path = root / "nocaps" / "nocaps_val_4500_captions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "domain": "in-domain"} for i in range(count)],
        "annotations": [{"image_id": i, "caption": "a cat"} for i in range(count)],
    }
    path.write_text(json.dumps(content))


def test_missing_images_are_counted_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caption_file(tmp_path, 3)
    draw(tmp_path / "nocaps" / "validation" / "1.jpg")
    with caplog.at_level(logging.WARNING):
        examples = tasks.get("nocaps").load(tmp_path)
    assert len(examples) == 3
    assert "2 of 3 images are missing and count as wrong" in caplog.text and "validation/0.jpg" in caplog.text


def test_no_image_at_all_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    caption_file(tmp_path, 7)
    with pytest.raises(
        DataError, match=r"7 of 7 images are missing: .*0\.jpg.* and 2 more; images belong in .*validation"
    ):
        tasks.get("nocaps").load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff{}", "byte 0xff at column 1 is not UTF-8"),
        (b"[]", r"nocaps/nocaps_val_4500_captions\.json should be an object with keys, got \[\]"),
        (b'{"images": []}', "no 'annotations'; it has 'images'. Is this the official file"),
        (b'{"images": 3, "annotations": []}', "'images' should be a list of objects, got 3"),
        (b'{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}', "'annotations' 0: no 'caption'"),
        (b'{"images": [], "annotations": [{"image_id": 1}]}', "'annotations' 0: image '1' is not among the images"),
        (b'{"images": [], "annotations": []}', "no item in"),
        (b'{"images": [{"id": 1}], "annotations": []}', "item '1' has no gold text; is this a file of the hidden"),
    ],
)
def test_a_broken_official_file_names_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "nocaps" / "nocaps_val_4500_captions.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        tasks.get("nocaps").load(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret.jpg", "a/../../b.jpg", ""])
def test_a_name_in_an_official_file_does_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    caption_file(tmp_path, 1)
    path = tmp_path / "nocaps" / "nocaps_val_4500_captions.json"
    path.write_text(path.read_text().replace("0.jpg", name))
    with pytest.raises(DataError, match=f"image '{name}' does not lie below .*nocaps/validation"):
        tasks.get("nocaps").load(tmp_path)


def test_an_option_that_a_loader_needs_is_named(tmp_path: Path) -> None:
    files = {"captions": File(path="c.json"), "images": File(path="i")}
    task = task_of(tmp_path, format="karpathy", splits={"data": Split(files=files)}, prompt="caption en")
    with pytest.raises(ConfigError, match="task 'mine', split 'data': the loader needs the option 'split'; .* none"):
        task.load(tmp_path)


def test_a_role_that_a_loader_needs_is_named(tmp_path: Path) -> None:
    task = task_of(tmp_path, format="vqa", splits={"data": Split(files={"data": File(path="x")})})
    with pytest.raises(DataError, match="the loader needs a file called 'annotations', the task names 'data'"):
        task.load(tmp_path)


# --- Candidates and groups --------------------------------------------------------------------------------------------


def example(**info: object) -> Example:
    return Example("q1", Path("a.png"), "p", None, (), ("yes",), "f", 1, info=info)


def test_candidates_come_from_the_task_or_the_item() -> None:
    assert tasks.get("pope").candidates_of(example()) == ("yes", "no")
    assert tasks.get("aokvqa_mc").candidates_of(example(choices=("a", "b"))) == ("a", "b")
    sentences = ("The answer is A.", "The answer is B.")
    assert tasks.get("scienceqa").candidates_of(example(choices=("a", "b"), candidates=sentences)) == sentences
    with pytest.raises(DataError, match="task 'vqav2', item 'q1': there is nothing to choose from"):
        tasks.get("vqav2").candidates_of(example())


def test_groups_of_a_breakdown() -> None:
    task = tasks.get("pope")
    assert task.groups([example(split="random")], "split") == {"q1": "random"}
    with pytest.raises(ConfigError, match="1 items have no 'color' to break down by, first 'q1'; items have split"):
        task.groups([example(split="random")], "color")


def test_the_named_clean_ups() -> None:
    text = " A Cat.\nSecond line "
    assert {name: clean(text) for name, clean in tasks.POST.items()} == {
        "none": text,
        "lower": " a cat.\nsecond line ",
        "strip": "A Cat.\nSecond line",
        "first_line": "A Cat.",
    }


def test_items_need_nothing_but_an_id_and_images() -> None:
    assert Item(id="1", images=(Path("a.png"),)).answers == ()


@pytest.mark.parametrize("name", ALL)
def test_the_page_says_what_the_file_says(name: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    task = tasks.get(name)
    prompt = task.prompt.replace("\n", "\\n")
    assert f"| {task.default_split}" in row and f"| `{prompt}` |" in row
    count = task.split().expected_items
    assert (f"| {count:,} |" if count else "|  |") in row
    assert all(f"`{metric}`" in row for metric in task.metrics)
    assert all(f"`{file.path}`" in row for file in task.split().files.values())
