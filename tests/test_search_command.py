"""`vlm search`: what it prints, against transformers' own embeddings and sums by hand; what it refuses and serves."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from coretools import picture
from safetensors.torch import load_file, save_file
from test_zero_shot import write

from vlm.cli import main
from vlm.cli.vectors import Opened
from vlm.siglip import load
from vlm.siglip.search.asking import Query
from vlm.siglip.space import of
from vlm.siglip.writing import VectorWriter

ODD = "b/<b>\"'é 星.png"
COUNT = 7


class Collection(NamedTuple):
    """Pictures on the disk, their vectors as transformers has them, and the folder that holds both."""

    model: Path
    vectors: Path
    pictures: list[Path]
    ids: list[str]
    images: np.ndarray
    texts: dict[str, np.ndarray]


QUERIES = ("red cat", "a photo of a dog")


def unit(values: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


def record(name: str, path: Path | None, text: str | None = None, **info: Any) -> dict[str, Any]:
    image = None if path is None else {"path": str(path)}
    return {"id": name, "stamp": "0", "source": "here", "image": image, "text": text, "info": info}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    folder = tmp_path_factory.mktemp("collection")
    theirs = write(folder / "model", "siglip")
    model, processor = load(folder / "model")
    pictures = [folder / f"{number}.png" for number in range(COUNT)]
    for number, path in enumerate(pictures):
        picture(number, (28, 28)).save(path)
    ids = [*(f"a/{number}" for number in range(COUNT - 1)), ODD]
    with torch.no_grad():
        pixels = processor.images([picture(number, (28, 28)) for number in range(COUNT)])
        images = unit(theirs.get_image_features(**pixels).pooler_output)
        texts = unit(theirs.get_text_features(processor.texts(QUERIES).input_ids).pooler_output)
    rows = [
        record(name, path, part=number % 2, kind="x" if number else "y")
        for number, (name, path) in enumerate(zip(ids, pictures, strict=True))
    ]
    with VectorWriter(folder / "vectors", of(model, processor), "images", model=str(folder / "model")) as writer:
        writer.add(rows, images)
        writer.commit()
    by_text = dict(zip(QUERIES, texts.double().numpy(), strict=True))
    return Collection(folder / "model", folder / "vectors", pictures, ids, images.double().numpy(), by_text)


def best(collection: Collection, vector: np.ndarray, k: int = COUNT) -> list[tuple[str, float]]:
    scores = collection.images @ vector
    return [(collection.ids[row], float(scores[row])) for row in np.argsort(-scores, kind="stable")[:k]]


def searched(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["search", *map(str, words)]) == code, capsys.readouterr().err
    said = capsys.readouterr()
    return said.out, said.err


def as_json(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> list[Any]:
    return [json.loads(line) for line in searched(capsys, *words, "--json", code=code)[0].splitlines()]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_each_query_is_one_object_with_the_scores_of_transformers(
    collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    said = as_json(capsys, collection.vectors, *QUERIES, "-k", 3)
    assert [one["query"] for one in said] == list(QUERIES)
    for one in said:
        assert set(one) == {"query", "results"}
        wanted = best(collection, collection.texts[one["query"]], 3)
        assert [set(result) for result in one["results"]] == [{"id", "score", "rank"}] * 3
        assert [result["id"] for result in one["results"]] == [id for id, _ in wanted]
        assert [result["rank"] for result in one["results"]] == [1, 2, 3]
        assert [result["score"] for result in one["results"]] == pytest.approx([score for _, score in wanted], abs=1e-5)


def test_more_than_there_are_are_all_of_them_once(collection: Collection, capsys: pytest.CaptureFixture[str]) -> None:
    (said,) = as_json(capsys, collection.vectors, "red cat", "-k", 1000)
    assert sorted(one["id"] for one in said["results"]) == sorted(collection.ids)
    table, told = searched(capsys, collection.vectors, "red cat", "-k", 2)
    wanted = best(collection, collection.texts["red cat"], 2)
    assert table.splitlines()[0] == "red cat: 2 of 7, by cosine similarity"
    assert [line.split() for line in table.splitlines()[2:]] == [
        [str(rank), f"{score:.4f}", *id.split()] for rank, (id, score) in enumerate(wanted, 1)
    ]
    assert "1 query of 7 entries" in told


def test_a_picture_asks_and_with_words_the_ranks_are_fused(
    collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    file = collection.pictures[2]
    (alone,) = as_json(capsys, collection.vectors, "--image", file, "-k", 1)
    assert alone["query"] == str(file) and alone["results"][0]["id"] == "a/2"
    assert alone["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    # A word behind --image FILE is a query, and not another file.
    both = as_json(capsys, collection.vectors, "--image", file, *QUERIES)
    assert [one["query"] for one in both] == list(QUERIES)
    for one in both:
        assert one["images"] == [str(file)] and "reciprocal rank fusion of 2" in one["fusion"] and "60" in one["fusion"]
        sums: dict[str, float] = {}
        for vector in (collection.texts[one["query"]], collection.images[2]):
            for rank, (id, _) in enumerate(best(collection, vector), 1):
                sums[id] = sums.get(id, 0) + 1 / (60 + rank)
        wanted = sorted(sums.items(), key=lambda pair: (-pair[1], collection.ids.index(pair[0])))
        assert [result["id"] for result in one["results"]] == [id for id, _ in wanted]
        assert [result["score"] for result in one["results"]] == pytest.approx([score for _, score in wanted])
    several = as_json(capsys, collection.vectors, "--image", file, "--image", collection.pictures[4], "-k", 1)
    assert [one["results"][0]["id"] for one in several] == ["a/2", "a/4"]


def test_queries_come_from_stdin(
    collection: Collection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    given(b"red cat\n\n  \na photo of a dog")
    said = as_json(capsys, collection.vectors, "-")
    assert [one["query"] for one in said] == list(QUERIES)
    given(b"\n\n")
    assert "no line of stdin" in searched(capsys, collection.vectors, "-", code=2)[1]
    given(b"red\n\xff\n")
    assert "stdin, line 2" in searched(capsys, collection.vectors, "-", code=2)[1]


def test_filters_leave_fewer_and_one_that_nothing_holds_is_no_error(
    collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (collection.vectors, "red cat")
    (said,) = as_json(capsys, *words, "--where", "part=1")
    assert [one["id"] for one in said["results"]] == [
        id for id, _ in best(collection, collection.texts["red cat"]) if collection.ids.index(id) % 2
    ]
    (said,) = as_json(capsys, *words, "--where", "part=0", "--where", "kind=y")
    assert [one["id"] for one in said["results"]] == ["a/0"]
    assert as_json(capsys, *words, "--where", "part=5") == [{"query": "red cat", "results": []}]
    assert "no entry holds part=5" in searched(capsys, *words, "--where", "part=5")[1]


def test_a_long_query_is_told_and_answered(collection: Collection, capsys: pytest.CaptureFixture[str]) -> None:
    told = searched(capsys, collection.vectors, "red cat " * 20, "red cat")[1]
    assert told.count("longer than the 12 tokens") == 1


def test_texts_that_were_embedded_are_shown(
    collection: Collection, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, processor = load(collection.model)
    with VectorWriter(tmp_path / "v", of(model, processor), "texts", model=str(collection.model)) as writer:
        rows = [record(f"t:{number}", None, text) for number, text in enumerate(QUERIES)]
        writer.add(rows, torch.from_numpy(np.stack(list(collection.texts.values()))).float())
        writer.commit()
    page = tmp_path / "g.html"
    table, _ = searched(capsys, tmp_path / "v", "red cat", "--html", page)
    assert re.search(r"1 +1\.0000 +t:0 +red cat", table)
    assert "<img" not in page.read_text() and "a photo of a dog" in page.read_text()


def test_the_page_holds_the_pictures(
    collection: Collection, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "g.html"
    words = (collection.vectors, "red <cat>", "--image", collection.pictures[0], "--html", file)
    searched(capsys, *words, "--where", "part=0")
    page = file.read_text()
    assert page.count('src="data:image/png;base64,') == 4 + 1  # those that were found, and the one that asked
    assert "red &lt;cat&gt;" in page and "<b>4</b> of 7" in page and "reciprocal rank fusion" in page
    assert "&lt;b&gt;&quot;&#x27;é 星.png" in page and ODD not in page and not re.search(r'src="(?!data:)', page)


# --- what is refused, what goes on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["V", "red", "-k", "0"], "at least 1"),
        (["V", ""], "empty QUERY"),
        (["V", " \t"], "empty QUERY"),
        (["V"], "nothing to look for"),
        (["V", "red", "--image", "gone.png"], "gone.png: no such file"),
        (["V", "--image", "gone.png"], "gone.png: no such file"),
        (["gone", "red"], "no vectors here"),
        (["V", "red", "--where", "part"], "key=value"),
        (["V", "red", "--where", "prt=1"], "did you mean 'part'"),
        (["V", "red", "--port", "1"], "--port without --serve"),
        (["V", "red", "--serve"], "--serve with QUERY"),
        (["V", "red", "--index", "ivf"], "no index ivf of faiss"),
        (["V", "red", "--model", "gone"], "gone: no such directory"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    collection: Collection, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    given = [str(collection.vectors) if word == "V" else word for word in words]
    out, told = searched(capsys, *given, code=2)
    assert out == "" and says in told and "Traceback" not in told


def test_a_model_that_has_moved_is_told(
    collection: Collection, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(collection.vectors, tmp_path / "v")
    manifest = json.loads((tmp_path / "v" / "manifest.json").read_text())
    (tmp_path / "v" / "manifest.json").write_text(json.dumps({**manifest, "model": str(tmp_path / "gone")}))
    assert "if it has moved, name it with --model" in searched(capsys, tmp_path / "v", "red cat", code=2)[1]
    assert as_json(capsys, tmp_path / "v", "red cat", "--model", collection.model) == as_json(
        capsys, collection.vectors, "red cat"
    )


def test_a_model_of_another_space_is_refused_with_the_difference(
    collection: Collection, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(collection.model, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("weight"))
    save_file({**tensors, name: tensors[name] + 0.5}, weights, metadata={"format": "pt"})
    told = searched(capsys, collection.vectors, "red", "--model", tmp_path, code=2)[1]
    assert "weights of the model" in told and "another space" in told


def test_a_picture_that_cannot_be_read_does_not_keep_the_others_from_asking(
    collection: Collection, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images = [tmp_path / "bad.png", collection.pictures[3]]
    words = [word for image in images for word in ("--image", image)]
    said = as_json(capsys, collection.vectors, *words, "-k", 1, code=3)
    assert [one["results"][0]["id"] for one in said] == ["a/3"]
    assert "bad.png" in searched(capsys, collection.vectors, *words, code=3)[1]
    assert "bad.png" in searched(capsys, collection.vectors, "red", *words, code=2)[1]


def test_vectors_that_are_being_written_are_searched_as_they_were(
    collection: Collection, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, processor = load(collection.model)
    space = of(model, processor)
    vectors = torch.from_numpy(collection.images).float()
    with VectorWriter(tmp_path / "v", space, "images", model=str(collection.model)) as writer:
        assert "no vectors in it yet" in searched(capsys, tmp_path / "v", "red cat")[1]
        writer.add([record(name, None) for name in collection.ids[:3]], vectors[:3])
        writer.commit()
        opened = Opened(tmp_path / "v", load, device="cpu")
        # One entry is embedded anew, one is dropped, others come, and some of it is not committed yet.
        writer.add([record(name, None) for name in [collection.ids[1], *collection.ids[3:5]]], vectors[[6, 3, 4]])
        writer.drop([collection.ids[0]])
        writer.commit()
        writer.add([record(collection.ids[5], None)], vectors[5:6])
        (before,) = opened.searcher.answer([Query(likes=(collection.ids[1],))], 10)
        assert sorted(before.rows) == [0, 1, 2] and before.scores[0] == pytest.approx(1, abs=1e-5)
        (now,) = as_json(capsys, tmp_path / "v", "red cat")
        assert {one["id"] for one in now["results"]} == set(collection.ids[1:5])
        scores = {one["id"]: one["score"] for one in now["results"]}
        wanted = collection.images[[6, 2, 3, 4]] @ collection.texts["red cat"]
        assert [scores[id] for id in collection.ids[1:5]] == pytest.approx(list(wanted), abs=1e-5)


def test_an_index_is_built_and_asked(collection: Collection, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    assert "recall@6 1.0000" in searched(capsys, collection.vectors, "--index", "flat")[0]
    through = as_json(capsys, collection.vectors, *QUERIES, "--index", "flat")
    assert through == as_json(capsys, collection.vectors, *QUERIES)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_served_until_ctrl_c(collection: Collection) -> None:
    words = [sys.executable, "-m", "vlm", "search", str(collection.vectors), "--serve", "--port", "0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = []
    try:
        for line in process.stderr:
            told.append(line)
            if address := re.search(r"http://127\.0\.0\.1:\d+/", line):
                break
        assert address is not None, told
        with urllib.request.urlopen(f"{address[0]}api/search?q=red+cat&k=2", timeout=60) as answer:
            said = json.load(answer)
        with urllib.request.urlopen(address[0] + said["results"][0]["picture"][1:], timeout=60) as answer:
            assert answer.headers["Content-Type"] == "image/png"
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    wanted = best(collection, collection.texts["red cat"], 2)
    assert [one["id"] for one in said["results"]] == [id for id, _ in wanted]
    assert [one["score"] for one in said["results"]] == pytest.approx([score for _, score in wanted], abs=1e-5)
    assert process.returncode == 130 and out == "" and rest == "interrupted\n"
