"""Control spellings in prompts and data: found, told once, and removed where somebody asks for it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from coretools import loud
from PIL import Image

import vlm
from vlm.build.presets import tiny
from vlm.data.control import without_control
from vlm.data.reading import read
from vlm.eval import evaluate
from vlm.text import control


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_told", set())


PROMPTS = [
    ("<image>caption en", "caption en"),
    ("<image><image>caption en", "caption en"),
    ("<image> caption en", "caption en"),
    ("<image>\ncaption en", "caption en"),
    ("<bos>caption en", "caption en"),
    ("caption en<eos>", "caption en"),
    ("caption en\n", "caption en"),
    ("caption en \r\n", "caption en"),
    ("<s>[INST] <image>\nWhat is it? [/INST]", "What is it?"),
    ("USER: <image>\nWhat is it? ASSISTANT:", "What is it?"),
    ("### Human: hi\n### Assistant:", "hi"),
    ("<|im_start|>user\nhi<|im_end|>\n", "hi"),
    ("<start_of_turn>user\ncap<end_of_turn>\n<start_of_turn>model\n", "cap"),
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "hi"),
    ("<|image_1|>caption en", "caption en"),
    ("<image_soft_token>caption en", "caption en"),
    ("compare <image> and <image> now", "compare and now"),
    ("a<pad>b", "ab"),
    ("<im<image>age>caption en", "caption en"),
]


@pytest.mark.parametrize(("text", "plain"), PROMPTS)
def test_a_spelling_is_found_and_removed(text: str, plain: str) -> None:
    assert control.find(text) and control.strip_control(text) == plain
    assert control.find(plain) == []


@pytest.mark.parametrize(
    "text",
    ["", "caption en", " caption en ", "answer en is 1 < 2 or 3 > 2?", "detect cat ; dog", "<loc0001><loc0002> cat"]
    + ["see [1] and <image 1>", "answer en what: this?", "a <b>bold</b> word", "what does\nthis say", "User: who?"],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert control.find(text) == [] and control.strip_control(text) == text


def test_a_role_or_a_newline_in_a_target_is_its_text() -> None:
    for text in ("line\n", "USER: me"):
        assert control.find(text, prompt=False) == [] and control.strip_control(text, prompt=False) == text
    assert control.strip_control("a cat</s>", prompt=False) == "a cat"


def test_long_texts_take_no_time() -> None:
    for text in (" " * 90_000 + "<image>" + "\n" * 9_000, "<" * 99_000, "<image> " * 12_000, "<|" * 50_000):
        control.strip_control(text)


def write(folder: Path, prefix: str) -> Path:
    Image.new("RGB", (28, 28), "red").save(folder / "a.png")
    lines = [{"image": "a.png", "prefix": prefix, "suffix": "red"} for _ in range(40)]
    lines[7]["prefix"] = "caption en"
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


def test_a_file_is_told_once_with_what_removes_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examples, _ = read(write(tmp_path, "<image>caption en\n"))
    with caplog.at_level(logging.INFO):
        kept = without_control(examples, "`--strip-control`", strip=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "data.jsonl: '<image>' in 39 of 40 (first line 1); a newline at the end in 39 of 40" in record.message
    assert "images get their place from the processor" in record.message
    assert record.message.endswith("`--strip-control` removes it")
    assert [example.prefix for example in kept] == [example.prefix for example in examples]
    caplog.clear()
    stripped = without_control(examples, "`--strip-control`", strip=True)
    assert {example.prefix for example in stripped} == {"caption en"}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_prompt_is_told_once_in_a_process(caplog: pytest.LogCaptureFixture) -> None:
    model, processor = tiny()
    picture = Image.new("RGB", (28, 28), "red")
    for _ in range(3):
        vlm.generate(model, processor, [picture], ["<image>caption en"], max_new_tokens=1)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "strip_control=True (on the command line --strip-control) removes it" in caplog.records[0].message


def test_stripped_is_what_would_have_been_written(tmp_path: Path) -> None:
    """Processor, generation and evaluation give with `strip_control` what the plain prompt gives."""
    model, processor = loud("siglip", "gemma")
    picture = Image.effect_noise((28, 28), 90).convert("RGB")
    plain, marked = "caption en", "<bos><image>caption en\n"
    one = processor([picture], [plain], ["red"])
    assert torch.equal(one.input_ids, processor([picture], [marked], ["red</s>"], strip_control=True).input_ids)
    assert one.input_ids.shape != processor([picture], [marked], ["red"]).input_ids.shape
    texts = [
        vlm.generate(model, processor, [picture], [prompt], max_new_tokens=8, strip_control=strip)[0]
        for prompt, strip in ((plain, False), (marked, True), (marked, False))
    ]
    assert texts[0] == texts[1] != texts[2]
    path = write(tmp_path, marked)
    for strip, prompts in ((True, {plain}), (False, {plain, marked})):
        out = tmp_path / str(strip)
        evaluate((model, processor), path, "exact_match", out, max_new_tokens=1, progress=False, strip_control=strip)
        lines = (out / "items.jsonl").read_text().splitlines()
        assert {json.loads(line)["prefix"] for line in lines} == prompts
