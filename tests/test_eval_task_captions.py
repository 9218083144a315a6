"""Loaders of captions, each on a tiny sample in the official format that is written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tasktools import Root, as_scored_files, load

from vlm.errors import DataError
from vlm.eval import tasks


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_karpathy_coco(root: Root) -> None:
    def row(number: int, split: str, folder: str) -> dict[str, Any]:
        sentences = [{"raw": f"a cat {number}.", "tokens": ["a", "cat"], "sentid": 1}, {"raw": "Cat!", "tokens": []}]
        name = f"COCO_{folder}_{number:012d}.jpg"
        return {
            "filepath": folder,
            "filename": name,
            "imgid": 0,
            "cocoid": number,
            "split": split,
            "sentences": sentences,
        }

    rows = [
        row(42, "val", "val2014"),
        row(43, "restval", "val2014"),
        row(9, "train", "train2014"),
        row(7, "test", "val2014"),
    ]
    root.json("coco/dataset_coco.json", {"dataset": "coco", "images": rows})
    root.images("coco/val2014/COCO_val2014_000000000042.jpg", "coco/val2014/COCO_val2014_000000000007.jpg")
    [example] = load("cococap", root)
    assert (example.id, example.prefix, example.references) == ("42", "caption en", ("a cat 42.", "Cat!"))
    assert [ex.id for ex in load("cococap", root, "test")] == ["7"]


def test_karpathy_flickr30k(root: Root) -> None:
    row = {"filename": "1007129816.jpg", "imgid": 67, "split": "test", "sentences": [{"raw": "A man."}], "sentids": [1]}
    root.json("flickr30k/dataset_flickr30k.json", {"dataset": "flickr30k", "images": [row]})
    root.images("flickr30k/flickr30k-images/1007129816.jpg")
    [example] = load("flickr30k", root)
    assert (example.id, example.references) == ("67", ("A man.",))


def test_coco_captions_and_nocaps(root: Root) -> None:
    captions = [{"image_id": 5, "id": i, "caption": text} for i, text in enumerate(("a dog", "dog"))]
    image = {"id": 5, "file_name": "COCO_val2014_000000000005.jpg", "width": 4, "height": 3}
    root.json("coco/annotations/captions_val2014.json", {"info": {}, "images": [image], "annotations": captions})
    root.images("coco/val2014/COCO_val2014_000000000005.jpg", "nocaps/validation/0013ea2087020901.jpg")
    [example] = load("coco_captions_val2014", root)
    assert (example.id, example.references, dict(example.info)) == ("5", ("a dog", "dog"), {})
    novel = {"id": 5, "open_images_id": "0013ea2087020901", "file_name": "0013ea2087020901.jpg", "domain": "out-domain"}
    root.json("nocaps/nocaps_val_4500_captions.json", {"images": [novel], "annotations": captions})
    [example] = load("nocaps", root)
    assert example.info == {"domain": "out-domain"} and example.references == ("a dog", "dog")
    as_scored_files("nocaps", [example], root.path / "nocaps/nocaps_val_4500_captions.json")


def test_textcaps_brings_the_captions_of_an_image_together(root: Root) -> None:
    row = {"image_id": "abc", "image_name": "abc", "caption_id": 1, "caption_str": "A sign that says STOP"}
    other = {**row, "image_id": "def", "image_name": "def", "caption_str": "a book"}
    root.json("textcaps/TextCaps_0.1_val.json", {"data": [row, other, {**row, "caption_str": "Stop"}]})
    root.images("textvqa/train_images/abc.jpg", "textvqa/train_images/def.jpg")
    first, second = load("textcaps", root)
    assert (first.id, first.references) == ("abc", ("A sign that says STOP", "Stop"))
    assert second.references == ("a book",) and tasks.get("textcaps").decoding.num_beams == 3


def test_coco35l(root: Root) -> None:
    def row(caption: str, language: str, translation: str) -> dict[str, str]:
        return {
            "image_id": caption,
            "caption_tokenized": f"english {caption}",
            "trg_lang": language,
            "translation_tokenized": translation,
        }

    rows = [
        row("42_1", "de", "eine Katze"),
        row("42_2", "de", "Katze"),
        row("42_1", "fr", "un chat"),
        row("7_3", "fr", "chien"),
    ]
    root.lines("coco35l/coco_mt_dev.jsonl", rows)
    names = {42: "COCO_val2014_000000000042.jpg", 7: "COCO_val2014_000000000007.jpg"}
    images = [{"cocoid": key, "filepath": "val2014", "filename": name} for key, name in names.items()]
    root.json("coco/dataset_coco.json", {"images": images})
    root.images(*(f"coco/val2014/{name}" for name in names.values()))
    english = load("coco35l", root, "en")
    assert [(ex.id, ex.prefix, ex.references) for ex in english] == [
        ("42_en", "caption en", ("english 42_1", "english 42_2"))
    ]
    others = load("coco35l", root)
    assert [(ex.id, ex.prefix) for ex in others] == [
        ("42_de", "caption de"),
        ("42_fr", "caption fr"),
        ("7_fr", "caption fr"),
    ]
    assert tasks.get("coco35l").groups(others, "language") == {"42_de": "de", "42_fr": "fr", "7_fr": "fr"}


def test_xm3600(root: Root) -> None:
    languages = [name for name in tasks.get("xm3600").splits if name != "avg35"]
    row: dict[str, Any] = {"image/key": "0001eeaf4aed83f9", "image/locale": "en"}
    row |= {name: {"caption": [f"{name} one", f"{name} two"], "caption/tokenized": ["x"]} for name in languages}
    root.lines("xm3600/captions.jsonl", [row])
    root.images("xm3600/images/0001eeaf4aed83f9.jpg")
    [thai] = load("xm3600", root, "th")
    assert (thai.id, thai.prefix, thai.references) == ("0001eeaf4aed83f9_th", "caption th", ("th one", "th two"))
    assert len(load("xm3600", root)) == 35


def test_screen2words(root: Root) -> None:
    root.text("screen2words/screen_summaries.csv", 'screenId,summary\n7,a login page\n8,other\n7,"sign in, please"\n')
    root.text("screen2words/split/test_screens.txt", "7\n")
    root.images("rico/combined/7.jpg")
    [example] = load("screen2words", root)
    assert (example.id, example.references) == ("7", ("a login page", "sign in, please"))
    root.text("screen2words/split/test_screens.txt", "7\n9\n")
    with pytest.raises(DataError, match="screen_summaries.csv: no summary of screen 9"):
        load("screen2words", root)
    root.text("screen2words/screen_summaries.csv", "screen,text\n")
    with pytest.raises(DataError, match="expected the columns screenId and summary, got screen, text"):
        load("screen2words", root)
