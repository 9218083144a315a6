"""`vlm classify` as it is typed: scores are those of transformers' model, whatever cannot be used is told."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from coretools import picture
from test_zero_shot import write

from vlm.cli import main
from vlm.cli.commands.classify import TemplateSet
from vlm.model.dual import OBJECTIVES
from vlm.siglip.calibration import fit
from vlm.siglip.loading import load
from vlm.siglip.templates import OPENAI, TEMPLATES

LABELS = ["cat", "Blue dog", "tree"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny checkpoint, transformers' model of it, and pictures: twelve good ones, a bad one last."""
    folder = tmp_path_factory.mktemp("classify")
    theirs = write(folder / "m", "siglip")
    pictures = [picture(seed, (28 + seed, 40)) for seed in range(12)]
    (folder / "pics").mkdir()
    for number, image in enumerate(pictures):
        image.save(folder / "pics" / f"{number:02}.png")
    (folder / "pics" / "bad.png").write_text("no image")
    return {"folder": folder, "theirs": theirs, "pictures": pictures, "processor": load(folder / "m")[1]}


@pytest.fixture(autouse=True)
def at_home(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(world["folder"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[Any], str]:
    """Exit code, the JSON lines of stdout, and stderr."""
    code = run("classify", *words, "-m", "m", "--json")
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def run(*words: str) -> int:
    try:
        return main(list(words))
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def theirs(world: dict[str, Any], texts: list[str]) -> np.ndarray:
    """transformers' logits float[12, texts]."""
    processor = world["processor"]
    with torch.no_grad():
        output = world["theirs"](**processor.images(world["pictures"]), input_ids=processor.texts(texts).input_ids)
    logits: np.ndarray = output.logits_per_image.double().numpy()
    return logits


def scores(line: dict[str, Any], key: str) -> list[float]:
    """One number for each label, in the order of `LABELS`."""
    found = {one["label"]: one[key] for one in line["labels"]}
    return [found[label] for label in LABELS]


def test_probabilities_are_those_of_the_original(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = asked(capsys, "pics/", "--labels", ",".join(LABELS), "--batch-size", "5")
    assert code == 3
    bad = [line for line in lines if "error" in line]
    good = [line for line in lines if "error" not in line]
    assert [line["image"] for line in bad] == ["pics/bad.png"] and bad[0]["code"] == "not-an-image"
    assert [line["image"] for line in good] == [f"pics/{number:02}.png" for number in range(12)]
    wanted = theirs(world, LABELS)
    assert wanted.std() > 0.01
    assert np.abs(np.array([scores(line, "logit") for line in good]) - wanted).max() < 1e-5
    sigmoid = 1 / (1 + np.exp(-wanted))
    assert np.abs(np.array([scores(line, "probability") for line in good]) - sigmoid).max() < 1e-6
    assert (np.abs(sigmoid.sum(1) - 1) > 0.1).all()  # each label's own, no softmax
    for line, row in zip(good, wanted, strict=True):
        assert [one["label"] for one in line["labels"]] == [LABELS[place] for place in np.argsort(-row)]


def test_several_templates_are_averaged_as_normalised_embeddings(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--labels", ",".join(LABELS), "--template", "{}", "--template", "a {label}"]
    code, lines, _ = asked(capsys, "pics/00.png", *words)
    with torch.no_grad():
        ids = world["processor"].texts([text for name in LABELS for text in (name, f"a {name}")]).input_ids
        rows = torch.nn.functional.normalize(world["theirs"].get_text_features(ids).pooler_output, dim=-1)
        image = world["theirs"].get_image_features(**world["processor"].images(world["pictures"][:1])).pooler_output
    means = torch.nn.functional.normalize(rows.reshape(3, 2, -1).mean(1), dim=-1)
    cosines = torch.nn.functional.normalize(image, dim=-1) @ means.T
    wanted = cosines * world["theirs"].logit_scale.exp() + world["theirs"].logit_bias
    assert code == 0
    assert np.abs(np.array(scores(lines[0], "logit")) - wanted[0].detach().numpy()).max() < 1e-5


def test_top_and_threshold(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["--labels", ",".join(LABELS)]
    (row,) = theirs(world, LABELS)[:1]
    order = [LABELS[place] for place in np.argsort(-row)]
    _, (line,), _ = asked(capsys, "pics/00.png", *labels, "--top", "2")
    assert [one["label"] for one in line["labels"]] == order[:2]
    middle = 1 / (1 + np.exp(-np.sort(row)[1:].mean()))
    _, (line,), _ = asked(capsys, "pics/00.png", *labels, "--threshold", str(middle))
    assert [one["label"] for one in line["labels"]] == order[:1]
    _, (line,), _ = asked(capsys, "pics/00.png", *labels, "--threshold", "1")
    assert line == {"image": "pics/00.png", "labels": []}


def test_a_line_for_each_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("classify", "pics", "gone.png", "-m", "m", "--labels", "cat,tree", "--top", "1") == 3
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 12 and all(line.startswith(f"pics/{n:02}.png  ") for n, line in enumerate(lines))
    assert all(line.split("  ")[1].split()[0] in ("cat", "tree") and line.endswith("%") for line in lines)
    assert "error: not-an-image: pics/bad.png" in err and "error: missing: gone.png" in err
    assert "2 of 14 pictures could not be used" in err
    run("classify", "pics/00.png", "-m", "m", "--labels", "cat", "--threshold", "1")
    assert capsys.readouterr().out == "pics/00.png  none\n"


def test_pictures_from_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = b'pics/00.png\n{"image": "pics/01.png", "id": "one"}\n{"image": 3}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, lines, _ = asked(capsys, "-", "--labels", "cat")
    assert code == 3
    assert sorted(line["image"] for line in lines) == ["one", "pics/00.png", "stdin:3"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    code, lines, err = asked(capsys, "-", "--labels", "cat")
    assert (code, lines) == (2, []) and "the sources are empty" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to classify"),
        (["pics"], "no labels"),
        (["pics", "--labels", ","], "--labels: no labels"),
        (["pics", "--labels", "a", "--labels-file", "b"], "not allowed with"),
        (["pics", "--labels-file", "gone.txt"], "gone.txt: cannot be read"),
        (["pics", "--labels", "a", "--template", "a photo"], "exactly once"),
        (["pics", "--labels", "a", "--template", "{}", "--templates", "none"], "not allowed with"),
        (["pics", "--labels", "a", "--threshold", "2"], "from 0 to 1"),
        (["pics", "--labels", "a", "--calibration", "pics/00.png"], "not UTF-8"),
        (["pics", "--labels", "a", "--calibration", "m/config.json"], "no calibration"),
        (["--calibrate", "gone.jsonl"], "no picture with labels"),
        (["gone.png", "--labels", "a"], ""),
        (["pics/bad.png", "--labels", "a"], ""),
    ],
)
def test_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = asked(capsys, *words)
    assert code == 2 and said in err and "Traceback" not in err


def test_the_names_of_templates_are_those_of_the_table() -> None:
    assert get_args(TemplateSet) == tuple(TEMPLATES)


# --- many labels


def test_many_labels_are_kept(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """81 templates: the second run reads what the first one kept, --no-cache does not, and all say the same."""
    words = ["pics/00.png", "--labels", "cat,tree", "--templates", "imagenet"]
    cache = tmp_path / "cache" / "vlm" / "classes"
    _, first, _ = asked(capsys, *words)
    (kept,) = cache.iterdir()
    _, again, _ = asked(capsys, *words)
    kept.unlink()
    _, anew, _ = asked(capsys, *words, "--no-cache")
    assert first == again == anew and not list(cache.iterdir())
    asked(capsys, "pics/00.png", "--labels", "cat,tree")
    assert not list(cache.iterdir())  # two texts cost less than a look at the weights
    monkeypatch.setattr("vlm.siglip.classes.encode_texts", lambda *_, **__: pytest.fail("embedded again"))
    with pytest.raises(pytest.fail.Exception, match="embedded again"):
        run("classify", *words, "-m", "m")


def test_other_weights_are_not_mistaken(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["classify", "pics/00.png", "--labels", "cat,tree", "--templates", "imagenet", "--json"]
    write(tmp_path / "other", "siglip")
    weights = tmp_path / "other" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1  # the last bits of one number
    weights.write_bytes(data)
    for model in ("m", str(tmp_path / "other")):
        assert run(*words, "-m", model) == 0
    assert len(list((tmp_path / "cache" / "vlm" / "classes").iterdir())) == 2


# --- calibration


def labelled(path: Path, rows: list[Any]) -> Path:
    """A JSONL of `pics/NN.png` with `label` (text) or `labels` (a list)."""
    lines = [
        {"image": f"pics/{number:02}.png", "label" if isinstance(row, str) else "labels": row}
        for number, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_calibrate_then_classify(world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [LABELS[number % 3] for number in range(12)]
    data, out = labelled(world["folder"] / "lab.jsonl", rows), tmp_path / "c.json"
    before = {path: path.read_bytes() for path in (world["folder"] / "m").iterdir()}
    code, (report,), _ = asked(
        capsys, "--calibrate", str(data), "--labels", ",".join(LABELS), "--calibration", str(out)
    )
    assert code == 0 and report["num_images"] == 12
    truth = np.array([[label == row for label in LABELS] for row in rows])
    wanted = fit(theirs(world, LABELS), truth, "sigmoid")
    kept = json.loads(out.read_text())
    assert kept["temperature"] == pytest.approx(wanted.temperature, rel=1e-3)
    assert kept["bias"] == pytest.approx(wanted.bias, rel=1e-3)
    assert kept["measured"]["num_images"] == 12 and kept["labels"] == LABELS
    assert before == {path: path.read_bytes() for path in (world["folder"] / "m").iterdir()}
    _, lines, err = asked(capsys, "pics/00.png", "--labels", ",".join(LABELS), "--calibration", str(out))
    logits = theirs(world, LABELS)[0] / wanted.temperature + wanted.bias
    assert np.abs(np.array(scores(lines[0], "logit")) - logits).max() < 1e-4
    assert np.abs(np.array(scores(lines[0], "probability")) - 1 / (1 + np.exp(-logits))).max() < 1e-4
    assert "other labels" not in err
    _, _, err = asked(capsys, "pics/00.png", "--labels", "cat", "--calibration", str(out))
    assert "fitted on other labels (cat, Blue dog, tree)" in err


def test_a_calibration_is_of_one_model_and_its_templates(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, out = labelled(world["folder"] / "lab.jsonl", ["cat", "tree"] * 6), tmp_path / "c.json"
    asked(capsys, "--calibrate", str(data), "--template", "a {}", "--calibration", str(out))
    words = ["pics/00.png", "--labels", "cat,tree", "--calibration", str(out)]
    code, own, _ = asked(capsys, *words)  # the templates of the file, where none are given
    assert code == 0 and asked(capsys, *words, "--template", "a {}")[1] == own
    code, _, err = asked(capsys, *words, "--templates", "none")
    assert code == 2 and "templates: there given, now none" in err
    from safetensors.torch import load_file, save_file

    write(tmp_path / "other", "siglip")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["logit_scale"] += 0.1
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert run("classify", *words, "-m", str(tmp_path / "other")) == 2
    assert "other weights of the model" in capsys.readouterr().err


def test_several_labels_a_picture_and_lines_that_say_none(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = labelled(world["folder"] / "lab.jsonl", [["cat", "tree"], [], ["tree"], ["cat"], [], ["cat"]])
    with data.open("a") as file:
        file.write('{"image": "pics/06.png"}\n{"image": "pics/07.png", "label": 3}\n')
        file.write('{"image": "pics/bad.png", "label": "cat"}\n')
    code, lines, _ = asked(capsys, "--calibrate", str(data), "--calibration", str(tmp_path / "c.json"))
    codes = [line["code"] for line in lines if "error" in line]
    assert code == 3 and codes == ["missing-key", "wrong-type", "not-an-image"]
    assert (lines[-1]["num_images"], lines[-1]["num_labels"], lines[-1]["num_positive"]) == (6, 2, 5)
    code, _, err = asked(capsys, "--calibrate", str(data), "--labels", "cat")
    assert code == 2 and "labels that are not among those given: tree" in err


def test_what_a_calibration_says_for_people(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = labelled(world["folder"] / "lab.jsonl", ["cat", "tree"] * 6)
    words = ["--calibrate", str(data), "--calibration", str(tmp_path / "c.json"), "-m", "m"]
    assert run("classify", *words) == 0
    out = capsys.readouterr().out
    assert (
        "calibration error, best label" in out and "5 parts in turn" in out and "fitted on 12 pictures, 2 labels" in out
    )
    assert run("classify", "pics/00.png", *words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("pics/00.png  ") and out.count("\n") == 1 and "calibration error" in err


@pytest.mark.parametrize("key", ["temperature", "bias", "objective", "templates", "space", "kind"])
def test_a_damaged_calibration_is_refused(
    key: str, world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, out = labelled(world["folder"] / "lab.jsonl", ["cat", "tree"] * 6), tmp_path / "c.json"
    asked(capsys, "--calibrate", str(data), "--calibration", str(out))
    value = json.loads(out.read_text())
    value[key] = None
    out.write_text(json.dumps(value))
    code, _, err = asked(capsys, "pics/00.png", "--labels", "cat,tree", "--calibration", str(out))
    assert code == 2 and "c.json" in err and "Traceback" not in err


def test_a_model_with_softmax(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights read as CLIP's are: no bias, one label among all, a temperature alone."""
    model, processor = load("m")
    model.objective = OBJECTIVES["softmax"]
    monkeypatch.setattr("vlm.siglip.loading.load", lambda *_, **__: (model, processor))
    logits = theirs(world, LABELS) - world["theirs"].logit_bias.item()
    words = ["--labels", ",".join(LABELS)]
    _, (line,), err = asked(capsys, "pics/00.png", *words)
    wanted = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert np.abs(np.array(scores(line, "probability")) - wanted).max() < 1e-5 and "--threshold" not in err
    assert "they compete" in asked(capsys, "pics/00.png", *words, "--threshold", "0.9")[2]
    code, _, err = asked(capsys, "pics/00.png", "--labels", "cat")
    assert code == 2 and "give two or more" in err
    rows = [LABELS[number % 3] for number in range(12)]
    data = labelled(world["folder"] / "lab.jsonl", rows)
    _, (report,), _ = asked(capsys, *words, "--calibrate", str(data), "--calibration", str(tmp_path / "c.json"))
    found = fit(logits, np.array([[label == row for label in LABELS] for row in rows]), "softmax")
    kept = json.loads((tmp_path / "c.json").read_text())
    assert kept["temperature"] == pytest.approx(found.temperature, rel=1e-3)
    assert (kept["bias"], kept["objective"], report["num_images"]) == (0, "softmax", 12)


def test_openai_templates_are_read_with_their_punctuation(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """SigLIP 2 reads punctuation, so that canonical texts are others."""
    found = [
        asked(capsys, "pics/00.png", "--labels", "cat", "--templates", name)[1][0]["labels"][0]["logit"]
        for name in ("openai", "imagenet")
    ]
    texts = [text.replace("{}", "cat") for text in OPENAI]
    with torch.no_grad():
        ids = world["processor"].texts(texts).input_ids
        rows = torch.nn.functional.normalize(world["theirs"].get_text_features(ids).pooler_output, dim=-1)
        image = world["theirs"].get_image_features(**world["processor"].images(world["pictures"][:1])).pooler_output
    cosine = torch.nn.functional.cosine_similarity(image, rows.mean(0)[None])
    wanted = float((cosine * world["theirs"].logit_scale.exp() + world["theirs"].logit_bias).detach())
    assert found[0] == pytest.approx(wanted, abs=1e-4)
    assert abs(found[1] - found[0]) > 1e-4
