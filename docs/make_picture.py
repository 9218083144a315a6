"""Draw the README's picture: held-out scenes of a finished demo with what its model says of them.

python docs/make_picture.py demo docs/images/demo.png
"""

import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from PIL import Image

import vlm

SHOWN = 5


def main(folder: Path, target: Path) -> None:
    model, processor = vlm.load(folder / "model")
    lines = (folder / "data" / "test_questions.jsonl").read_text().splitlines()
    questions: dict[str, list[dict]] = {}
    for line in map(json.loads, lines):
        questions.setdefault(line["image"], []).append(line)
    images = sorted(questions)[3 : 3 + SHOWN]
    pictures = [Image.open(folder / "data" / name).convert("RGB") for name in images]
    captions = vlm.generate(model, processor, pictures, ["caption en"] * SHOWN)
    figure, axes = plt.subplots(1, SHOWN, figsize=(2.5 * SHOWN, 4.1), layout="constrained")
    for axis, name, picture, caption in zip(axes, images, pictures, captions, strict=True):
        asked = questions[name][:3]
        answers = vlm.generate(model, processor, [picture] * len(asked), [item["prefix"] for item in asked])
        axis.imshow(picture, interpolation="nearest")
        axis.set_axis_off()
        text = textwrap.fill(caption, 30)
        for item, answer in zip(asked, answers, strict=True):
            question = item["prefix"].removeprefix("answer en ")
            right = "" if answer == item["suffix"] else f"  (wrong: {item['suffix']})"
            text += "\n\n" + textwrap.fill(question, 30) + f"\n  → {answer}{right}"
        axis.text(0, 76, text, fontsize=9, va="top", color="#222222")
        axis.set_ylim(72 + 92, -0.5)
    figure.savefig(target, dpi=110, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
