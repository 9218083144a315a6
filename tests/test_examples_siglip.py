"""examples/siglip, run at a small size."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent.parent / "examples" / "siglip"
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange", "pink", "brown")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(path: Path, languages: tuple[str, ...]) -> Path:
    """Ten colours, a disc by one hand and a square by the other, named in every language."""
    records = []
    with zipfile.ZipFile(path, "w") as made:
        for number, colour in enumerate(COLOURS):
            for hand in ("noto", "twemoji"):
                image = Image.new("RGBA", (64, 64))
                pen = ImageDraw.Draw(image)
                (pen.ellipse if hand == "noto" else pen.rectangle)((8, 8, 56, 56), fill=colour)
                data = BytesIO()
                image.save(data, "PNG")
                made.writestr(f"images/{hand}/{number}.png", data.getvalue())
            names = {language: f"{language} {colour}" for language in languages}
            records.append(
                {
                    "id": str(number),
                    "names": names,
                    "keywords": {language: [name] for language, name in names.items()},
                    "group": "Flags" if number % 2 else "Symbols",
                    "images": {hand: f"images/{hand}/{number}.png" for hand in ("noto", "twemoji")},
                    "split": "test" if number >= 8 else "train",
                }
            )
        made.writestr("emoji.jsonl", "\n".join(map(json.dumps, records)))
    return path


@pytest.mark.slow
def test_emoji(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("emoji")
    data = archive(tmp_path / "emoji.zip", module.LANGUAGES)
    found = module.main([str(data), "--out", str(tmp_path / "out"), "--steps", "60"])
    assert (found["seen"]["drawings"], found["unseen"]["drawings"]) == (8, 2)
    # Sixty steps on eight colours: the other hand's squares are found far more often than by chance, 1 in 8.
    assert sum(found["seen"]["R@1"].values()) / len(module.LANGUAGES) > 0.4
    assert "concepts never seen: 2 drawings" in capsys.readouterr().out
    # What it wrote is a checkpoint like any other.
    again = module.main([str(data), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "out" / "model")])
    assert again == found


def test_recall_counts_rows(capsys: pytest.CaptureFixture[str]) -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]])
    recall = example("emoji").recall
    assert [recall(scores, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    found = example("digits").main(["--most", "200"])
    for ours, theirs in found.values():
        assert ours == pytest.approx(theirs)
    assert found["tower"][0] > 0.2 and found["pixels"][0] > 0.8  # chance is 0.1


def test_both_say_how_to_run_them() -> None:
    for file in FOLDER.glob("*.py"):
        assert f"python examples/siglip/{file.name}" in file.read_text(encoding="utf-8"), file
