"""Evaluation of two towers: results against numpy on vectors that are written down, and files as people have them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data.reading import read_pairs
from vlm.errors import ConfigError, DataError, ImageError
from vlm.eval import diff, evaluate_towers
from vlm.eval.tables import table
from vlm.eval.towers import Options, benchmark, data
from vlm.images.load import load_image

QUIET = {"progress": False}
COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


class Colours:
    """An embedder whose vectors anyone can compute: a picture is its first pixel, a text the colour that it names."""

    name, tokens, pools = "colours", None, True
    WORDS: Mapping[str, Sequence[float]] = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "grey": (1, 1, 1)}

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.seen: list[str] = []
        self.views: list[str] = []
        self.read: list[str] = []
        self.stop_after: int | None = None

    def identity(self) -> Mapping[str, Any]:
        return {"weights": "a", **self.settings}

    def images(self, images: Iterable[tuple[str, Any]], *, batch_size: int, view: str, features: str) -> Iterator[Any]:
        self.views.append(view)
        for key, image in images:
            if self.stop_after is not None and len(self.seen) >= self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(str(image))
            try:
                pixel = np.array(load_image(image))[0, 0].astype(np.float32) + 1
            except ImageError as error:
                yield SimpleNamespace(keys=[], vectors=torch.zeros(0, 1), bad=[(key, error)])
                continue
            yield SimpleNamespace(keys=[key], vectors=torch.from_numpy(pixel / np.linalg.norm(pixel))[None], bad=[])

    def texts(self, texts: Sequence[str]) -> Any:
        self.read += texts
        rows = [next((self.WORDS[word] for word in text.split() if word in self.WORDS), (0, 0, 1e-3)) for text in texts]
        vectors = torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)
        return SimpleNamespace(vectors=vectors, cut=[place for place, text in enumerate(texts) if len(text) > 40])

    def prompts(self, names: Sequence[str], templates: str, *, canonical: bool) -> list[tuple[str, ...]]:
        made = [tuple(one.replace("{}", name) for one in (templates or "{}").split("|")) for name in names]
        return [tuple(text.lower() for text in one) for one in made] if canonical else made

    def describe(self, view: str) -> Mapping[str, Any]:
        return {"images": "the first pixel"}


def draw(path: Path, colour: str | tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def pairs(folder: Path) -> Path:
    """Three colours; the green picture has two captions, one of which names another colour."""
    for name, colour in COLOURS.items():
        draw(folder / f"{name}.png", colour)
    return lines(
        folder / "pairs.jsonl",
        [
            {"id": "r", "image": "red.png", "caption": "a red thing"},
            {"id": "g", "image": "green.png", "captions": ["a green thing", "a red or rather green thing"]},
            {"id": "b", "image": "blue.png", "text": "a blue thing"},
        ],
    )


def classes(folder: Path) -> Path:
    """A folder per colour; one picture of each lies in the wrong folder."""
    shades = {"red": [(250, 0, 0), (200, 9, 9), (0, 250, 1)], "green": [(0, 250, 0), (9, 200, 9), (1, 0, 250)]}
    for name, given in shades.items():
        for number, shade in enumerate(given):
            draw(folder / name / f"{number}.png", shade)
    return folder


def run(tasks: str, path: Path, out: Path, embedder: Any = None, **options: Any) -> dict[str, Any]:
    return evaluate_towers(embedder or Colours(), tasks, path, out, options=Options(**{**QUIET, **options}))


def items(folder: Path) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in map(json.loads, (folder / "items.jsonl").read_text().splitlines())}


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_retrieval_counts_captions_as_the_papers_do(tmp_path: Path) -> None:
    outcome = run("retrieval", pairs(tmp_path), tmp_path / "out")
    metrics = outcome["tasks"]["retrieval"]["metrics"]
    # Of four captions, the second of the green picture finds the red one. Every picture has a caption of its own first,
    # but for the red one: its caption and the second of the green picture are the same vector, and the tie counts.
    assert metrics["text_to_image_r@1"]["value"] == 0.75 and metrics["text_to_image_r@1"]["num_items"] == 4
    assert metrics["image_to_text_r@1"]["value"] == pytest.approx(2 / 3)
    assert metrics["text_to_image_median_rank"]["value"] == 1.0
    assert metrics["text_to_image_r@1"]["details"]["by_chance"] == pytest.approx(1 / 3)
    found = items(tmp_path / "out" / "retrieval")
    assert found["text:g#1"]["prediction"] == "r" and found["text:g#1"]["references"] == ["g"]
    assert found["image:b"]["prediction"] == "a blue thing" and found["image:b"]["info"]["rank"] == 1
    assert "text_to_image_r@5" not in metrics  # of three pictures it is always 1
    page = (tmp_path / "out" / "retrieval" / "report.html").read_text()
    assert "a red or rather green thing" in page and "image_to_text_r@1" in table(outcome)


def test_only_the_first_captions_count_and_lines_of_one_picture_are_one(tmp_path: Path) -> None:
    path = pairs(tmp_path)
    items_ = [*read_pairs(path), *read_pairs(lines(tmp_path / "more.jsonl", [{"image": "red.png", "text": "again"}]))]
    (pool,) = data.pools(items_, captions_per_image=1)
    assert pool.texts == ("a red thing", "a green thing", "a blue thing") and pool.owner.tolist() == [0, 1, 2]
    (whole,) = data.pools(items_)
    assert whole.texts[:2] == ("a red thing", "again") and whole.owner.tolist() == [0, 0, 1, 1, 2]


def test_languages_are_searched_alone_and_averaged_without_weights(tmp_path: Path) -> None:
    """English finds all of three, German one of two: 0.75, not 4 of 5."""
    pairs(tmp_path)

    def one_line(colour: str, language: str, text: str) -> dict[str, str]:
        return {"id": f"{colour}_{language}", "image": f"{colour}.png", "text": text, "language": language}

    english = [one_line(colour, "en", f"{colour} thing") for colour in COLOURS]
    german = [one_line(colour, "de", "red Ding") for colour in ("red", "green")]
    path = lines(tmp_path / "both.jsonl", [*english, *german])
    outcome = run("retrieval", path, tmp_path / "out")
    one = outcome["tasks"]["retrieval"]
    assert one["metrics"]["text_to_image_r@1"]["value"] == pytest.approx((1 + 1 / 2) / 2)
    assert one["metrics"]["text_to_image_r@1"]["details"] == {"language de": 0.5, "language en": 1.0}
    assert one["breakdown"]["language"]["text_to_image_r@1"]["en"] == {"mean": 1.0, "num_items": 3}
    assert "text_to_image_r@1: de 0.5000, en 1.0000" in table(outcome)
    with pytest.raises(DataError, match="1 pictures have no language, others have"):
        run("retrieval", lines(tmp_path / "odd.jsonl", [*english, {"image": "blue.png", "text": "x"}]), tmp_path / "o")


def test_shuffled_pictures_are_the_control(tmp_path: Path) -> None:
    shuffled = run("retrieval,", pairs(tmp_path), tmp_path / "out", shuffle_images=True)["tasks"]["retrieval"]
    assert shuffled["metrics"]["image_to_text_r@1"]["value"] < 2 / 3
    assert shuffled["images_shuffled_with_seed"] == 0
    by_class = run("zeroshot", classes(tmp_path / "c"), tmp_path / "c-out", shuffle_images=True)["tasks"]["zeroshot"]
    images = {key: one["images"] for key, one in items(tmp_path / "c-out" / "zeroshot").items()}
    assert by_class["num_items"] == 6 and all(not one[0].endswith(key) for key, one in images.items())


# --- classes ----------------------------------------------------------------------------------------------------------


def test_zero_shot_of_a_folder_and_of_a_file(tmp_path: Path) -> None:
    folder = classes(tmp_path / "classes")
    outcome = run("zeroshot", folder, tmp_path / "out")["tasks"]["zeroshot"]
    accuracy = outcome["metrics"]["accuracy"]
    # red/2 is green; green/2 is blue, as far from red as from green: a tie, which counts against.
    assert accuracy["value"] == pytest.approx(4 / 6) and accuracy["best_constant"]["value"] == 0.5
    assert accuracy["details"]["mean_over_classes"] == pytest.approx(2 / 3)
    assert items(tmp_path / "out" / "zeroshot")["red/2.png"]["prediction"] == "green"
    files = sorted(folder.rglob("*.png"))
    records = [{"image": str(one.relative_to(folder)), "label": one.parent.name} for one in files]
    again = run("zeroshot", lines(folder / "all.jsonl", records), tmp_path / "again")["tasks"]["zeroshot"]
    assert again["metrics"]["accuracy"]["value"] == accuracy["value"]


def test_templates_are_averaged_as_vectors_of_length_1(tmp_path: Path) -> None:
    """A class of two texts, red and blue, lies between both: bluish red is nearer to it than to plain red."""
    folder = tmp_path / "c"
    draw(folder / "mixed" / "1.png", (250, 0, 250))
    draw(folder / "red" / "1.png", (250, 0, 0))
    embedder = Colours()
    embedder.prompts = lambda names, *_, **__: [("red", "blue"), ("red", "red")]  # type: ignore[method-assign]
    outcome = run("zeroshot", folder, tmp_path / "out", embedder)
    assert outcome["tasks"]["zeroshot"]["metrics"]["accuracy"]["value"] == 1.0
    store = [json.loads(one) for one in (tmp_path / "out/vectors/texts.jsonl").read_text().splitlines()]
    mixed = np.frombuffer(base64.b64decode(store[0]["vector"]), "<f4")
    assert mixed == pytest.approx([2**-0.5, 0, 2**-0.5])


def test_the_papers_protocol_is_named_recorded_and_taken_by_the_benchmark(tmp_path: Path) -> None:
    embedder = Colours()
    folder = classes(tmp_path / "imagenet" / "val")
    names = tmp_path / "imagenet" / "classnames.txt"
    names.write_text("green GREEN, viridian\nred RED, crimson\n")
    outcome = run("imagenet", tmp_path, tmp_path / "out", embedder, templates="")
    one = outcome["tasks"]["imagenet"]
    assert embedder.views == ["paper"] and one["protocol"]["name"] == "paper" and one["task"]["protocol_is_the_tasks"]
    assert set(embedder.read) == {"imagenet"} and folder  # the stand-in has no such templates: the name reached it
    plain = run("imagenet", tmp_path, tmp_path / "plain", embedder, protocol="plain")["tasks"]["imagenet"]
    assert not plain["task"]["protocol_is_the_tasks"] and "GREEN, viridian" in embedder.read


def test_classes_that_are_one_text_are_told_and_wrong(tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"green": "crane", "red": "crane"}))
    one = run("zeroshot", classes(tmp_path / "c"), tmp_path / "out", class_names=names)["tasks"]["zeroshot"]
    assert one["metrics"]["accuracy"]["value"] == 0.0
    assert "2 classes are 1 texts, as 'green' and 'red'" in one["metrics"]["accuracy"]["notes"][0]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("n.json", '{"n2": "dog", "n1": "cat, tabby"}', {"n1": "cat, tabby", "n2": "dog"}),
        ("n.json", '["cat", "dog"]', {"n1": "cat", "n2": "dog"}),
        ("n.txt", "n1\tbig cat\nn2\tdog\n", {"n1": "big cat", "n2": "dog"}),
        ("n.txt", "n1 big cat\nn2 dog\nn3 fish\n", {"n1": "big cat", "n2": "dog", "n3": "fish"}),
        ("n.txt", "big cat\nsmall dog\n", {"n1": "big cat", "n2": "small dog"}),
    ],
)
def test_names_of_classes(name: str, text: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert data.class_names(tmp_path / name, ["n1", "n2"]) == expected


def test_probes_learn_from_one_set_and_are_judged_on_another(tmp_path: Path) -> None:
    train = classes(tmp_path / "both" / "train")
    for name in ("red", "green"):
        (train / name / "2.png").unlink()  # the one in the wrong folder
    draw(tmp_path / "both" / "test" / "red" / "x.png", (240, 3, 3))
    draw(tmp_path / "both" / "test" / "green" / "x.png", (3, 240, 3))
    draw(tmp_path / "both" / "test" / "blue" / "x.png", (3, 3, 240))
    outcome = run("knn,linear", tmp_path / "both", tmp_path / "out", neighbours=1)
    for name in ("knn", "linear"):
        one = outcome["tasks"][name]
        assert one["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
        assert one["protocol"]["num_train"] == 4
        assert "1 classes are in no picture to learn from" in one["metrics"]["accuracy"]["notes"][0]
    with pytest.raises(DataError, match="knn learns from pictures with classes: give --train"):
        run("knn", tmp_path / "both" / "train", tmp_path / "o")


# --- what can be relied on --------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_every_picture_is_embedded_once(tmp_path: Path) -> None:
    folder, whole = classes(tmp_path / "c"), Colours()
    expected = run("zeroshot", folder, tmp_path / "whole", whole)
    killed = Colours()
    killed.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        run("zeroshot", folder, tmp_path / "out", killed)
    store = tmp_path / "out/vectors/images-plain-pooled.jsonl"
    store.write_bytes(store.read_bytes()[:-5])  # torn by the kill
    second = Colours()
    found = run("zeroshot", folder, tmp_path / "out", second)
    assert len(second.seen) == len(whole.seen) - 2
    assert found["tasks"]["zeroshot"]["metrics"] == expected["tasks"]["zeroshot"]["metrics"]
    assert items(tmp_path / "out/zeroshot") == items(tmp_path / "whole/zeroshot")
    third = Colours()
    run("zeroshot", folder, tmp_path / "out", third)
    assert third.seen == [] and third.read == []
    draw(folder / "red" / "0.png", (7, 0, 0))  # a picture that was changed is embedded anew, and it alone
    fourth = Colours()
    run("zeroshot", folder, tmp_path / "out", fourth)
    assert [Path(one).name for one in fourth.seen] == ["0.png"]
    with pytest.raises(ConfigError, match="vectors made with other settings .*other weights of the model"):
        run("zeroshot", folder, tmp_path / "out", Colours(weights="b"))


def test_pictures_that_cannot_be_read_are_wrong_and_listed(tmp_path: Path) -> None:
    path = pairs(tmp_path)
    (tmp_path / "blue.png").write_bytes(b"no picture")
    outcome = run("retrieval", path, tmp_path / "out")
    one = outcome["tasks"]["retrieval"]
    assert outcome["skipped"] == 1 and [(f["id"], f["code"]) for f in one["failures"]] == [("b", "not-an-image")]
    assert one["metrics"]["text_to_image_r@1"]["num_items"] == 4 and one["metrics"]["text_to_image_r@1"]["value"] == 0.5
    found = items(tmp_path / "out" / "retrieval")
    assert found["image:b"]["prediction"] == "" and found["image:b"]["info"]["rank"] == 4
    assert found["text:b#0"]["info"]["rank"] == 3
    for name in ("red", "green"):
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 1 images could be decoded"):  # all three have the same content
        run("retrieval", path, tmp_path / "bad")


def test_two_results_are_compared_pair_by_pair(tmp_path: Path) -> None:
    path = pairs(tmp_path)
    run("retrieval", path, tmp_path / "a")

    class Blind(Colours):
        WORDS = {**Colours.WORDS, "blue": (1, 0, 0)}

    run("retrieval", path, tmp_path / "b", Blind(weights="b"))
    found = diff.compare(tmp_path / "a" / "retrieval", tmp_path / "b" / "retrieval")
    assert found["metrics"]["text_to_image_r@1"]["worse"] == 1
    assert found["metrics"]["text_to_image_r@1"]["difference"] == -0.25
    assert found["metrics"]["image_to_text_r@1"]["a"] == pytest.approx(2 / 3)
    assert "median of every resample" in found["metrics"]["image_to_text_median_rank"]["method"]
    assert [one["change"] for one in found["changed"]].count("worse") >= 1 and diff.table(found)


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_published_figures_are_those_of_the_checkpoint_of_that_name() -> None:
    (coco,), (imagenet,) = benchmark.chosen("coco_retrieval"), benchmark.chosen("imagenet")

    def values(one: Any, model: str, tokens: int | None = None) -> dict[str, float]:
        return {f["metric"]: f["value"] for f in benchmark.facts(one, model, tokens)["published"]}

    both = {"text_to_image_r@1": 52.0, "image_to_text_r@1": 70.2}  # arXiv 2303.15343, table 3
    assert values(coco, "google/siglip-so400m-patch14-384") == both
    assert values(coco, "/models/siglip-so400m-patch14-384/") == both
    assert values(imagenet, "google/siglip2-giant-opt-patch16-384") == {"accuracy": 85.0}  # arXiv 2502.14786, table 1
    assert values(imagenet, "google/siglip2-so400m-patch16-naflex", 64) == {"accuracy": 78.5}
    assert values(imagenet, "google/siglip2-so400m-patch16-naflex", 100) == {}
    assert values(imagenet, "runs/mine") == {}
    assert len(benchmark.facts(imagenet, "runs/mine", None)["published_for_other_models"]) == 36


def test_names_of_tasks() -> None:
    found = [one.label for one in benchmark.chosen("zeroshot, xm3600_retrieval@de")]
    assert found == ["zeroshot", "xm3600_retrieval@de"]
    assert benchmark.chosen("vqav2,pope") == []
    with pytest.raises(ConfigError, match="retrieval is for a model of two towers, vqav2 for a model that writes"):
        benchmark.chosen("vqav2,retrieval")
    with pytest.raises(ConfigError, match="named twice"):
        benchmark.chosen("knn,knn")
    with pytest.raises(ConfigError, match="no split 'dev'"):
        benchmark.chosen("coco_retrieval@dev")


def karpathy(root: Path) -> None:
    images = []
    for number, colour in enumerate(COLOURS):
        draw(root / "coco/val2014" / f"{number}.jpg", COLOURS[colour])
        about = {"filename": f"{number}.jpg", "filepath": "val2014", "imgid": number, "cocoid": number + 7}
        sentences = [{"raw": f"a {colour} thing {n}"} for n in range(6)]
        images.append({**about, "split": "test", "sentences": sentences})
    (root / "coco/dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def xm3600(root: Path) -> None:
    records = []
    for key, colour in (("k1", "red"), ("k2", "green")):
        draw(root / "xm3600/images" / f"{key}.jpg", COLOURS[colour])
        languages = benchmark.get("xm3600_retrieval").split().options["languages"]
        records.append({"image/key": key, **{lang: {"caption": [f"{colour} {lang}"]} for lang in languages}})
    lines(root / "xm3600/captions.jsonl", records)


def test_official_files_of_benchmarks_are_read(tmp_path: Path) -> None:
    karpathy(tmp_path)
    xm3600(tmp_path)
    outcome = run("coco_retrieval,xm3600_retrieval", tmp_path, tmp_path / "out")
    coco = outcome["tasks"]["coco_retrieval"]
    assert coco["metrics"]["text_to_image_r@1"]["num_items"] == 15  # the first five captions of each picture
    assert coco["metrics"]["image_to_text_r@1"]["value"] == 1.0 and coco["task"]["expected_items"] == 5000
    assert coco["task"]["published"] == [] and "none of this name, are in results.json" in table(outcome)
    xm = outcome["tasks"]["xm3600_retrieval"]
    assert len(xm["metrics"]["text_to_image_r@1"]["details"]) == 36
    with pytest.raises(DataError, match="dataset_flickr30k.json is missing; download"):
        run("flickr30k_retrieval", tmp_path, tmp_path / "o")


def test_refused(tmp_path: Path) -> None:
    draw(tmp_path / "one" / "red" / "1.png", "red")
    with pytest.raises(DataError, match="every picture has the class 'red'"):
        run("zeroshot", tmp_path / "one", tmp_path / "o")
    (tmp_path / "one" / "empty").mkdir()
    with pytest.raises(DataError, match="no picture in the folder of this class"):
        run("zeroshot", tmp_path / "one", tmp_path / "o")
    folder = classes(tmp_path / "c")
    (tmp_path / "names.txt").write_text("red\tscarlet\nblue\tazure\n")
    with pytest.raises(DataError, match="1 classes of .* have no name in .*names.txt: green"):
        run("zeroshot", folder, tmp_path / "o", class_names=tmp_path / "names.txt")
    with pytest.raises(DataError, match="is a folder; retrieval reads JSONL"):
        run("retrieval", folder, tmp_path / "o")
    twice = {"image": "red/1.png", "text": "a", "caption": "b"}
    bare = lines(tmp_path / "c" / "bare.jsonl", [{"image": "red/0.png"}, twice])
    with pytest.raises(DataError, match="(?s)no text belongs to the image.*'text' and 'caption': only one is read"):
        run("retrieval", bare, tmp_path / "o")
    alone = lines(tmp_path / "c" / "alone.jsonl", [{"image": "red/0.png", "text": "a"}])
    with pytest.raises(DataError, match="at least two pictures with captions, got 1"):
        run("retrieval", alone, tmp_path / "o")


def test_beside_the_published_figures_of_its_checkpoint(tmp_path: Path) -> None:
    karpathy(tmp_path)
    embedder = Colours()
    embedder.name = "models/siglip-base-patch16-224"
    outcome = run("coco_retrieval", tmp_path, tmp_path / "out", embedder)
    text, page = table(outcome), (tmp_path / "out/coco_retrieval/report.html").read_text()
    assert "47.2 (google/siglip-base-patch16-224 at 224)" in text and "64.4 (google/siglip-base" in text
    assert "only 3 of 5000 items were evaluated" in page and "Published for other checkpoints" in page


@pytest.mark.parametrize("name", benchmark.names())
def test_the_page_says_what_the_tasks_are(name: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    task = benchmark.get(name)
    assert f"| {task.protocol} |" in row and f"| {task.default_split or 'yours'}" in row
    for split in [task.split()] if task.splits else []:
        assert f"| {split.expected_items:,} |" in row
        assert all(f"`{file.path}`" in row for file in split.files.values())
